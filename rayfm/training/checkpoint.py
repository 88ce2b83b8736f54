"""Checkpoints: models, optimisers and the data cursor together, so that they rewind together.

::

    <root>/<periods done>-<step>/   __0_0.distcp, ..., .metadata    torch.distributed.checkpoint
                                    state.json                      cursor, label pin, counters; written last
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp

from rayfm.config import Config, DataError, RayfmError
from rayfm.data.store import write_json_atomic
from rayfm.training.learner import Learner
from rayfm.training.saving import Writer
from rayfm.training.sharding import Carried, check_carried
from rayfm.training.spec import PinnedLabels

UNFINISHED_S = 3600.0
"""A folder without ``state.json`` that changed less than this ago may still be written."""


class Cursor(Config):
    """Where training stands: the next step to train. Periods by name: places in a list move with what is before."""

    finished: tuple[str, ...] = ()
    """Periods that are behind it, in order."""
    period: str | None = None
    """The period under way; None: the next one is not yet predicted."""
    step: int = 0
    """The next step of the period under way."""

    def __str__(self) -> str:
        if self.period is not None:
            return f"in {self.period} at step {self.step}"
        return f"after {self.finished[-1]}" if self.finished else "at the start"

    def index(self, periods: tuple[str, ...], origin: str) -> int:
        """Place in ``periods`` of the period to go on with, the one under way or the next; their number at the end.

        Args:
            periods: those that the run has now.
            origin: opens the error message.

        Raises:
            DataError: ``periods`` does not begin with those that were walked through. Going on would train a period
                twice or leave one out, and publish weights as trained through a period that they are not.
        """
        walked = (*self.finished, *([self.period] if self.period else []))
        for place, name in enumerate(walked):
            found = periods[place] if place < len(periods) else None
            if found != name:
                instead = f"has {found}" if found else "ends"
                raise DataError(
                    f"{origin}: training went through {walked[0]} .. {walked[-1]}, and where {name} was the source now "
                    f"{instead}; give the source the periods back that it had (no earlier or filled-in one, none "
                    "removed), or start a new run"
                )
        return len(self.finished)


class CheckpointState(Config):
    """What a checkpoint holds beside tensors."""

    cursor: Cursor
    steps_done: dict[str, int]
    """Learner -> optimiser steps so far; the warm-up needs it."""
    labels: dict[str, PinnedLabels] = {}
    """Teacher -> the labels that the period under way uses; the pin moves only with the cursor."""
    rates: dict[str, list[float]] = {}
    """Task -> [weighted label sum, weight] of all rows trained on, for ExFM's NE."""
    partial: dict[str, Any] = {}
    """Of the period under way: examples, sums of loss terms, the calibrators' fits. At a period's end its record."""
    world: int = 1
    tables: dict[str, dict[str, Carried]] = {}
    """Learner -> table of a collection -> what its optimiser's state depends on."""


class Checkpoints:
    """The checkpoints of one trainer. Making one is a collective call.

    Args:
        root: their folder, on storage that every rank sees.
        keep: how many complete ones to keep.
    """

    def __init__(self, root: Path, keep: int = 2) -> None:
        self.root, self.keep = root, keep
        self._writer = Writer()

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        found = complete(self.root)
        return found[-1] if found else None

    def save(self, learners: list[Learner], state: CheckpointState, wait: bool = True) -> Path:
        """Write a checkpoint (every rank calls this); rank 0 declares it complete and removes what is superseded.

        Args:
            wait: return when it stands; otherwise as soon as the learners may train on. It stands after `finish`.

        Raises:
            DivergenceError: a value is not finite; the checkpoints before it are kept.
        """
        cursor = state.cursor
        path = self.root / f"{len(cursor.finished):05d}-{cursor.step:08d}"
        state = state.model_copy(update={"tables": {item.config.key: item.carried for item in learners}})
        plain = state.dump()  # now: the sums go on

        def before() -> None:
            if path.exists():
                shutil.rmtree(path)

        def after() -> None:
            write_json_atomic(path / "state.json", plain)
            for superseded in removable(self.root, self.keep, unfinished_s=0.0):
                shutil.rmtree(superseded, ignore_errors=True)

        self._writer.save(_tensors(learners), path, before, after, wait)
        return path

    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._writer.busy()

    def finish(self) -> None:
        """Wait until the checkpoint being written stands. Raises what `save` would have."""
        self._writer.finish()

    def close(self, timeout: float = 60.0) -> None:
        """Let what is being written come to its end, if it can; for a loop that stops with an error of its own."""
        with contextlib.suppress(Exception):
            self._writer.finish(timeout)

    def load(self, learners: list[Learner]) -> CheckpointState | None:
        """Load the newest complete checkpoint into ``learners`` (every rank calls this); None where there is none.

        Raises:
            RayfmError: the checkpoint is for other models, unreadable, or its optimiser state goes with its own
                sharding alone.
        """
        path = self.latest()
        if path is None:
            return None
        try:
            state = CheckpointState.model_validate(json.loads((path / "state.json").read_text()))
        except (ValueError, OSError) as error:
            raise _unfit(path, error) from error
        for learner in learners:
            check_carried(state.tables.get(learner.config.key, {}), learner.carried, f"{path}: {learner.config.key}")
        try:
            for learner in learners:
                learner.optimizers.init_state()
            tensors = _tensors(learners)
            dcp.load(tensors, checkpoint_id=str(path))
            for learner in learners:
                learner.load_state(tensors[learner.config.key])
        except (dcp.CheckpointException, ValueError, OSError, RuntimeError, KeyError) as error:
            raise _unfit(path, error) from error
        return state


def complete(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first. A folder without ``state.json`` was cut short and does not count."""
    return sorted(path.parent for path in root.glob("*/state.json"))


def removable(root: Path, keep: int, unfinished_s: float = UNFINISHED_S) -> list[Path]:
    """Folders that nobody goes back to: all but the ``keep`` newest complete ones.

    Args:
        unfinished_s: seconds for which an incomplete folder must not have changed; a trainer that runs may write it.
    """
    if not root.exists():
        return []
    found = complete(root)
    kept, newest = set(found[-keep:]), time.time() - unfinished_s
    rest = [path for path in sorted(root.iterdir()) if path.is_dir() and path not in kept]
    return [path for path in rest if path in found or _changed(path) <= newest]


def _changed(path: Path) -> float:
    times = [path.stat().st_mtime]
    for file in path.iterdir():
        with contextlib.suppress(FileNotFoundError):
            times.append(file.stat().st_mtime)
    return max(times)


def _unfit(path: Path, error: BaseException) -> RayfmError:
    if isinstance(error, dcp.CheckpointException) and error.failures:
        error, _ = next(iter(error.failures.values()))  # of the first rank; the others' are the like
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    return RayfmError(
        f"{path}: the checkpoint does not fit this run ({first}); start a new run, or remove the checkpoint"
    )


def _tensors(learners: list[Learner]) -> dict[str, Any]:
    return {learner.config.key: learner.state() for learner in learners}
