"""The metrics that rayfm exports, in one table, through Ray's metrics agents to Prometheus.

Ray puts ``ray_`` before every name, so Prometheus sees ``ray_rayfm_examples_total`` (`Metric.exported`), with labels of
its own beside ours (``WorkerId``, ``Component``, ``SessionName``, ...). A gauge leaves the export some 20 seconds after
its process; a counter begins at 0 in each process, so take ``rate`` or ``increase`` of it, and sum over processes.

Outside Ray recording does nothing. Nothing is recorded per row or per step: trainers hand on their sums about twice a
second, all else is recorded once a period, a version or a look.

A period is no label: it would make a series of every hour that ever was. A gauge holds the newest period's value
(``rayfm_trained_through_timestamp_seconds`` says which that is); ``metrics.jsonl`` and TensorBoard hold all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Literal

log = logging.getLogger(__name__)

Kind = Literal["counter", "gauge", "histogram"]


@dataclasses.dataclass(frozen=True)
class Metric:
    """One row of the table.

    Raises:
        ValueError: recorded with other labels than it has, or as another kind than it is.
    """

    name: str
    kind: Kind
    unit: str
    labels: tuple[str, ...]
    help: str
    source: str
    """The file that records it, and when."""

    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram."""

    @property
    def exported(self) -> str:
        """Its name in Prometheus; a histogram's series are this with ``_bucket``, ``_sum`` and ``_count``."""
        return f"ray_{self.name}"

    def add(self, value: float = 1.0, /, **labels: str) -> None:
        """Add to a counter; nothing where ``value`` is 0."""
        if value:
            self._record("counter", value, labels)

    def set(self, value: float, /, **labels: str) -> None:
        """Set a gauge; one that is no number (a metric that is undefined) leaves what was."""
        if math.isfinite(value):
            self._record("gauge", value, labels)

    def observe(self, value: float, /, **labels: str) -> None:
        """Count a value in a histogram."""
        self._record("histogram", value, labels)

    def _record(self, kind: Kind, value: float, labels: Mapping[str, str]) -> None:
        if _captured is None and not _in_ray():
            return
        if kind != self.kind or set(labels) != set(self.labels):
            raise ValueError(f"{self.name} is a {self.kind} with labels {self.labels}, not a {kind} with {(*labels,)}")
        if _captured is not None:
            _captured.take(self, value, labels)
        else:
            _export(self, value, labels)


_TRAINER = ("run", "trainer")
_MODEL = ("run", "model")
_SCORED = ("run", "model", "task")
_LOOP = "rayfm/training/telemetry.py: each worker, about twice a second"
_PERIOD = "rayfm/pipeline/watch_metrics.py: the driver, when a trainer has finished a period"

EXAMPLES = Metric(
    "rayfm_examples_total",
    "counter",
    "rows",
    (*_TRAINER, "phase"),
    "Rows that went through the loop; phase is train or predict. Its rate is examples/s.",
    _LOOP,
)
STEPS = Metric("rayfm_steps_total", "counter", "steps", (*_TRAINER, "phase"), "Steps of each worker.", _LOOP)
PART_SECONDS = Metric(
    "rayfm_part_seconds_total",
    "counter",
    "seconds",
    (*_TRAINER, "part"),
    "Where a worker's time went: read, wait, predict, metrics, forward, backward, optimizer, ids, checkpoint, publish. "
    "Its rate is the share of a part; over the rate of steps it is the part of a step.",
    _LOOP,
)
PERIODS = Metric("rayfm_periods_total", "counter", "periods", _TRAINER, "Periods that a trainer has finished.", _PERIOD)
PERIOD_SECONDS = Metric(
    "rayfm_period_seconds", "gauge", "seconds", _TRAINER, "How long the newest period took, waiting included.", _PERIOD
)
TRAINED_THROUGH = Metric(
    "rayfm_trained_through_timestamp_seconds",
    "gauge",
    "seconds since 1970",
    _TRAINER,
    "End of the newest period that a trainer has finished, in the data's time.",
    _PERIOD,
)
LAG_SECONDS = Metric(
    "rayfm_lag_seconds",
    "gauge",
    "seconds",
    _TRAINER,
    "Of a run that follows: from the end of a trainer's newest period to the end of the newest complete one.",
    "rayfm/pipeline/watch_metrics.py: the driver, every few seconds",
)
LAG_PERIODS = Metric(
    "rayfm_lag_periods",
    "gauge",
    "periods",
    _TRAINER,
    "Of a run that follows: complete periods that a trainer has not finished.",
    LAG_SECONDS.source,
)
LOSS = Metric(
    "rayfm_loss", "gauge", "", (*_MODEL, "term"), "Mean of a term of the loss over the newest trained period.", _PERIOD
)
NE = Metric(
    "rayfm_ne",
    "gauge",
    "",
    _SCORED,
    "Normalised entropy of the newest period's impressions, predicted before they were trained on; lower is better.",
    _PERIOD,
)
LOGLOSS = Metric("rayfm_logloss", "gauge", "nats", _SCORED, "Logloss of the same.", _PERIOD)
CALIBRATION = Metric(
    "rayfm_calibration", "gauge", "", _SCORED, "Mean prediction over mean label of the same; 1 is calibrated.", _PERIOD
)
AUC = Metric("rayfm_auc", "gauge", "", _SCORED, "Area under the ROC curve of the same.", _PERIOD)
RMSE = Metric("rayfm_rmse", "gauge", "the task's", _SCORED, "Of a regression task: root mean squared error.", _PERIOD)

