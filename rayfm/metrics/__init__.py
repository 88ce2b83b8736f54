"""NE, calibration, AUC, logloss, RMSE, transfer ratio, intervals: pure functions of sums, and the state behind them."""

from rayfm.metrics.bootstrap import bootstrap_weights
from rayfm.metrics.rate import RateCounter
from rayfm.metrics.state import IMPRESSION_REFERENCE, SCORED, MetricState, TaskKind
from rayfm.metrics.summary import LOWER_IS_BETTER, Comparison, Entry, lines, summarise

__all__ = [
    "IMPRESSION_REFERENCE",
    "LOWER_IS_BETTER",
    "SCORED",
    "Comparison",
    "Entry",
    "MetricState",
    "RateCounter",
    "TaskKind",
    "bootstrap_weights",
    "lines",
    "summarise",
]
