"""NE, calibration, AUC, logloss, RMSE, transfer ratio, intervals: pure functions of sums, and the state behind them."""

from rayfm.metrics.bootstrap import bootstrap_weights
from rayfm.metrics.rate import RateCounter
from rayfm.metrics.state import MetricState, TaskKind
from rayfm.metrics.summary import LOWER_IS_BETTER, Comparison, Entry, lines, summarise

__all__ = [
    "LOWER_IS_BETTER",
    "Comparison",
    "Entry",
    "MetricState",
    "RateCounter",
    "TaskKind",
    "bootstrap_weights",
    "lines",
    "summarise",
]
