"""A trainer that follows a stream: its periods are not known when it starts, and it ends when it is asked to.

The loop asks its coordinator for the next period where the list that it was given ends, and every half second between
two steps whether it is to stop. Both are asked by rank 0 and answered to every rank, so that all of them stop after the
same step, checkpoint it, and go on from there when the run is resumed.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

from rayfm.training.spec import Coordinator, TrainerSpec

AnswerT = TypeVar("AnswerT")
Agree = Callable[[Callable[[], Any]], Any]
"""Rank 0 asks; every rank gets the answer."""

ASK_EVERY_S = 0.5
"""About how often a loop asks whether it is to stop."""

MOST_STEPS = 1000
"""At most so many steps lie between two questions."""


class StopRequested(Exception):
    """The run was asked to stop. Not an error: what is durable says where to go on."""


@runtime_checkable
class StreamCoordinator(Coordinator, Protocol):
    """What a loop asks of a pipeline that follows a stream. Every call is made by rank 0 alone; one that waits raises
    `StopRequested` when the run is asked to stop."""

    def next_period(self, after: str) -> str | None:
        """The period that follows ``after``, once it is complete; None where the stream has ended."""
        ...

    def stopping(self) -> bool:
        """Whether the run was asked to stop."""
        ...


class _Stop(enum.Enum):
    """Travels to the other ranks in an answer's place."""

    REQUESTED = 1


def ask_or_stop(ask: Callable[[], AnswerT]) -> AnswerT | _Stop:
    """What ``ask`` answers, or the mark that `unless_stopped` raises `StopRequested` for."""
    try:
        return ask()
    except StopRequested:
        return _Stop.REQUESTED


def unless_stopped(answer: AnswerT | _Stop) -> AnswerT:
    """An answer of `ask_or_stop`. Raises StopRequested, on every rank alike, where it is the mark."""
    if isinstance(answer, _Stop):
        raise StopRequested
    return answer


class Following:
    """What a loop that follows asks of its coordinator.

    Args:
        coordinator: the pipeline's.
        agree: how all ranks get rank 0's answer.
        clock: seconds; steps between two questions are reckoned by it.
    """

    def __init__(self, coordinator: Coordinator, agree: Agree, clock: Callable[[], float] = time.monotonic) -> None:
        if not isinstance(coordinator, StreamCoordinator):
            raise TypeError(
                f"{type(coordinator).__name__} knows no next period; a trainer that follows needs one that does"
            )
        self.coordinator, self._agree, self._clock = coordinator, agree, clock
        self._asked, self._left, self._gap = clock(), 1, 1

    def grown(self, spec: TrainerSpec) -> TrainerSpec | None:
        """``spec`` with the next period at its end, once that is complete; None where the stream has ended.

        Raises:
            StopRequested: the run was asked to stop meanwhile.
        """
        last = spec.periods[-1]
        found = self._agree(lambda: self.coordinator.next_period(last))
        return None if found is None else spec.model_copy(update={"periods": (*spec.periods, found)})

    def caught_up(self, spec: TrainerSpec, walked: int) -> TrainerSpec:
        """``spec`` with all the ``walked`` periods that a checkpoint has behind it, or under way.

        A worker that is started again has the list of when the run started; the stream has kept what came since.
        """
        while len(spec.periods) < walked:
            grown = self.grown(spec)
            if grown is None:
                break
            spec = grown
        return spec

    def stops(self) -> bool:
        """Between two steps: whether to stop here, the same on every rank.

        Asks once in about `ASK_EVERY_S`: rank 0 says with each answer after how many steps the next question comes,
        since ranks that looked at their own clocks would not meet in the question.
        """
        self._left -= 1
        if self._left > 0:
            return False
        stop, self._gap = self._agree(lambda: (self.coordinator.stopping(), self._next_gap()))
        self._left = self._gap
        return bool(stop)

    def _next_gap(self) -> int:
        """Steps until the next question: about as many as fit into `ASK_EVERY_S` at the pace since the last one."""
        now = self._clock()
        pace = max(now - self._asked, 1e-6) / self._gap
        self._asked = now
        return max(1, min(MOST_STEPS, 2 * self._gap, int(ASK_EVERY_S / pace)))
