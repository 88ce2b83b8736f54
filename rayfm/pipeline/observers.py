"""Who is told of a run's periods besides its records: exported metrics, alerts, TensorBoard, MLflow."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from rayfm.operations.logs import fields
from rayfm.operations.tracking import MLflow, TensorBoard, Tracker
from rayfm.pipeline.alerts import RunAlerts
from rayfm.pipeline.follow import Lag
from rayfm.pipeline.state import RunState
from rayfm.pipeline.watch_metrics import RunMetrics, losses, quality
from rayfm.training.period import PeriodRecord
from rayfm.training.spec import TrainerSpec

log = logging.getLogger(__name__)


class Observer(Protocol):
    """Told by the driver. A run that is gone on with tells of the periods that stand first."""

    def period(self, spec: TrainerSpec, record: PeriodRecord, rows: Sequence[Mapping[str, Any]]) -> None:
        """A trainer has finished a period; ``rows``: its lines of ``metrics.jsonl``."""
        ...

    def look(self, lags: Mapping[str, Lag]) -> None:
        """Every few seconds; trainer -> its lag, of a run that follows."""
        ...

    def close(self) -> None:
        """The run ends."""
        ...


class Tracked:
    """Hands a run's scalars to trackers.

    Args:
        run: the run.
        trackers: TensorBoard, MLflow.
    """

    def __init__(self, run: RunState, trackers: Sequence[Tracker]) -> None:
        self.run, self.trackers = run, trackers

    def period(self, spec: TrainerSpec, record: PeriodRecord, rows: Sequence[Mapping[str, Any]]) -> None:
        step = self.run.periods.index(record.period)
        found: dict[str, dict[str, float]] = {}
        for (model, term), value in losses(record).items():
            found.setdefault(model, {})[f"loss/{term}"] = value
        for (model, task, metric), (value, _) in quality(rows).items():
            found.setdefault(model, {})[f"{metric}/{task}"] = value
        speed = {"seconds": record.seconds, **{f"part/{part}": value for part, value in record.parts.items()}}
        if record.examples and record.seconds > 0:
            speed["examples_per_s"] = record.examples / record.seconds
        # A trainer's speed is that of all models that it trains side by side.
        found.setdefault(f"trainer.{spec.name}", {}).update(speed)
        for model, values in found.items():
            for tracker in self.trackers:
                tracker.scalars(model, step, record.period, values)

    def look(self, lags: Mapping[str, Lag]) -> None:
        """Nothing to do."""

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()


class Observers:
    """All of a run's, as one. One that fails is left out from then on, and training goes on.

    Args:
        observers: who is told.
    """

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = list(observers)

    def period(self, spec: TrainerSpec, record: PeriodRecord, rows: Sequence[Mapping[str, Any]]) -> None:
        """As `Observer.period`."""
        about = {"role": spec.role, "trainer": spec.name, "period": record.period}
        log.info(
            "%s has finished %s: %d examples in %.1f s",
            spec.name,
            record.period,
            record.examples,
            record.seconds,
            extra=fields(**about, examples=record.examples, seconds=round(record.seconds, 3)),
        )
        self._each("period", spec, record, rows)

    def look(self, lags: Mapping[str, Lag]) -> None:
        """As `Observer.look`."""
        self._each("look", lags)

    def close(self) -> None:
        """As `Observer.close`."""
        self._each("close")

    def _each(self, what: str, *arguments: Any) -> None:
        for observer in list(self._observers):
            try:
                getattr(observer, what)(*arguments)
            except Exception:
                log.exception("%s is told nothing more", type(observer).__name__)
                self._observers.remove(observer)


@contextlib.contextmanager
def observers(run: RunState) -> Iterator[Observers]:
    """Those that a run's config asks for.

    Raises:
        ConfigError: MLflow is asked for and not installed.
    """
    tracking = run.config.tracking
    trackers: list[Tracker] = [TensorBoard(run.run_dir / "tensorboard")] if tracking.tensorboard else []
    if tracking.mlflow is not None:
        parameters = {"run": run.config.name, "folder": str(run.run_dir), "warmup": str(run.config.schedule.warmup)}
        trackers.append(MLflow(tracking.mlflow, run.config.name, run.run_dir, parameters))
    found = Observers([RunMetrics(run), RunAlerts(run), Tracked(run, trackers)])
    try:
        yield found
    finally:
        found.close()
