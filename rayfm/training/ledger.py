"""The ledger: which examples each step trained, so that anyone can check that each was trained once.

::

    <trainer>/ledger/<period>/rank-<r>.ids    int64, little-endian: step, count, the ids of its rows; step, count, ...

A step is entered after the optimisers have moved. When a run goes back to a checkpoint, the entries of the steps after
it are cut off, as the weights forget them: what stands in the ledger is what the weights have learned from.
"""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rayfm.config import DataError
from rayfm.data.sampling import ConsiderationShare
from rayfm.data.steps import LaneCache, ReadPlan
from rayfm.data.store import ExampleStore
from rayfm.schema import EXAMPLE_ID
from rayfm.training.checkpoint import Cursor

Int64 = npt.NDArray[np.int64]

_WORD = np.dtype("<i8")


class Ledger:
    """What one rank has trained.

    Args:
        root: the ledger's folder, the same for all ranks.
        rank: this one's.
    """

    def __init__(self, root: Path, rank: int) -> None:
        self.root, self.rank = root, rank
        self._period = ""
        self._file: io.FileIO | None = None

    def rewind(self, cursor: Cursor) -> None:
        """Cut off, for all ranks, what was trained after ``cursor``. Rank 0 calls it, before any rank trains."""
        if not self.root.exists():
            return
        for folder in self.root.iterdir():
            if folder.name == cursor.period:
                for path in folder.glob("rank-*.ids"):
                    _truncate(path, cursor.step)
            elif folder.is_dir() and folder.name not in cursor.finished:
                shutil.rmtree(folder)

    def enter(self, period: str, step: int, ids: Int64) -> None:
        """Enter the rows ``[B]`` of a step, which has just been trained."""
        if self._file is None or period != self._period:
            self.close()
            path = _path(self.root, period, self.rank)
            path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: what was entered outlives a process that is killed.
            self._period, self._file = period, path.open("ab", buffering=0)
        self._file.write(np.concatenate([[step, len(ids)], ids]).astype(_WORD).tobytes())

    def sync(self) -> None:
        """Have what was entered outlive a power cut too."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


@dataclasses.dataclass(frozen=True)
class LedgerEntries:
    """What was trained of a period, N rows, in order of rank and step."""

    example_id: Int64
    """``[N]``"""
    step: Int64
    """``[N]``: of the period."""
    rank: Int64
    """``[N]``: that trained it; ranks of different worlds share numbers."""


@dataclasses.dataclass(frozen=True)
class LedgerCheck:
    """What is wrong with a period's entries: nothing, where all three are empty."""

    doubled: Int64
    """Ids that were trained more than once."""
    missing: Int64
    """Ids that should have been trained and were not."""
    foreign: Int64
    """Ids that should not have been trained."""

    @property
    def exact(self) -> bool:
        """Whether every example was trained once, and nothing else."""
        return not (len(self.doubled) or len(self.missing) or len(self.foreign))


def read_ledger(root: Path, period: str) -> LedgerEntries:
    """The entries of a period.

    Raises:
        DataError: there are none.
    """
    paths = sorted((root / period).glob("rank-*.ids"))
    if not paths:
        raise DataError(f"{root / period}: no ledger; it is kept where the trainer's config says 'ledger: true'")
    ids: list[Int64] = []
    steps: list[Int64] = []
    ranks: list[Int64] = []
    for path in paths:
        rank = int(path.stem.removeprefix("rank-"))
        for step, entered, _ in _entries(path):
            ids.append(entered)
            steps.append(np.full(len(entered), step, np.int64))
            ranks.append(np.full(len(entered), rank, np.int64))
    none = [np.zeros(0, np.int64)]
    return LedgerEntries(*(np.concatenate(parts or none) for parts in (ids, steps, ranks)))


def expected_ids(store: ExampleStore, period: str, batch_size: int, consideration_share: ConsiderationShare) -> Int64:
    """The examples that a period's training reads: its impressions, and the considerations that the policy chooses."""
    plan = ReadPlan(store, (EXAMPLE_ID,), batch_size, consideration_share=consideration_share)
    cache = LaneCache(plan)
    found = [np.zeros(0, np.int64)]
    for lane in range(cache.manifest(period).lanes):
        steps = cache.steps(period, lane)
        if steps.impressions:
            found.append(cache.read(period, "impression", lane, 0, steps.impressions)[EXAMPLE_ID].to_numpy())
        rows = steps.considerations
        if len(rows):
            ids = cache.read(period, "consideration", lane, 0, int(rows[-1]) + 1)[EXAMPLE_ID].to_numpy()
            found.append(ids[rows])
    return np.concatenate(found)


def check_ledger(entries: LedgerEntries, expected: Int64) -> LedgerCheck:
    """Compare a period's entries with the ids ``[E]`` that should have been trained (each of them once)."""
    trained, times = np.unique(entries.example_id, return_counts=True)
    return LedgerCheck(
        doubled=trained[times > 1],
        missing=np.setdiff1d(expected, trained),
        foreign=np.setdiff1d(trained, expected),
    )


def _path(root: Path, period: str, rank: int) -> Path:
    return root / period / f"rank-{rank:05d}.ids"


def _entries(path: Path) -> Iterator[tuple[int, Int64, int]]:
    """(step, ids, bytes up to the entry's end); an entry that a kill cut short is left out."""
    words = np.fromfile(path, _WORD)  # whole words alone
    place = 0
    while place + 2 <= len(words):
        step, count = int(words[place]), int(words[place + 1])
        end = place + 2 + count
        if end > len(words):
            return
        yield step, words[place + 2 : end].astype(np.int64), end * _WORD.itemsize
        place = end


def _truncate(path: Path, step: int) -> None:
    """Keep the entries of the steps before ``step``; steps rise within a file."""
    kept = 0
    for entered, _, end in _entries(path):
        if entered >= step:
            break
        kept = end
    os.truncate(path, kept)
