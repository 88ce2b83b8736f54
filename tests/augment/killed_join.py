"""A join in a process of its own that is killed, at a chosen call into the file system or at a chosen time."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import processes

import rayfm.augment.join as module
from rayfm.augment.config import load_augment


def _deadly(function: Any, calls: list[int], kill_at: int) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return call


def run_join(config: str, kill_at: int) -> None:
    """Join all files; with ``kill_at`` above 0 die before that call which changes the folder."""
    module.COMPACT_ROWS = 10
    calls = [0]
    # What a killed process has written stays in the system's memory; only a power cut asks for more.
    os.fsync = lambda handle: None
    if kill_at:
        for owner, name in ((os, "fsync"), (os, "replace"), (os, "mkdir"), (os, "unlink"), (shutil, "rmtree")):
            setattr(owner, name, _deadly(getattr(owner, name), calls, kill_at))
    with module.FeedbackJoin(load_augment(config)) as join:
        join.run()


def join_until_killed(config: Path, kill_at: int = 0, kill_after_s: float | None = None) -> int:
    """The process's exit code: 0 if it came to its end, -9 if it was killed."""
    process = processes.context().Process(target=run_join, args=(str(config), kill_at))
    process.start()
    process.join(kill_after_s)
    if kill_after_s is not None and process.is_alive():
        process.kill()
    process.join()
    assert process.exitcode is not None
    return process.exitcode
