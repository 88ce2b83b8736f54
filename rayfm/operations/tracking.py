"""Trackers: a run's scalars by model and period, as TensorBoard's event files and, where configured, in MLflow.

Both are fed by the driver from what stands in the run's folder, once a period, and imported when the first period ends.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from rayfm.config import Config, ConfigError
from rayfm.config.durable import write_whole

log = logging.getLogger(__name__)


class MlflowConfig(Config):
    """A tracking server. Needs ``pip install 'rayfm[mlflow]'``."""

    uri: str
    """As ``mlflow.set_tracking_uri`` takes it: ``https://...``, ``file:///folder``, ``sqlite:///file``."""
    experiment: str = "rayfm"


class TrackingConfig(Config):
    """Where a run's scalars go besides its folder."""

    tensorboard: bool = True
    """Write event files to ``tensorboard/`` in the run's folder."""
    mlflow: MlflowConfig | None = None


class Tracker(Protocol):
    """Takes scalars."""

    def scalars(self, model: str, step: int, period: str, values: Mapping[str, float]) -> None:
        """Of one model (or trainer) after the run's ``step``-th period; the same again changes nothing."""
        ...

    def close(self) -> None:
        """Nothing follows."""
        ...


class TensorBoard:
    """Event files: ``<folder>/<model>/events.out.tfevents...``; the step is the period's place in the run.

    Written anew from the run's records each time that a run is started: one that was killed has no point twice.

    Args:
        folder: of the event files; what an earlier start left there is removed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writers: dict[str, Any] = {}
        for old in folder.glob("*/events.out.tfevents.*"):
            old.unlink()

    def scalars(self, model: str, step: int, period: str, values: Mapping[str, float]) -> None:
        writer = self._writers.get(model)
        if writer is None:
            from torch.utils.tensorboard import SummaryWriter

            writer = self._writers[model] = SummaryWriter(str(self.folder / model))
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.add_text("period", period, step)
        writer.flush()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


class MLflow:
    """One MLflow run for a run of ours, found again when it is gone on with; a metric is ``<model>/<name>``.

    What goes wrong with the server stops no training: it is logged, and the period is tried again with the next one.

    Args:
        config: the server.
        name: the run's.
        folder: the run's; it remembers the MLflow run and what was sent.
        parameters: what is logged as parameters, once.

    Raises:
        ConfigError: MLflow is not installed.
    """

    def __init__(self, config: MlflowConfig, name: str, folder: Path, parameters: Mapping[str, str]) -> None:
        try:
            import mlflow
        except ImportError:
            raise ConfigError("tracking.mlflow: MLflow is not installed; pip install 'rayfm[mlflow]'") from None
        self._config, self._name, self._path, self._parameters = config, name, folder / "mlflow.json", parameters
        self._client: Any = mlflow.MlflowClient(tracking_uri=config.uri)
        state = json.loads(self._path.read_text()) if self._path.exists() else {}
        same = state.get("uri") == config.uri and state.get("experiment") == config.experiment
        self._run: str | None = state.get("run") if same else None
        self._sent: set[str] = set(state.get("sent", [])) if same else set()
        self._waiting: dict[str, tuple[int, str, dict[str, float]]] = {}

    def scalars(self, model: str, step: int, period: str, values: Mapping[str, float]) -> None:
        key = f"{model}@{period}"
        if key in self._sent:
            return
        self._waiting[key] = step, model, dict(values)
        try:
            run = self._run or self._start()
            for waiting, (at, whose, found) in list(self._waiting.items()):
                for name, value in found.items():
                    self._client.log_metric(run, f"{whose}/{name}", value, step=at)
                self._sent.add(waiting)
                del self._waiting[waiting]
            self._write()
        except Exception as error:
            log.warning(
                "MLflow at %s takes nothing now, tried again after the next period: %s", self._config.uri, error
            )

    def _start(self) -> str:
        found = self._client.get_experiment_by_name(self._config.experiment)
        experiment = self._client.create_experiment(self._config.experiment) if found is None else found.experiment_id
        run = self._client.create_run(experiment, run_name=self._name)
        self._run = str(run.info.run_id)
        for key, value in self._parameters.items():
            self._client.log_param(self._run, key, value)
        self._write()
        return self._run

    def _write(self) -> None:
        state = {"uri": self._config.uri, "experiment": self._config.experiment, "run": self._run}
        text = json.dumps({**state, "sent": sorted(self._sent)}).encode()
        write_whole(self._path, lambda file: file.write(text))

    def close(self) -> None:
        if self._run is not None:
            with contextlib.suppress(Exception):
                self._client.set_terminated(self._run)