PREPARED_ROWS = Metric(
    "rayfm_prepared_rows_total",
    "counter",
    "rows",
    ("run", "kind"),
    "Rows of periods that became ready while the run was under way; kind is impression or consideration.",
    "rayfm/pipeline/watch_metrics.py: the driver, when a period's manifest stands",
)
REJECTED_ROWS = Metric(
    "rayfm_rejected_rows_total",
    "counter",
    "rows",
    ("run", "reason"),
    "Rows of those periods that went to rejects/.",
    PREPARED_ROWS.source,
)
_LABELS = ("run", "teacher")
_LABELLED = "rayfm/pipeline/label_jobs.py: the driver, when a period is labelled"
COVERAGE = Metric(
    "rayfm_label_coverage",
    "gauge",
    "share",
    (*_LABELS, "kind"),
    "Share of the newest labelled period's examples that have a label.",
    _LABELLED,
)
LABELLED_ROWS = Metric("rayfm_labelled_rows_total", "counter", "rows", _LABELS, "Rows labelled.", _LABELLED)
LABEL_SECONDS = Metric(
    "rayfm_label_seconds", "gauge", "seconds", _LABELS, "How long the newest label job took.", _LABELLED
)
TEACHER_FRESHNESS = Metric(
    "rayfm_teacher_freshness_seconds",
    "gauge",
    "seconds",
    _LABELS,
    "ExFM's freshness gap, in the data's time: from the end of the last period that the labelling snapshot was trained "
    "on to the end of the period that it labelled. The smallest is one period.",
    _LABELLED,
)

_DECIDED = "rayfm/pipeline/promotion.py: the driver, when it has decided on a version"
PROMOTED = Metric(
    "rayfm_promotions_total",
    "counter",
    "versions",
    _MODEL,
    "Published versions that the guard let become current.",
    _DECIDED,
)
REFUSED = Metric(
    "rayfm_promotions_refused_total",
    "counter",
    "versions",
    _MODEL,
    "Published versions that the guard kept from becoming current.",
    _DECIDED,
)
REFUSED_NOW = Metric(
    "rayfm_promotion_refused",
    "gauge",
    "",
    _MODEL,
    "1 while the newest published version is one that the guard refused, else 0.",
    _DECIDED,
)

_SWAP = "rayfm/snapshots/loader.py: each replica, when another version answers"
SWAPS = Metric("rayfm_swaps_total", "counter", "swaps", _MODEL, "Versions that took over in a replica.", _SWAP)
SWAP_SECONDS = Metric(
    "rayfm_swap_seconds",
    "histogram",
    "seconds",
    _MODEL,
    "Loading, verifying and warming a version beside the one that answers.",
    _SWAP,
    (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000),
)
LOAD_FAILURES = Metric(
    "rayfm_load_failures_total",
    "counter",
    "failures",
    _MODEL,
    "Tries of a replica to load the current version that failed.",
    "rayfm/snapshots/loader.py: each replica, at each failure",
)
SERVED_PUBLISHED = Metric(
    "rayfm_served_published_timestamp_seconds",
    "gauge",
    "seconds since 1970",
    _MODEL,
    "When the version that a replica answers with was published: `time() -` it is the age of what is served.",
    _SWAP,
)
SERVED_PERIOD = Metric(
    "rayfm_served_period_timestamp_seconds",
    "gauge",
    "seconds since 1970",
    _MODEL,
    "Start of the last period that the version was trained on; absent where the period's name is no ISO time.",
    _SWAP,
)

