"""What a trainer says of a period: where its time went, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rayfm.config import Config
from rayfm.data.batch import Batch
from rayfm.data.vocabulary import IdsRecord
from rayfm.export.calibration import Fits


class PeriodParts:
    """Seconds of a period by part, for the picture of where time goes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(part, time.perf_counter() - started)

    def add(self, part: str, seconds: float) -> None:
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    def iterate(self, batches: Iterator[Batch], part: str = "read") -> Iterator[Batch]:
        """``batches``, with the time that each took to arrive."""
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.add(part, time.perf_counter() - started)
            if batch is None:
                return
            yield batch


class PeriodRecord(Config):
    """What a trainer says of a period it finished."""

    trainer: str
    period: str
    examples: int
    """Rows that were trained on, over all ranks."""
    cpu_seconds: float = 0.0
    """CPU time of rank 0's process in training, all its threads, prediction left out. After a restart in the middle of
    the period: since then."""
    seconds: float
    parts: dict[str, float]
    losses: dict[str, float]
    ids: dict[str, IdsRecord] = {}
    """Table with a vocabulary -> what became of its ids, where the period was trained on."""
    calibration: dict[str, Fits] = {}
    """Learner -> task -> slope and shift as of this period: fitted on its predictions, or before where it has no fit.
    Its snapshot holds them, where the period was trained on, with ``logit_shift`` added to the shift."""
    versions: dict[str, str]
