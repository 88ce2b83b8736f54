"""The examples' pipelines in their quick form: less data and fewer periods, all else as the files say."""

from __future__ import annotations

import gzip
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from rayfm.data.store import ExampleStore
from rayfm.pipeline.config import PipelineConfig, load_config
from rayfm.pipeline.here import run_here
from rayfm.pipeline.stream import Pipeline

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LESS = "data.source={type: simulator, seed: 7, periods: 4, requests_per_period: 400}"


def quick(name: str, folder: Path, *changes: str, data: Path | None = None) -> PipelineConfig:
    """An example whose store, shared by those on the simulator, and runs lie below ``folder``."""
    places = (f"storage={folder / 'data'}", f"runs={folder / 'runs'}", "schedule.warmup=1")
    return load_config(EXAMPLES / f"{name}.yaml", [*places, "evaluation.replicates=10", *changes], data and str(data))


def ran(config: PipelineConfig) -> tuple[Pipeline, dict[str, Any]]:
    """What a run leaves: everything but worker groups and services is that of `rayfm run`."""
    Pipeline(config).prepare()
    pipeline = run_here(config)
    summary, report = pipeline.finish()
    assert report.is_file()
    return pipeline, summary


def models(config: PipelineConfig) -> set[tuple[str, str]]:
    """(student, variant) of all, and the teachers'."""
    students = {(name, variant) for name, student in config.students.items() for variant in student.variants}
    return students | {(name, "teacher") for name in config.teachers}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples")


@pytest.mark.ray
@pytest.mark.parametrize("name", ["quickstart", "multi_surface", "signal_loss"])
def test_the_simulators_examples_run(name: str, folder: Path, ray_session: None) -> None:
    config = quick(name, folder, LESS)
    pipeline, summary = ran(config)
    scored = {(row["model"], row["variant"]) for row in summary["metrics"]}
    assert scored == models(config)
    published = pipeline.snapshots.models()
    for student, variant in scored:
        keys = [key for key in published if key.startswith(f"{student}.{variant}.")]
        assert keys, f"{student}.{variant} was not published"


def write_criteo(path: Path, rows: int, seed: int) -> None:
    """Text as Criteo publishes it, with its empty fields; clicks depend on C3."""
    random = np.random.default_rng(seed)
    categories = random.integers(0, 50, (rows, 26))
    clicks = random.random(rows) < np.where(categories[:, 2] % 2, 0.6, 0.1)
    lines = []
    for click, counts, ids in zip(clicks, random.poisson(3, (rows, 13)), categories, strict=True):
        numbers = ["" if value == 0 else str(value - 1) for value in counts]
        names = ["" if value == 0 else f"{value:08x}" for value in ids]
        lines.append("\t".join([str(int(click)), *numbers, *names]))
    with gzip.open(path, "wt") as file:
        file.write("\n".join(lines) + "\n")


@pytest.mark.ray
def test_criteos_text_becomes_parquet_and_the_example_learns_from_it(tmp_path: Path, ray_session: None) -> None:
    script = runpy.run_path(str(EXAMPLES / "criteo_to_parquet.py"))
    days = [tmp_path / f"day_{day}.gz" for day in range(3)]
    for day, path in enumerate(days):
        write_criteo(path, 3000, day)
    assert script["main"]([str(tmp_path / "parquet"), *map(str, days)]) == 0
    table = pq.read_table(tmp_path / "parquet")
    assert table["example_id"].to_pylist() == list(range(9000))
    assert table["C1"].null_count == 0
    assert table["I1"].null_count > 0
    changes = ("data.source.path=" + str(tmp_path / "parquet"), "students.fm.variants={none: []}")
    small = (
        "teachers.teacher.training.batch_size=128",
        "groups.students.batch_size=128",
        "groups.students.warmup_steps=5",
        "teachers.teacher.training.warmup_steps=5",
        "teachers.teacher.model.hidden=[32]",
        *(f"schema.tables.C{number}.rows=2000" for number in range(1, 27)),
    )
    config = quick("criteo", tmp_path, *changes, *small)
    _, summary = ran(config)
    manifests = [ExampleStore(config.storage).manifest(f"2025-01-0{day}") for day in (1, 2, 3)]
    assert [manifest.rows("impression") for manifest in manifests] == [3000] * 3
    aucs = {(row["model"], row["variant"]): row["value"] for row in summary["metrics"] if row["metric"] == "auc"}
    assert set(aucs) == models(config)
    assert aucs["teacher", "teacher"] > 0.6


def test_one_file_of_criteos_is_divided_into_days(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(EXAMPLES / "criteo_to_parquet.py"))
    write_criteo(tmp_path / "train.txt.gz", 700, 1)
    assert script["main"]([str(tmp_path / "out"), str(tmp_path / "train.txt.gz"), "--days", "7"]) == 0
    assert "700 rows in" in capsys.readouterr().out
    times = pq.read_table(tmp_path / "out" / "train.parquet")["time"].to_numpy()
    assert np.unique(times // script["DAY_US"], return_counts=True)[1].tolist() == [100] * 7
    (tmp_path / "bad.txt").write_text("1\tno number" + "\t" * 38 + "\n")
    assert script["main"]([str(tmp_path / "out"), str(tmp_path / "bad.txt")]) == 1
    assert "no number" in capsys.readouterr().err
