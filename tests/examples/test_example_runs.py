"""The examples' pipelines in their quick form: less data and fewer periods, all else as the files say."""

from __future__ import annotations

import gzip
import runpy
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import servers
from ray import serve

from rayfm.client import Client, Ticket
from rayfm.config import read_yaml, validate
from rayfm.data.store import ExampleStore
from rayfm.pipeline.config import PipelineConfig, load_config
from rayfm.pipeline.here import run_here
from rayfm.pipeline.stream import Pipeline
from rayfm.serving.application import start_teacher, stop_teacher
from rayfm.serving.nearline.application import (
    consumer_name,
    start_consumers,
    start_intake,
    stop_nearline,
)
from rayfm.serving.nearline.config import NearLineConfig
from rayfm.serving.nearline.labels import NearLineLabels
from rayfm.serving.replicas import Replicas
from rayfm.serving.teacher import TeacherServiceConfig, load_version, score_table

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
    pipeline, summary = ran(quick(name, folder, LESS))
    check_all_models(pipeline, summary)


@pytest.mark.ray
def test_the_cascades_stages_teach_one_another(folder: Path, ray_session: None) -> None:
    # A store of its own: it logs a share of what retrieval drops.
    source = "data.source={type: simulator, seed: 21, periods: 5, requests_per_period: 300, consideration_share: "
    config = quick("cascade", folder / "cascade", source + "{retrieval: 0.02, early: 0.2, ranking: 0.2}}")
    pipeline, summary = ran(config)
    check_all_models(pipeline, summary)
    # Each later stage has labelled for the one before it.
    assert all(pipeline.labels.list(teacher) for teacher in ("ranking", "early"))


@pytest.mark.ray
def test_three_days_of_kuairand(kuairand: Path, tmp_path: Path, ray_session: None) -> None:
    less = ("data.source.end=2022-04-27", "schedule.warmup=1", "teachers.teacher.training.batch_size=512")
    pipeline, summary = ran(quick("kuairand", tmp_path, *less, data=kuairand))
    check_all_models(pipeline, summary)
    aucs = {row["model"]: row["value"] for row in summary["metrics"] if row["metric"] == "auc"}
    assert aucs["teacher"] > 0.65


def check_all_models(pipeline: Pipeline, summary: dict[str, Any]) -> None:
    """Every model of the config was scored and published."""
    scored = {(row["model"], row["variant"]) for row in summary["metrics"]}
    assert scored == models(pipeline.config)
    published = pipeline.snapshots.models()
    for student, variant in scored:
        keys = [key for key in published if key.startswith(f"{student}.{variant}.")]
        assert keys, f"{student}.{variant} was not published"


@pytest.mark.ray
@pytest.mark.timeout(400)  # four waits for replicas and labels, each with its own limit
def test_rows_that_are_posted_are_labelled_by_a_runs_teacher(
    folder: Path, fresh_ray: None, redis_server: servers.Server
) -> None:
    """As `rayfm nearline serve` starts it, asked with the client that users have; consumers follow the queue's length,
    here two messages for each.
    """
    # What the demo has too: a teacher of that name on the simulator, trained above already where that test has run.
    pipeline, _ = ran(quick("quickstart", folder, LESS))
    example = read_yaml(EXAMPLES / "near_line.yaml")
    consumer = example["consumer"] | {"queue_per_replica": 2, "poll_s": 0.5, "tickets": 1, "cpus": 0.1}
    here = {"root": str(pipeline.run_dir), "redis": f"redis://{redis_server.address}/1", "consumer": consumer}
    settings = validate(NearLineConfig, example | here, "near_line.yaml")
    # The last day's rows, a day later: what the teacher was trained on it must not label.
    rows = pq.read_table(pipeline.store.lane_path(pipeline.periods[-1], "impression", 0)).slice(0, 20)
    times = pc.add(rows["time"], 86_400_000_000)
    rows = rows.set_column(rows.schema.get_field_index("time"), "time", times)
    tickets: list[Ticket] = []
    url = start_intake([settings], servers.free_port(), cpus=0.1)
    try:
        service = TeacherServiceConfig(root=settings.root, model=settings.model)
        start_teacher(settings.run, settings.teacher, service, Replicas(cpus=0.1))
        start_consumers(settings)
        with Client(url) as client:
            deadline = time.monotonic() + 90
            while consumers(settings) == 1:
                assert time.monotonic() < deadline, "no consumer came"
                tickets.append(client.label(settings.teacher, rows))
            for ticket in tickets:
                assert client.wait_for_labels(ticket, timeout_s=90, poll_s=0.1).state == "committed"
            deadline = time.monotonic() + 90
            while consumers(settings) > 1:
                assert time.monotonic() < deadline, "no consumer went"
                time.sleep(0.2)
            tickets.append(client.label(settings.teacher, rows))
            assert client.wait_for_labels(tickets[-1], timeout_s=90, poll_s=0.1).state == "committed"
    finally:
        stop_nearline(settings)
        stop_teacher(settings.run, settings.teacher)
    assert {(ticket.rows, ticket.rejected) for ticket in tickets} == {(rows.num_rows, 0)}
    stored = NearLineLabels(settings.root).rows(settings.teacher)
    ids = rows["example_id"].to_pylist()
    found = zip(stored["ticket"].to_pylist(), stored["example_id"].to_pylist(), strict=True)
    assert sorted(found) == sorted((ticket.ticket, row) for ticket in tickets for row in ids)
    loaded = load_version(pipeline.snapshots, settings.model, tickets[0].version)
    expected = dict(zip(ids, score_table(loaded, rows)["click"].to_pylist(), strict=True))
    scores = stored["task_click"].to_pylist()
    assert scores == pytest.approx([expected[row] for row in stored["example_id"].to_pylist()], rel=1e-5, abs=1e-6)


def consumers(settings: NearLineConfig) -> int:
    """Those that run now."""
    (deployment,) = serve.status().applications[consumer_name(settings)].deployments.values()
    return int(deployment.replica_states.get("RUNNING", 0))


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
