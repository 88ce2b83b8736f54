"""A user's earlier items, as each row of a log could have known them.

An event of row j enters the sequence of row i only if ``t_j < t_i - delay``: never the row itself, a tie or anything
later.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]

TIME_BITS = 41
"""Milliseconds that a key has room for: 69 years; users take the bits above."""


@dataclasses.dataclass(frozen=True)
class Clock:
    """Packs (user, time) into one int64 whose order is that of the pairs.

    Times count from the earliest event, so the key has room for 4 million users a bucket.
    """

    users: Int64
    """The bucket's users, rising."""
    origin: int
    """Milliseconds since 1970 of the earliest event."""

    @classmethod
    def of(cls, users: Int64, times: Int64) -> Clock:
        return cls(np.unique(users), int(times.min()) if len(times) else 0)

    def keys(self, users: Int64, times: Int64) -> Int64:
        """Keys of pairs ``[N]``; a time before the origin counts as one just before it, a user must be known."""
        position = np.searchsorted(self.users, users)
        if len(self.users) >> (62 - TIME_BITS):
            raise ValueError(f"{len(self.users)} users in a bucket; use more buckets")
        since = np.clip(times, self.origin - 1, self.origin + (1 << TIME_BITS) - 3) - self.origin + 1
        return (position << TIME_BITS) | since


@dataclasses.dataclass(frozen=True)
class Events:
    """Events of one kind (watched, say) of a bucket's users, by user and then time."""

    clock: Clock
    keys: Int64
    items: Int64
    """What happened: ids, or positions in columns of the caller's."""

    @classmethod
    def of(cls, clock: Clock, users: Int64, times: Int64, items: Int64) -> Events:
        """Events ``[N]``; of equal (user, time) the given order stays."""
        keys = clock.keys(users, times)
        order = np.argsort(keys, kind="stable")
        return cls(clock, keys[order], items[order])

    def before(self, users: Int64, times: Int64, delay: int, max_len: int) -> tuple[Int64, Int64]:
        """Where the events that each row may see lie: the newest ``max_len`` with ``t < time - delay``.

        Args:
            users: ``[N]``.
            times: ``[N]``, milliseconds.
            delay: milliseconds until an event is known, at least 0.
            max_len: events at most.

        Returns:
            First and last (exclusive) position in ``items``, each ``[N]``.
        """
        first = np.searchsorted(self.keys, self.clock.keys(users, np.full_like(times, self.clock.origin)), "left")
        # Events have keys from the origin on, so an earlier bound finds none; the bound itself is excluded.
        last = np.searchsorted(self.keys, self.clock.keys(users, times - delay), "left")
        last = np.maximum(first, last)
        return np.maximum(first, last - max_len), last

    def gather(self, first: Int64, last: Int64) -> tuple[Int64, Int64]:
        """Items of rows whose events lie in ``[first, last)``, oldest first, back to back; offsets ``[N + 1]``."""
        lengths = last - first
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        positions = np.arange(offsets[-1]) + np.repeat(first - offsets[:-1], lengths)
        return self.items[positions], offsets
