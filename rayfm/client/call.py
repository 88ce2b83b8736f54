"""What the clients share: one deadline for all tries of a call, the pauses between them, and `with`."""

from __future__ import annotations

import abc
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TypeVar

from rayfm.client.errors import DeadlineExceeded, ScoreError
from rayfm.client.retry import Retries

Reply = TypeVar("Reply")

LATE = "no reply within the deadline"


class Caller(abc.ABC):
    """Calls a service. One may be shared by threads; ``with`` closes it.

    Args:
        timeout_s: seconds in which a call ends, its retries included.
        retries: when to try again.
    """

    def __init__(self, timeout_s: float, retries: Retries | None) -> None:
        self.timeout_s, self.retries = timeout_s, retries or Retries()
        self._clock: Callable[[], float] = time.monotonic
        self._sleep: Callable[[float], None] = time.sleep

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abc.abstractmethod
    def close(self) -> None:
        """Close the connections."""

    def _call(self, send: Callable[[float], Reply], timeout_s: float | None) -> Reply:
        """Send until there is a reply, an error that will not pass, or no time left for another try.

        Args:
            send: one try, in at most so many seconds; raises ScoreError.
            timeout_s: for all tries together; None: the client's own.
        """
        end = self._clock() + (self.timeout_s if timeout_s is None else timeout_s)
        for attempt in range(1, self.retries.attempts + 1):
            left = end - self._clock()
            if left <= 0:
                raise DeadlineExceeded(LATE)
            try:
                return send(left)
            except ScoreError as error:
                wait = self.retries.wait(attempt, error.retry_after)
                last = attempt == self.retries.attempts
                if last or not error.retryable or self._clock() + wait >= end:
                    raise
                self._sleep(wait)
        raise AssertionError("unreachable")
