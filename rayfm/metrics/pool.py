"""The sums of one model's test rows over periods, and the metrics on them: as they are and per replicate.

Shape letters: S sums, F traffics, H histogram bins, R bootstrap replicates.
"""

from __future__ import annotations

import math
import warnings

import numpy as np

from rayfm.metrics.functions import (
    Array,
    Numeric,
    auc_from_histograms,
    calibration,
    entropy_of_rate,
    logloss,
    ne,
    ratio,
    rmse,
)
from rayfm.metrics.state import SUMS, Cell, TaskKind, bin_centres

BINARY_METRICS = ("ne", "ne_train", "auc", "logloss", "calibration", "rmse")
REGRESSION_METRICS = ("calibration", "rmse")


def metric_values(kind: TaskKind, sums: Array, histogram: Array, baseline: Numeric) -> dict[str, Array]:
    """Every metric of a task.

    Args:
        kind: of the task.
        sums: ``[..., S]``.
        histogram: ``[..., 2, H]``: negatives, positives; not looked at for a regression.
        baseline: ``[...]``, the logloss sum of always predicting the base rate of the training data.

    Returns:
        Metric -> ``[...]``, NaN where undefined.
    """
    column = {name: sums[..., i] for i, name in enumerate(SUMS)}
    values = {
        "calibration": calibration(column["prediction"], column["label"]),
        "rmse": rmse(column["squared_error"], column["weight"]),
    }
    if kind == "regression":
        return values
    auc = auc_from_histograms(histogram[..., 1, :], histogram[..., 0, :])
    return {
        "ne": ne(column["logloss"], column["label"], column["weight"]),
        "ne_train": ratio(column["logloss"], baseline),
        # A model that predicts NaN has no AUC, though its rows fell into some bin.
        "auc": np.where(np.isfinite(column["logloss"]), auc, np.nan),
        "logloss": logloss(column["logloss"], column["weight"]),
        **values,
    }


class Pool:
    """Sums over the periods that one (model, variant, seed) was scored on, of one kind and task."""

    def __init__(self, kind: TaskKind) -> None:
        self.kind = kind
        self.periods: dict[str, float] = {}
        """Period -> rows."""
        self._totals: list[Array] = []
        self._daily: list[tuple[Array, Array]] = []

    def add(self, period: str, cell: Cell, train_rate: float) -> None:
        """Add a period's sums; ``train_rate`` (NaN where unknown) is the base rate of what was trained on before it.

        Raises:
            ValueError: the period was added before.
        """
        if period in self.periods:
            raise ValueError(f"period {period} was given twice")
        sums, histogram = cell.sums.numpy(), cell.histogram.numpy()
        replicate_sums = cell.replicate_sums.numpy()
        replicate_histogram = cell.replicate_histogram.numpy().transpose(2, 0, 1)
        entropy = float(entropy_of_rate(train_rate))
        weight = SUMS.index("weight")
        parts = [
            sums,
            histogram,
            replicate_sums,
            replicate_histogram,
            sums[:, weight] * entropy,
            replicate_sums[:, weight] * entropy,
        ]
        if self._totals:
            for total, part in zip(self._totals, parts, strict=True):
                total += part
        else:
            self._totals = [np.array(part, dtype=np.float64) for part in parts]
        self.periods[period] = float(sums[:, SUMS.index("n")].sum())
        if self.kind == "binary":
            point = metric_values(self.kind, sums.sum(0), histogram.sum(0), math.nan)["auc"]
            replicates = metric_values(self.kind, replicate_sums, replicate_histogram, math.nan)["auc"]
            self._daily.append((point, replicates))

    @property
    def rows(self) -> int:
        return round(sum(self.periods.values()))

    def points(self) -> dict[str, float]:
        """Metric -> value over all rows, and ``auc_daily``, the mean of the periods' AUC."""
        sums, histogram, _, _, baseline, _ = self._totals
        values = metric_values(self.kind, sums.sum(0), histogram.sum(0), baseline.sum())
        if self._daily:
            values["auc_daily"] = _mean_of_known([point for point, _ in self._daily])
        return {name: float(value) for name, value in values.items()}

    def replicates(self) -> dict[str, Array]:
        """Metric -> its value on each bootstrap replicate, ``[R]``."""
        _, _, sums, histogram, _, baseline = self._totals
        values = metric_values(self.kind, sums, histogram, baseline)
        if self._daily:
            values["auc_daily"] = _mean_of_known([replicates for _, replicates in self._daily])
        return values

    def by_traffic(self) -> tuple[Array, dict[str, Array]]:
        """Rows of each traffic ``[F]``, and metric -> value per traffic ``[F]``."""
        sums, histogram, _, _, baseline, _ = self._totals
        return sums[:, SUMS.index("n")], metric_values(self.kind, sums, histogram, baseline)

    def histogram(self) -> Array:
        """``[2, H]`` over all rows: weight of negatives and of positives per bin of the logit."""
        total: Array = self._totals[1].sum(0)
        return total


def _mean_of_known(values: list[Array]) -> Array:
    """Mean over periods, leaving out those where the metric is undefined (one class alone)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.asarray(np.nanmean(np.stack(values), axis=0))


def calibration_curve(histogram: Array, points: int = 20) -> dict[str, list[float]]:
    """Mean label against mean prediction in ``points`` groups of about equal weight, by rising prediction.

    Args:
        histogram: ``[2, H]``: weight of negatives and of positives per bin of the logit. The prediction inside a bin
            is taken to be that of the bin's middle (at 4,096 bins, within 0.3 % of itself).
        points: groups at most; bins are never split, so few distinct predictions make fewer.

    Returns:
        ``prediction``, ``label`` and ``weight`` of each group.
    """
    weight = histogram.sum(0)
    total = weight.sum()
    if total == 0:
        return {"prediction": [], "label": [], "weight": []}
    prediction = weight / (1 + np.exp(-bin_centres(len(weight))))
    middle = (np.cumsum(weight) - weight / 2) / total
    group = np.minimum((middle * points).astype(np.int64), points - 1)
    sums = [np.bincount(group, values, minlength=points) for values in (prediction, histogram[1], weight)]
    known = sums[2] > 0
    return {
        "prediction": (sums[0][known] / sums[2][known]).tolist(),
        "label": (sums[1][known] / sums[2][known]).tolist(),
        "weight": sums[2][known].tolist(),
    }
