"""A search on Ray Tune, from end to end."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from example_store import DAY_US, every_feature_rows
from small_pipeline import FIRST_DAY_US, PERIODS, small_pipeline, write_config, write_log

from rayfm.pipeline import parts
from rayfm.pipeline.config import PipelineConfig, load_config
from rayfm.pipeline.trial import TrialRecord, read_records
from rayfm.pipeline.tune import Study, tune

RATE = "groups.students.tables.lr"
POOR, GOOD = 1e-6, 0.2
"""Learning rates of an FM's tables: with one they do not move, with the other they learn what the log holds."""


def searching(folder: Path, trials: int) -> PipelineConfig:
    section = {"model": "vm", "parameters": {RATE: f"choice({POOR}, {GOOD})"}, "trials": trials, "concurrent": 1}
    return small_pipeline(folder, schedule={"warmup": 2}, tune=section)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_search_finds_the_better_value_without_the_test_period(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_log(tmp_path / "log", rows=2000)
    config = searching(tmp_path, trials=1)
    parts.prepare(config)
    test_period = tmp_path / "data" / "examples" / f"period={PERIODS[2]}"
    assert test_period.is_dir()
    shutil.rmtree(test_period)  # whoever reads it fails

    started = tune(config)
    (first,) = started.trials
    assert first.data["ended"] == "complete"
    files = {
        path: path.stat().st_mtime_ns for path in first.folder.rglob("*") if path.name != "lock" and path.is_file()
    }
    assert first.path in files

    ended: list[int] = []
    terminal = threading.RLock()  # cannot be pickled, as a real one cannot

    def watch(records: list[TrialRecord]) -> None:
        with terminal:
            ended.append(len(records))

    result = tune(searching(tmp_path, trials=2), resume=True, watch=watch)
    assert [record.values[RATE] for record in result.trials] == [GOOD, POOR]
    good, poor = (record.scores[PERIODS[1]] for record in result.trials)
    assert good < poor - 0.02
    assert result.periods == (PERIODS[1],)
    assert {record.folder for record in read_records(first.folder.parent)} >= {first.folder}
    assert {path: path.stat().st_mtime_ns for path in files} == files, "the finished trial was not trained again"
    assert ended == [2], "whoever watches is told of the new trial alone"
    assert not test_period.exists(), "the test period was neither read nor prepared"
    assert load_config(write_config(tmp_path), [f"@{result.best}"]).groups["students"].tables.lr == GOOD

    monkeypatch.setattr(Study, "search", lambda *_: pytest.fail("nothing is left to search"))
    again = tune(searching(tmp_path, trials=2), resume=True)
    assert [record.scores for record in again.trials] == [record.scores for record in result.trials]
    shown = capfd.readouterr()
    assert "Configuration for experiment" not in shown.out + shown.err, "Ray Tune is silent"


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_trials_that_fall_behind_are_stopped(tmp_path: Path) -> None:
    """Two scored periods; one after the other, the good one first: ASHA stops the poor ones after the first."""
    write_log(tmp_path / "log", rows=600)
    fourth = every_feature_rows(600, seed=4, start=FIRST_DAY_US + 3 * DAY_US)
    pq.write_table(fourth, tmp_path / "log" / "2024-01-04.parquet")
    section = {
        "model": "vm",
        "parameters": {RATE: "choice(0.2, 1e-6, 1e-7)"},
        "trials": 3,
        "concurrent": 1,
        "reduction": 2,
    }
    config = small_pipeline(tmp_path, schedule={"warmup": 3}, tune=section)
    result = tune(config)
    assert result.trials[0].values == {RATE: GOOD}
    assert [record.data["ended"] for record in result.trials] == ["complete", "stopped", "stopped"]
    assert [list(record.scores) for record in result.trials] == [
        list(PERIODS[1:]), [PERIODS[1]], [PERIODS[1]],
    ]  # fmt: skip
    for record in result.trials:
        trained = sorted(path.stem for path in record.folder.glob("trainers/students/periods/*"))
        assert trained == list(PERIODS[: len(record.scores)])
        assert not list(record.folder.glob("trainers/*/checkpoints")), "what ended keeps no checkpoint"
