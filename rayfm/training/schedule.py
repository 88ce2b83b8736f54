"""When a checkpoint inside a period is due, so that all ranks make it after the same step."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rayfm.training.config import TrainingConfig

MAX_STALL = 0.02
"""Share of the time for which the loop may stand still for checkpoints that are due by the clock."""


class Schedule:
    """Says after each step whether a checkpoint is due.

    By steps every rank knows it. By the clock rank 0 decides, and asking it costs a message: so each answer says how
    many steps later to ask again, at most half of those that the time left has room for. That makes some
    twenty questions in an interval of a thousand steps.

    Args:
        training: ``checkpoint_every`` or ``checkpoint_seconds``.
        agree: has rank 0 answer and tells every rank (a collective call).
        clock: seconds.
    """

    def __init__(
        self,
        training: TrainingConfig,
        agree: Callable[[Callable[[], tuple[bool, int]]], Any],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._every, self._seconds, self._agree, self._clock = (
            training.checkpoint_every,
            training.checkpoint_seconds,
            agree,
            clock,
        )
        self._wait = self._seconds or 0.0
        self.made(0.0)

    def made(self, stall: float) -> None:
        """A checkpoint was made, and the loop stood still for it for ``stall`` seconds."""
        self._started, self._done, self._ask_at = self._clock(), 0, 1
        self._wait = max(self._seconds or 0.0, stall / MAX_STALL)

    def due(self, step: int, busy: Callable[[], bool]) -> bool:
        """Whether a checkpoint is due after a step (0, 1, ... of its period). Every rank asks after every step.

        Args:
            step: the one just done.
            busy: whether rank 0 still writes the one before; by the clock, a checkpoint then waits until it is done.
        """
        if self._every is not None:
            return (step + 1) % self._every == 0
        if self._seconds is None:
            return False
        self._done += 1
        if self._done < self._ask_at:
            return False
        due, more = self._agree(lambda: self._answer(busy))
        self._ask_at = self._done + more
        return bool(due)

    def _answer(self, busy: Callable[[], bool]) -> tuple[bool, int]:
        """(whether it is due, steps until the next question), on rank 0."""
        elapsed = self._clock() - self._started
        left = self._wait - elapsed
        if left <= 0:
            return (False, max(1, self._done // 16)) if busy() else (True, 1)
        steps = int(left / 2 * self._done / elapsed) if elapsed > 0 else 1
        return False, min(max(1, steps), self._done)  # no more than so far: the first steps may tell little
