"""What a metadata store is (ExFM section 3.2, Fig. 3b: the store that holds the latest snapshot with a lease).

Keys and lease names are slash-separated paths (``snapshots/teacher/current``), so that a tree such as ZooKeeper's can
hold them. Every operation is linearisable over all processes that use the store.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Protocol

from rayfm.config import SnapshotError

_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:@-]*(/[A-Za-z0-9_][A-Za-z0-9_.:@-]*)*")


class Conflict(SnapshotError):
    """A compare-and-set or delete found another revision than the one expected: read again and decide again."""


class LeaseHeld(SnapshotError):
    """Somebody else holds the lease."""


class LeaseLost(SnapshotError):
    """The lease has expired or was released: what it protected may be gone; acquire it anew and start over."""


class StoreUnavailable(SnapshotError):
    """The store did not answer in time. What it holds is untouched by that; try again later."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A key's value. ``revision`` grows with each change and never comes back, not even after a deletion."""

    key: str
    value: bytes
    revision: int


@dataclasses.dataclass(frozen=True)
class Lease:
    """The right to ``name`` until ``expires`` on the store's clock.

    ``token`` fences: each acquisition in the store gets a higher one than all before it, so whoever writes under a
    lease can hand it on and have the writes of an earlier, paused holder refused.
    """

    name: str
    owner: str
    token: int
    expires: float
    """Seconds since 1970 on the store's clock. For display: only the store decides whether the lease is alive."""


class MetadataStore(Protocol):
    """Compare-and-set values and leases that expire by the store's own clock.

    Every operation raises `StoreUnavailable` where the store does not answer.
    """

    def get(self, key: str) -> Entry | None:
        """The key's value and revision, or None where the key does not exist."""
        ...

    def compare_and_set(self, key: str, value: bytes, expected_revision: int | None) -> int:
        """Write ``value`` if the key's revision is ``expected_revision`` (None: the key must not exist).

        Returns:
            The new revision.

        Raises:
            Conflict: it is not; nothing was written.
        """
        ...

    def delete(self, key: str, expected_revision: int) -> None:
        """Remove the key if its revision is ``expected_revision``.

        Raises:
            Conflict: it is not, or the key does not exist.
        """
        ...

    def list(self, prefix: str) -> list[Entry]:
        """Entries below ``prefix`` (which ends with a slash, or is empty for all), sorted by key."""
        ...

    def acquire(self, name: str, owner: str, ttl_s: float) -> Lease:
        """Take the lease for ``ttl_s`` seconds. ``owner`` is for people to read; it gives no right to a held lease.

        Raises:
            LeaseHeld: it is held, by whomever.
        """
        ...

    def extend(self, lease: Lease, ttl_s: float) -> Lease:
        """The same lease (same token), alive for ``ttl_s`` seconds from now.

        Raises:
            LeaseLost: it expired or was released before.
        """
        ...

    def release(self, lease: Lease) -> None:
        """Give the lease back. Nothing happens where it is lost already, or held by someone else by now."""
        ...

    def leases(self, prefix: str) -> Sequence[Lease]:
        """Living leases below ``prefix`` (as in `list`), sorted by name."""
        ...

    def close(self) -> None:
        """Let this process's connection go; the next operation makes another."""
        ...


def check_key(key: str) -> str:
    """``key`` if it is a valid key or lease name.

    Raises:
        SnapshotError: it is empty, has an empty part, or a part that starts with a dot or has an odd character.
    """
    if not _KEY.fullmatch(key):
        raise SnapshotError(
            f"metadata key {key!r}: write parts of letters, digits, '_.:@-' that start with a letter, digit or '_', "
            "joined by '/'"
        )
    return key


def check_prefix(prefix: str) -> str:
    """``prefix`` if it is empty or a key followed by a slash. Raises SnapshotError otherwise."""
    if prefix and not prefix.endswith("/"):
        raise SnapshotError(f"metadata prefix {prefix!r}: end it with '/'")
    if prefix:
        check_key(prefix[:-1])
    return prefix


def check_ttl(ttl_s: float) -> float:
    """``ttl_s`` if it is a positive finite number of seconds. Raises SnapshotError otherwise."""
    if not 0 < ttl_s < float("inf"):
        raise SnapshotError(f"a lease of {ttl_s} seconds: give a positive, finite time")
    return ttl_s
