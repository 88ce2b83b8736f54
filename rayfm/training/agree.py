"""Rank 0 asks, every rank gets the answer: however long it takes.

A collective that a rank waits in fails after the process group's timeout (half an hour by default), and the next
period, or its labels, may be a day away. So while rank 0 waits for an answer the ranks meet now and then to hear that
there is none yet.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

AnswerT = TypeVar("AnswerT")

MEET_EVERY_S = 60.0
"""Well below any timeout of a process group."""


def agree(ask: Callable[[], AnswerT]) -> AnswerT:
    """What ``ask`` answers on rank 0, on every rank. A collective call; ``ask`` is called by rank 0 alone, and in a
    thread of its own where there are other ranks.

    Raises:
        BaseException: what ``ask`` raised, on rank 0; the other ranks wait in a collective until they are ended.
    """
    if dist.get_world_size() == 1:
        return ask()
    pending = _Pending(ask) if dist.get_rank() == 0 else None
    while True:
        told: list[Any] = [None if pending is None else pending.look(MEET_EVERY_S)]
        dist.broadcast_object_list(told, src=0)
        if told[0]:
            answer: AnswerT = told[0][0]
            return answer


class _Pending:
    """A question that is being answered."""

    def __init__(self, ask: Callable[[], Any]) -> None:
        self._ask = ask
        self._answer: tuple[Any, ...] = ()
        self._error: BaseException | None = None
        # A daemon: where another rank dies, this one must be able to end while it still waits for the answer.
        self._thread = threading.Thread(target=self._run, daemon=True, name="rayfm-ask")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._answer = (self._ask(),)
        except BaseException as error:
            self._error = error

    def look(self, seconds: float) -> tuple[Any, ...]:
        """``(answer,)`` as soon as it is there; empty where it is not after so many seconds."""
        self._thread.join(seconds)
        if self._error is not None:
            raise self._error
        return self._answer
