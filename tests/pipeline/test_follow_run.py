"""A run that follows, as a user starts and stops it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from example_store import DAY_US, every_feature_rows
from small_pipeline import FIRST_DAY_US, write_config

from rayfm.pipeline.config import load_config
from rayfm.pipeline.stream import Pipeline

DAYS = [f"2024-01-{day:02d}" for day in range(1, 6)]
ROWS = 40


def begin(folder: Path, day: int) -> None:
    """The log gets a day; so the day before it is complete."""
    table = every_feature_rows(ROWS, seed=day, start=FIRST_DAY_US + (day - 1) * DAY_US)
    path = folder / "log" / f"{DAYS[day - 1]}.parquet"
    pq.write_table(table, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)


def json_lines(text: str) -> list[dict[str, Any]]:
    """The log lines among others."""
    return [json.loads(line) for line in text.splitlines() if line.startswith('{"time"')]


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Where a Ray of its own keeps its logs: short, as a Unix socket's path has 107 characters."""
    with tempfile.TemporaryDirectory(prefix="rayfm", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.mark.timeout(400)
def test_a_run_follows_its_log_until_it_is_terminated(tmp_path: Path, ray_folder: Path) -> None:
    path = write_config(  # three days, two of them complete
        tmp_path,
        follow={"poll_s": 0.2},
        ray={"cpus": 2},
        promotion={"rules": [{"metric": "logloss", "margin": 10.0}]},
        logging={"format": "json", "level": "info"},
    )
    run_dir = tmp_path / "runs" / "small"
    process = subprocess.Popen(
        [sys.executable, "-m", "rayfm.cli.main", "run", str(path), "--follow"],
        env=os.environ | {"COLUMNS": "80", "OMP_NUM_THREADS": "1", "RAY_TMPDIR": str(ray_folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

    def wait_for(day: int) -> None:
        deadline = time.monotonic() + 180
        marker = run_dir / "trainers" / "students" / "periods" / f"{DAYS[day - 1]}.json"
        while not marker.exists():
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline, f"the students never finished day {day}"
            time.sleep(0.05)

    def wait_until_decided(day: int) -> None:
        deadline = time.monotonic() + 120
        while not list(run_dir.glob(f"snapshots/vm.none.1/{DAYS[day - 1]}-*/promotion.json")):
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline, f"nothing was decided on the version of day {day}"
            time.sleep(0.05)

    try:
        wait_for(2)
        wait_until_decided(1)
        begin(tmp_path, 4)
        begin(tmp_path, 5)
        wait_until_decided(2)
        wait_for(4)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert f"stopped; go on with: rayfm run {path} --resume --follow" in output
    events = [json.loads(line) for line in (run_dir / "progress.jsonl").read_text().splitlines()]
    for trainer in ("fm", "students"):
        trained = [event for event in events if event["event"] == "trained" and event["trainer"] == trainer]
        assert [(event["period"], event["examples"]) for event in trained] == [(day, ROWS) for day in DAYS[:4]]
        assert all(event["delay_s"] >= 0 for event in trained)
    assert [event["period"] for event in events if event["event"] == "labelled"] == DAYS[1:4]
    behind = {event["trainer"]: (event["trained"], event["periods"]) for event in events if event["event"] == "lag"}
    assert behind == {"fm": (DAYS[3], 0), "students": (DAYS[3], 0)}
    published = [
        event["version"] for event in events if event["event"] == "published" and event["model"] == "vm.none.1"
    ]
    assert len(published) == 4
    decided = [event for event in events if event["event"] == "promotion" and event["model"] == "vm.none.1"]
    assert [(event["period"], event["scored_on"], event["decision"]) for event in decided[:2]] == [
        (DAYS[0], None, "promoted"),
        (DAYS[1], DAYS[2], "promoted"),
    ], "a version is decided on while the stream goes on, once the day after it is there"
    assert decided[1]["rows"] == ROWS
    lines = json_lines(output)
    (finished,) = [line for line in lines if line["message"].startswith(f"students has finished {DAYS[3]}: ")]
    about = {"run": "small", "role": "students", "trainer": "students", "period": DAYS[3], "examples": ROWS}
    assert about.items() <= finished.items()
    promoted = [line for line in lines if line["message"].startswith(f"vm.none.1@{published[1]} is promoted: ")]
    assert [line["run"] for line in promoted] == ["small"]
    workers = [line for path in ray_folder.rglob("logs/worker-*.err") for line in json_lines(path.read_text())]
    through = [line for line in workers if line["message"].startswith("rank 0 is through ")]
    assert {(line["trainer"], line["period"]) for line in through} == {
        (trainer, day) for trainer in ("fm", "students") for day in DAYS[:4]
    }
    assert all(line["run"] == "small" and line["examples"] == ROWS and "forward" in line["seconds"] for line in through)
    assert (run_dir / "report.html").exists()
    assert json.loads((run_dir / "summary.json").read_text())["periods"] == DAYS[1:4]
    pipeline = Pipeline(load_config(path), follow=True)
    assert pipeline.periods == tuple(DAYS[:4]), "the day that goes on is left for later"
    assert not pipeline.stream.ended()
