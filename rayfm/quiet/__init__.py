"""Silencing what libraries say at import and at every start.

A room of its own below all others, importing none: every process that Ray starts for a run runs it, and most do no more
of ours.
"""

from __future__ import annotations

import logging
import warnings

QUIET_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONWARNINGS": "ignore",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "GLOG_minloglevel": "2",
    # Ray warns when this many times more workers run than it has cores; fractional CPUs make that our normal state.
    "RAY_worker_maximum_startup_concurrency": "8",
}
"""Environment of the driver and of every worker."""

_LOGGERS = ("torchrec", "torch.fx._symbolic_trace", "ray.train", "ray.data", "ray.serve", "ray.tune")


def quiet_libraries() -> None:
    """Only errors of the libraries come through."""
    warnings.filterwarnings("ignore")
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_worker() -> None:
    """Ray calls this in each worker process before anything else."""
    quiet_libraries()
    logging.getLogger().setLevel(logging.ERROR)
