"""``ray job submit`` of the main job: it takes up a run that was killed; and what is refused."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import run_config
from ray_head import Head, running_head, write_token
from small_pipeline import write_config

from rayfm.pipeline.config import load_config
from rayfm.pipeline.here import run_here
from rayfm.snapshots.load import SnapshotStore


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with running_head(tmp_path_factory.mktemp("token")) as running:
        yield running


@pytest.mark.timeout(300)
def test_a_wrong_config_is_a_failed_job_of_one_line(head: Head, tmp_path: Path) -> None:
    config = write_config(tmp_path, shedule={})
    result = head.submit(str(config))
    assert result.returncode == 1
    output = result.stdout + result.stderr
    errors = {line for line in output.splitlines() if line.startswith("error:")}
    assert errors == {f"error: {config}: unknown key 'shedule'; did you mean 'schedule'?"}
    assert "Traceback" not in output


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("mode", "refusal"), [("token", "Invalid authentication"), ("disabled", "Missing authentication")]
)
def test_without_the_right_token_nothing_is_submitted(head: Head, tmp_path: Path, mode: str, refusal: str) -> None:
    token = write_token(tmp_path / "token")
    result = head.submit(str(write_config(tmp_path)), RAY_AUTH_TOKEN_PATH=str(token), RAY_AUTH_MODE=mode)
    assert result.returncode != 0
    assert refusal in result.stdout + result.stderr
    assert not (tmp_path / "runs").exists()


def one_student(folder: Path, **changes: Any) -> Path:
    """A run of the simulator's smallest world with one student in two variants; what it prepares lies in ``folder``."""
    config = run_config.small_pipeline(folder, **changes)
    student = config["students"]["fm"]
    student["variants"] = {name: student["variants"][name] for name in ("none", "direct")}
    config["students"] = {"fm": student}
    return run_config.write_config(folder, config)


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_session")
def test_a_killed_run_submitted_as_a_job_ends_with_the_same_metrics(head: Head, tmp_path: Path) -> None:
    """SIGKILL of the whole run once the students are in their second period; a cluster's job takes it up."""
    promotion = {"rules": [{"metric": "ne", "margin": 10.0}, {"metric": "auc", "margin": 0.0}]}
    path = one_student(tmp_path, seeds=[9], promotion=promotion)
    seeds = "seeds=[1]"  # where they do not reach the job, it refuses to go on
    run_dir = tmp_path / "runs" / "small"
    process = subprocess.Popen(
        [sys.executable, "-m", "rayfm.cli.main", "run", str(path), "--set", seeds],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    marker = run_dir / "trainers" / "students" / "periods" / "2025-01-02.json"
    try:  # the test's own timeout ends a run that hangs: how long it takes hangs on what else the machine does
        while not marker.exists():
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (run_dir / "summary.json").exists()
    result = head.submit(str(path), seeds)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "succeeded" in result.stdout
    assert "train students 4/4" in " ".join(result.stdout.split())
    assert f"{run_dir / 'report.html'}" in result.stdout

    # One that nobody broke off, in this process, on what that run prepared.
    whole = tmp_path / "whole"
    whole.mkdir()
    unbroken = run_here(load_config(one_student(whole, seeds=[1], storage=str(tmp_path / "data"), promotion=promotion)))
    unbroken.finish()
    ours, theirs = (run_config.metric_lines(folder) for folder in (run_dir, unbroken.run_dir))
    assert {(key[1], key[2]) for key in ours} == {("teacher", "teacher"), ("fm", "none"), ("fm", "direct")}
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key] == (None if value is None else pytest.approx(value, rel=1e-5, abs=1e-7)), key

    # Each version was decided on once, and as in the run that nobody broke off.
    for model in ("fm.none.1", "fm.direct.1"):
        versions = SnapshotStore(run_dir).versions(model)
        assert versions == unbroken.snapshots.versions(model)
        taken, expected = (
            [store.promotion(model, v) for v in versions] for store in (SnapshotStore(run_dir), unbroken.snapshots)
        )
        assert taken[0] is not None
        assert taken[-1] is None, "the newest waits for the next period"
        for ours_, theirs_ in zip(taken[:-1], expected[:-1], strict=True):
            assert ours_ is not None
            assert theirs_ is not None
            assert (ours_.decision, ours_.predecessor, ours_.period, ours_.rows) == (
                theirs_.decision,
                theirs_.predecessor,
                theirs_.period,
                theirs_.rows,
            )
            assert [f.value for f in ours_.figures] == pytest.approx([f.value for f in theirs_.figures], rel=1e-5)
