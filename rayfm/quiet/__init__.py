"""What each process does at its start: libraries are silenced, and the garbage collector leaves their imports alone.

A room of its own below all others, importing none: every process that Ray starts for a run runs it, and most do no more
of ours.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import logging
import warnings

QUIET_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONWARNINGS": "ignore",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "GLOG_minloglevel": "2",
    # Ray warns when this many times more workers run than it has cores; fractional CPUs make that our normal state.
    "RAY_worker_maximum_startup_concurrency": "8",
}
"""Environment of the driver and of every worker."""

WORKER_ENVIRONMENT = {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}
"""Environment of every worker besides."""

WORKER_SETUP = "rayfm.quiet.quiet_worker"
"""What each worker process calls before anything else."""

_FILES = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom, io.BufferedRWPair)
_LOGGERS = ("torchrec", "torch.fx._symbolic_trace", "ray.train", "ray.data", "ray.serve", "ray.tune")


def quiet_libraries() -> None:
    """Only errors of the libraries come through."""
    warnings.filterwarnings("ignore")
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def collect_less() -> None:
    """Keep the garbage collector from walking through what imports have made, again and again.

    torch, TorchRec and Ray leave 400,000 objects that stay until the process ends. By default the collector looks at
    the newest at every 700 of them, at all of them now and then, and several times more while the process ends: three
    tenths of what a process costs that imports the training loop and does nothing.
    """
    gc.set_threshold(10_000, 10, 10)
    atexit.unregister(_leave)
    atexit.register(_leave)


def _leave() -> None:
    """Write out what open files hold back, as they are closed by nobody from here on; then freeze all there is."""
    for held in gc.get_objects():
        if type(held) in _FILES:
            with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed, or not for writing
                held.flush()
    gc.freeze()


def quiet_worker() -> None:
    """Ray calls this in each worker process before anything else."""
    collect_less()
    quiet_libraries()
    logging.getLogger().setLevel(logging.ERROR)
