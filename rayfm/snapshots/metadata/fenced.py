"""Writes under a lease that a paused holder cannot make late: for services of one's own, which keep values here too."""

from __future__ import annotations

import dataclasses

from rayfm.config import SnapshotError
from rayfm.snapshots.metadata.base import Conflict, Lease, LeaseLost, MetadataStore


@dataclasses.dataclass(frozen=True)
class Fenced:
    """A value, and the fencing token of the lease that it was written under."""

    token: int
    value: bytes


def read_fenced(store: MetadataStore, key: str) -> Fenced | None:
    """What `write_fenced` wrote last, None where it wrote nothing.

    Raises:
        SnapshotError: the key holds something else.
    """
    entry = store.get(key)
    return None if entry is None else _decode(key, entry.value)


def write_fenced(store: MetadataStore, key: str, value: bytes, lease: Lease) -> None:
    """Write ``value`` unless somebody wrote under a later acquisition already: whoever was paused comes too late.

    This does not look whether the lease is alive: what has no successor yet harms nobody by writing. A successor
    that must not see the key change under it writes first.

    Raises:
        LeaseLost: a later holder has written; nothing was.
    """
    while True:
        entry = store.get(key)
        if entry is not None and (found := _decode(key, entry.value)).token > lease.token:
            raise LeaseLost(
                f"lease {lease.name!r} of {lease.owner!r} (token {lease.token}) is lost: token {found.token} wrote "
                f"{key!r}; acquire it anew"
            )
        try:
            store.compare_and_set(key, b"%d\n" % lease.token + value, entry.revision if entry else None)
            return
        except Conflict:
            continue


def _decode(key: str, stored: bytes) -> Fenced:
    token, newline, value = stored.partition(b"\n")
    if not newline or not token.isdigit():
        raise SnapshotError(f"metadata key {key!r} was not written under a lease; use another key")
    return Fenced(int(token), value)
