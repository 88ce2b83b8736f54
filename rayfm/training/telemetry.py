"""What a worker's loop tells the metrics: its sums, about twice a second, never a row or a step at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from rayfm.operations.metrics import EXAMPLES, PART_SECONDS, STEPS

FLUSH_S = 0.5


class LoopMetrics:
    """Gathers a worker's rows, steps and seconds between two hand-overs.

    Args:
        run, trainer: labels.
        clock: seconds.
    """

    def __init__(self, run: str, trainer: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self._labels, self._clock = {"run": run, "trainer": trainer}, clock
        self._rows: dict[str, int] = {}
        self._steps: dict[str, int] = {}
        self._seconds: Callable[[], Mapping[str, float]] = dict
        self._told: dict[str, float] = {}
        self._next = clock() + FLUSH_S

    def begin(self, seconds: Callable[[], Mapping[str, float]]) -> None:
        """A period begins; ``seconds``: part -> seconds of this period so far."""
        self._seconds, self._told = seconds, {}

    def count(self, phase: str, rows: int) -> None:
        """A step of ``phase`` (``train`` or ``predict``) with so many rows."""
        self._rows[phase] = self._rows.get(phase, 0) + rows
        self._steps[phase] = self._steps.get(phase, 0) + 1
        if self._clock() >= self._next:
            self.flush()

    def flush(self) -> None:
        """Hand over what was gathered."""
        for phase, rows in self._rows.items():
            EXAMPLES.add(rows, phase=phase, **self._labels)
            STEPS.add(self._steps[phase], phase=phase, **self._labels)
        self._rows, self._steps = {}, {}
        for part, seconds in self._seconds().items():
            PART_SECONDS.add(max(0.0, seconds - self._told.get(part, 0.0)), part=part, **self._labels)
            self._told[part] = max(seconds, self._told.get(part, 0.0))
        self._next = self._clock() + FLUSH_S
