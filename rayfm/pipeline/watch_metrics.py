"""What the driver of a run records: of each period that a trainer finishes, of each that is prepared, and lag."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rayfm.config import DataError
from rayfm.metrics.summary import ALL_TRAFFIC
from rayfm.operations.metrics import (
    AUC,
    CALIBRATION,
    LAG_PERIODS,
    LAG_SECONDS,
    LOGLOSS,
    LOSS,
    NE,
    PERIOD_SECONDS,
    PERIODS,
    PREPARED_ROWS,
    REJECTED_ROWS,
    RMSE,
    TRAINED_THROUGH,
)
from rayfm.pipeline.follow import Lag, seconds_of
from rayfm.pipeline.state import RunState
from rayfm.schema import KINDS
from rayfm.training.period import PeriodRecord
from rayfm.training.spec import TrainerSpec

QUALITY = {"ne": NE, "logloss": LOGLOSS, "calibration": CALIBRATION, "auc": AUC, "rmse": RMSE}
"""Metrics of ``metrics.jsonl`` that are exported, of impressions over all traffics."""


def quality(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, str], tuple[float, float]]:
    """(model's key, task, metric) -> (value, rows scored), of a period's lines of ``metrics.jsonl``."""
    return {
        (f"{row['model']}.{row['variant']}.{row['seed']}", row["task"], row["metric"]): (row["value"], row["n"])
        for row in rows
        if row["kind"] == KINDS[0]
        and row["traffic"] == ALL_TRAFFIC
        and row["metric"] in QUALITY
        and row["value"] is not None
    }


def losses(record: PeriodRecord) -> dict[tuple[str, str], float]:
    """(model's key, term) -> mean over the period."""
    return {(key.partition("/")[0], key.partition("/")[2]): value for key, value in record.losses.items()}


class RunMetrics:
    """Records a run's periods. Counters count what happens from now on; gauges are set by what stands, too.

    Args:
        run: the run.
    """

    def __init__(self, run: RunState) -> None:
        self.run, self._name = run, run.config.name
        self._stood = {
            (spec.name, period)
            for spec in run.specs
            for period in spec.periods
            if (spec.folder / "periods" / f"{period}.json").exists()
        }
        self._prepared = set(run.store.periods())

    def period(self, spec: TrainerSpec, record: PeriodRecord, rows: Sequence[Mapping[str, Any]]) -> None:
        """A trainer has finished a period, now or before the run was gone on with."""
        labels = {"run": self._name, "trainer": spec.name}
        if (spec.name, record.period) not in self._stood:
            PERIODS.add(1, **labels)
        PERIOD_SECONDS.set(record.seconds, **labels)
        end = period_end(self.run, record.period)
        if end is not None:
            TRAINED_THROUGH.set(end, **labels)
        for (model, term), value in losses(record).items():
            LOSS.set(value, run=self._name, model=model, term=term)
        for (model, task, metric), (value, _) in quality(rows).items():
            QUALITY[metric].set(value, run=self._name, model=model, task=task)

    def look(self, lags: Mapping[str, Lag]) -> None:
        """Every few seconds."""
        for trainer, behind in lags.items():
            LAG_SECONDS.set(behind.seconds, run=self._name, trainer=trainer)
            LAG_PERIODS.set(behind.periods, run=self._name, trainer=trainer)
        for period in self.run.store.periods():
            if period in self._prepared or period not in self.run.periods:
                continue
            self._prepared.add(period)
            manifest = self.run.store.manifest(period)
            for kind in KINDS:
                PREPARED_ROWS.add(manifest.rows(kind), run=self._name, kind=kind)
            for reason, count in manifest.rejected.items():
                REJECTED_ROWS.add(count, run=self._name, reason=reason)

    def close(self) -> None:
        """Nothing to do."""


def period_end(run: RunState, period: str) -> float | None:
    """When a period ended, in seconds since 1970; None where the store has it no more."""
    try:
        return seconds_of(run.store.manifest(period).end)
    except DataError:
        return None
