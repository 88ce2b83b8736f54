"""NE, calibration, AUC, logloss, RMSE, transfer ratio, intervals: pure functions of sums, and the state behind them."""

from rayfm.metrics.bootstrap import bootstrap_weights
from rayfm.metrics.rate import RateCounter
from rayfm.metrics.state import MetricState, TaskKind
from rayfm.metrics.summary import Entry, lines, summarise

__all__ = ["Entry", "MetricState", "RateCounter", "TaskKind", "bootstrap_weights", "lines", "summarise"]
