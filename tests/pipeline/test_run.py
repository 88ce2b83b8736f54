"""The main job, whole: it runs, and refuses what does not fit. A killed one that goes on is in `test_job_submit`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_config import metric_lines, small_pipeline, write_config
from typer.testing import CliRunner

from rayfm.cli.main import app
from rayfm.config import CapacityError, ConfigError, RayfmError
from rayfm.pipeline.config import load_config
from rayfm.pipeline.stream import Pipeline, run
from rayfm.snapshots.load import SnapshotStore

RAYFM = [sys.executable, "-m", "rayfm.cli.main"]
ENVIRONMENT = os.environ | {"COLUMNS": "80", "OMP_NUM_THREADS": "1"}


def rayfm(
    *arguments: str, timeout: float = 240, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*RAYFM, *arguments],
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        cwd=cwd,
    )


@pytest.fixture(scope="module")
def dead_cluster() -> Iterator[str]:
    """A folder for ``RAY_TMPDIR`` with the note that an earlier ``ray start`` left of a cluster that is gone."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # a Unix socket's path has 107 characters at most
        note = Path(folder) / "ray" / "ray_current_cluster"
        note.parent.mkdir()
        note.write_text("127.0.0.1:1")
        yield folder
        assert note.read_text() == "127.0.0.1:1", "the note is not of the run's own Ray"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, dead_cluster: str) -> tuple[Path, str]:
    """A run from end to end, as a user starts it: with folders relative to where the user stands, and on a machine
    where somebody's cluster once ran."""
    folder = tmp_path_factory.mktemp("unbroken")
    path = write_config(folder, small_pipeline(folder, storage="data", runs="runs"))
    result = rayfm("run", str(path), cwd=folder, RAY_TMPDIR=dead_cluster)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder, result.stdout


@pytest.mark.timeout(400)
def test_a_run_leaves_what_it_promises(unbroken: tuple[Path, str]) -> None:
    folder, output = unbroken
    run_dir = folder / "runs" / "small"
    assert all(len(line) <= 80 for line in output.splitlines()), output
    assert "Report:" in output
    for name in ("two_tower", "fm", "none", "direct", "aux_adapter", "teacher"):
        assert name in output
    for name in ("config.yaml", "metrics.jsonl", "progress.jsonl", "summary.json", "report.html"):
        assert (run_dir / name).stat().st_size > 0, name
    again = load_config(run_dir / "config.yaml")
    folders = {"storage": str(folder / "data"), "runs": str(folder / "runs")}
    asked = load_config(folder / "small.yaml").model_copy(update=folders)
    assert again == asked, "the resolved config gives the same pipeline, from any folder"
    summary = json.loads((run_dir / "summary.json").read_text())
    assert len(summary["periods"]) == 2
    rows = {(r["model"], r["variant"], r["kind"], r["metric"]) for r in summary["metrics"] if r["task"] == "click"}
    for model in ("two_tower", "fm"):
        for variant in ("none", "direct", "aux_adapter"):
            for kind in ("impression", "consideration"):
                assert (model, variant, kind, "ne") in rows
                assert (model, variant, kind, "calibration") in rows
    events = [json.loads(line) for line in (run_dir / "progress.jsonl").read_text().splitlines()]
    labelled = [event for event in events if event["event"] == "labelled"]
    assert [event["period"] for event in labelled] == [f"2025-01-0{day}" for day in (2, 3, 4)]
    for event in labelled:
        assert event["coverage"] == {"impression": 1.0, "consideration": 1.0}
        assert event["trained_through"] < event["period"], "no teacher labels what it saw"


def test_what_a_run_published_is_intact_and_listed(unbroken: tuple[Path, str]) -> None:
    folder, _ = unbroken
    run_dir = folder / "runs" / "small"
    store = SnapshotStore(run_dir)
    assert set(store.models()) >= {"teacher.teacher.0", "fm.none.1", "fm.direct.1", "two_tower.aux_adapter.1"}
    for model in store.models():
        kept = 4 if model.startswith("teacher") else 3
        assert len(store.versions(model)) == kept, "superseded versions of students are collected"
        store.verify(model, store.latest(model))
    listed = CliRunner().invoke(app, ["labels", "list", str(run_dir)])
    assert listed.exit_code == 0
    assert "2025-01-04" in listed.stdout


@pytest.mark.usefixtures("ray_session")
def test_a_run_is_not_overwritten_by_accident(unbroken: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = unbroken
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match=r"--resume .*--overwrite"):
        run(load_config("small.yaml"))


@pytest.mark.usefixtures("ray_session")
def test_too_few_cpus_are_refused_at_the_start(tmp_path: Path) -> None:
    config = small_pipeline(tmp_path)
    config["groups"]["students"] |= {"workers": 3, "cpus_per_worker": 1.0}
    message = r"the plan needs 4\.25 CPUs at once and Ray has 4:(?s:.*)3 trainer students \(3 x 1\)"
    with pytest.raises(CapacityError, match=message):
        run(load_config(write_config(tmp_path, config)))


@pytest.mark.usefixtures("ray_session")
def test_a_wrong_world_in_the_store_is_refused_at_the_start(unbroken: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = unbroken
    config = small_pipeline(tmp_path, storage=str(folder / "data"))
    config["data"]["source"]["seed"] = 4
    started = time.monotonic()
    with pytest.raises(RayfmError, match="prepared from another source"):
        run(load_config(write_config(tmp_path, config)))
    assert time.monotonic() - started < 60, "refused before trainers and services start"


@pytest.mark.ray
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("ray_session")
def test_the_parts_one_by_one_give_the_same_run(unbroken: tuple[Path, str], tmp_path: Path) -> None:
    """prepare, train, label, train students, report: each as a function, on the session's Ray."""
    from rayfm.pipeline import parts

    folder, _ = unbroken
    config = load_config(write_config(tmp_path, small_pipeline(tmp_path, storage=str(folder / "data"))))
    assert len(parts.prepare(config)) == 4
    with pytest.raises(RayfmError, match="labels of teacher for period 2025-01-02 are not there"):
        parts.train(config, ["students"])
    Pipeline(config).tickets.clear_failure()
    assert parts.train(config).keys() == {"teacher"}
    tickets = parts.label(config)
    assert [ticket["period"] for ticket in tickets] == ["2025-01-02", "2025-01-03", "2025-01-04"]
    parts.train(config, ["students"])
    summary, report = parts.write_report(config.run_dir)
    assert report.exists()
    theirs = json.loads((folder / "runs" / "small" / "summary.json").read_text())
    for ours, expected in zip(summary["metrics"], theirs["metrics"], strict=True):
        assert ours["value"] == (None if expected["value"] is None else pytest.approx(expected["value"], rel=1e-5))
    rows = parts.evaluate(config, "fm.none.1", ("2025-01-04",), SnapshotStore(config.run_dir).versions("fm.none.1")[-2])
    stored = metric_lines(config.run_dir)
    for row in rows:
        if row["metric"] in ("ne", "auc", "calibration") and row["kind"] == "impression":
            key = ("2025-01-04", "fm", "none", 1, row["traffic"], "impression", row["task"], row["metric"])
            assert row["value"] == (None if stored[key] is None else pytest.approx(stored[key], rel=1e-4))


def test_capacity_counts_every_part(tmp_path: Path) -> None:
    from rayfm.pipeline.capacity import check_capacity

    config = load_config(write_config(tmp_path, small_pipeline(tmp_path)))
    check_capacity(config, 2.0)
    with pytest.raises(CapacityError, match=r"needs 1\.75 CPUs at once and Ray has 1:"):
        check_capacity(config, 1.0)
