"""TensorBoard's event files, read back as TensorBoard reads them; MLflow's own file store."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayfm.operations.tracking import MLflow, MlflowConfig, TensorBoard


def points(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_scalars_stand_by_model_and_period_once_also_after_a_second_start(tmp_path: Path):
    for _ in range(2):  # a run that is gone on with tells of all its periods anew
        board = TensorBoard(tmp_path)
        for step, value in ((1, 0.5), (2, 0.25)):
            board.scalars("vm.none.1", step, f"2026-01-0{step + 1}", {"ne/click": value, "loss/click": 2 * value})
        board.scalars("fm.teacher.0", 1, "2026-01-02", {"ne/click": 0.75})
        board.close()
    assert points(tmp_path / "vm.none.1", "ne/click") == [(1, 0.5), (2, 0.25)]
    assert points(tmp_path / "vm.none.1", "loss/click") == [(1, 1.0), (2, 0.5)]
    assert points(tmp_path / "fm.teacher.0", "ne/click") == [(1, 0.75)]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowConfig:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return MlflowConfig(uri=f"file://{tmp_path}/mlruns", experiment="ads")


def test_mlflow_has_one_run_with_each_period_once(tmp_path: Path, server: MlflowConfig):
    import mlflow

    for _ in range(2):
        tracker = MLflow(server, "demo", tmp_path, {"warmup": "2"})
        tracker.scalars("vm.none.1", 1, "2026-01-02", {"ne/click": 0.5})
        tracker.scalars("vm.none.1", 2, "2026-01-03", {"ne/click": 0.25})
        tracker.close()
    client = mlflow.MlflowClient(tracking_uri=server.uri)
    experiment = client.get_experiment_by_name("ads")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params == {"warmup": "2"}
    assert run.info.run_name == "demo"
    history = client.get_metric_history(run.info.run_id, "vm.none.1/ne/click")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.5), (2, 0.25)]


def test_a_server_that_is_away_stops_nothing_and_gets_the_periods_later(
    tmp_path: Path, server: MlflowConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    tracker = MLflow(server, "demo", tmp_path, {})
    real, calls = tracker._client, []

    class Away:
        def get_experiment_by_name(self, name: str) -> None:
            calls.append(name)
            raise ConnectionError("refused")

    tracker._client = Away()
    tracker.scalars("vm.none.1", 1, "2026-01-02", {"ne/click": 0.5})
    assert calls == ["ads"]
    assert "takes nothing now" in caplog.text
    tracker._client = real
    tracker.scalars("vm.none.1", 2, "2026-01-03", {"ne/click": 0.25})
    history = real.get_metric_history(tracker._run, "vm.none.1/ne/click")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.5), (2, 0.25)]
