"""When to try again, and how long to wait before: plain arithmetic, so that it can be tested without a server."""

from __future__ import annotations

import dataclasses
import random


@dataclasses.dataclass(frozen=True)
class Retries:
    """How a client tries again what may succeed later.

    Scoring changes nothing, so a call may be sent twice; what is not tried again is what the request itself caused.

    Attributes:
        attempts: how often a call is sent at most.
        first_s: seconds before the second try; doubled before each further one. The service's own ``Retry-After``
            counts instead where it is longer.
        longest_s: the longest wait.
        jitter: share by which a wait is lengthened at random, so that many clients do not come back at once.
    """

    attempts: int = 5
    first_s: float = 0.05
    longest_s: float = 5.0
    jitter: float = 0.5

    def wait(self, failures: int, retry_after: float | None, chance: float | None = None) -> float:
        """Seconds to wait after ``failures`` (at least 1) failed tries; ``chance`` in [0, 1) stands in for the dice."""
        backoff = min(self.longest_s, self.first_s * 2.0 ** (failures - 1))
        wait = max(backoff, min(self.longest_s, retry_after or 0.0))
        return wait * (1.0 + self.jitter * (random.random() if chance is None else chance))


def parse_retry_after(text: str | None) -> float | None:
    """Seconds of a ``Retry-After`` header; None where there is none, or it holds a date (ours never do)."""
    try:
        seconds = float(text) if text is not None else -1.0
    except ValueError:
        return None
    return seconds if 0.0 <= seconds < float("inf") else None