_SWEEP = "rayfm/serving/nearline/consumer.py: each consumer, at each sweep"
NEARLINE_QUEUED = Metric(
    "rayfm_nearline_queued", "gauge", "tickets", _LABELS, "Tickets that wait for near-line labels.", _SWEEP
)
NEARLINE_OLDEST = Metric(
    "rayfm_nearline_oldest_seconds", "gauge", "seconds", _LABELS, "How long the oldest of them has waited.", _SWEEP
)
NEARLINE_DEAD = Metric(
    "rayfm_nearline_dead_letters", "gauge", "tickets", _LABELS, "Dead letters, until replayed or discarded.", _SWEEP
)
NEARLINE_REJECTED = Metric(
    "rayfm_nearline_rejected_rows", "gauge", "rows", _LABELS, "Rows of posts that lie in the spool's rejects/.", _SWEEP
)

ALERT = Metric(
    "rayfm_alert",
    "gauge",
    "",
    ("run", "alert", "subject"),
    "1 while an alert of the config's `alerts` fires, else 0; alert is calibration, coverage, stale_teacher, lag or "
    "promotion_refused, subject the model and task, teacher or trainer that it is of.",
    "rayfm/pipeline/alerts.py: the driver, when a trainer has finished a period",
)

METRICS: tuple[Metric, ...] = tuple(value for value in list(vars().values()) if isinstance(value, Metric))
"""All of them, in the order of this file."""


class Captured:
    """What was recorded inside `capture`: a counter's sum, a gauge's last value, a histogram's list of values."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, frozenset[tuple[str, str]]], Any] = {}

    def take(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        """Record."""
        key = metric.name, frozenset(labels.items())
        if metric.kind == "histogram":
            self.values.setdefault(key, []).append(value)
        else:
            self.values[key] = value + (self.values.get(key, 0.0) if metric.kind == "counter" else 0.0)

    def get(self, metric: Metric, **labels: str) -> Any:
        """What was recorded with these labels, None where nothing was."""
        return self.values.get((metric.name, frozenset(labels.items())))


_captured: Captured | None = None


@contextlib.contextmanager
def capture() -> Iterator[Captured]:
    """Within the block, in this process, what is recorded goes to the object given, with or without Ray: for tests."""
    global _captured
    before, _captured = _captured, Captured()
    try:
        yield _captured
    finally:
        _captured = before


_instruments: dict[str, Any] = {}


def _in_ray() -> bool:
    """Whether this process belongs to a Ray that runs. Imports nothing: what has not imported Ray is outside it."""
    asked = getattr(sys.modules.get("ray"), "is_initialized", None)
    return asked is not None and bool(asked())


def _export(metric: Metric, value: float, labels: Mapping[str, str]) -> None:
    """Hand a value to Ray. What goes wrong there stops no training: it is logged once."""
    try:
        instrument = _instruments.get(metric.name)
        if instrument is None:
            instrument = _instruments[metric.name] = _instrument(metric)
        record = {"counter": "inc", "gauge": "set", "histogram": "observe"}[metric.kind]
        getattr(instrument, record)(float(value), tags=dict(labels))
    except Exception:
        if metric.name not in _failed:
            _failed.add(metric.name)
            log.warning("metric %s cannot be recorded", metric.name, exc_info=True)


_failed: set[str] = set()


def _instrument(metric: Metric) -> Any:
    from ray.util import metrics

    if metric.kind == "histogram":
        return metrics.Histogram(metric.name, metric.help, boundaries=list(metric.buckets), tag_keys=metric.labels)
    kind = metrics.Counter if metric.kind == "counter" else metrics.Gauge
    return kind(metric.name, metric.help, tag_keys=metric.labels)
