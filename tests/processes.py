"""Processes for tests that start at once: forked from a server which has imported torch, TorchRec and rayfm already.

A process that is spawned imports them anew, in five seconds. One forked from the test's own process would inherit the
locks of Ray's threads.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from typing import Any

import pytest
import torch.multiprocessing

PRELOADED = [
    "rayfm.training.trainer",
    "rayfm.labels",
    "rayfm.augment.join",
    "rayfm.serving.nearline.consumer",
    "rayfm.snapshots.metadata.zookeeper",
    "preloaded",
]


@functools.cache
def context() -> ForkServerContext:
    """Where such processes come from."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        # The server finds modules by the environment: what multiprocessing hands it is ignored before Python 3.13.
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    return found


def start(work: Callable[..., None], args: tuple[Any, ...], nprocs: int) -> None:
    """Call ``work(rank, *args)`` in ``nprocs`` processes, side by side, until all are done.

    Raises:
        ProcessRaisedException, ProcessExitedException: one failed; the others are ended.
    """
    context()
    torch.multiprocessing.start_processes(work, args, nprocs=nprocs, start_method="forkserver")
