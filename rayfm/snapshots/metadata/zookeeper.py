"""The metadata store of a cluster: a ZooKeeper ensemble.

Nothing here is ephemeral: a lease lives by its time to live on the server's clock, not by its holder's session, so
that a session that is lost and found again loses no lease, and a holder that is paused loses it when its time is up.
Revisions and tokens are ZooKeeper's transaction ids, which never come back.

The ensemble's servers must agree on the time as closely as leases are long: the leader's clock judges, and another
server may become the leader (chrony or NTP).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from rayfm.config import SnapshotError
from rayfm.snapshots.metadata.access import client_options
from rayfm.snapshots.metadata.base import (
    Conflict,
    Entry,
    Lease,
    LeaseHeld,
    LeaseLost,
    check_key,
    check_prefix,
    check_ttl,
)
from rayfm.snapshots.metadata.cells import Cell
from rayfm.snapshots.metadata.tree import WAIT_S, Changed, Tree

DEFAULT_ROOT = "/rayfm"
MAX_VALUE_BYTES = 900_000
"""ZooKeeper refuses requests of more than 1 MiB."""

_ENTRIES, _LEASES = "entries", "leases"


class ZooKeeperMetadataStore:
    """`MetadataStore` below the znode ``root`` of the ensemble ``hosts`` (``host:port``, separated by commas).

    May be shared by threads, and by processes (each opens its own session; the object pickles as its address). The
    session starts with the first operation. While the servers do not answer, an operation goes on trying for
    ``wait_s`` seconds and then raises `StoreUnavailable`. Credentials come from each process's environment
    (`rayfm.snapshots.metadata.access`).

    Raises:
        ConfigError: the environment's credentials are malformed, or do not go with ``tls``.
    """

    def __init__(self, hosts: str, root: str = DEFAULT_ROOT, wait_s: float = WAIT_S, tls: bool = False) -> None:
        client_options(tls)  # refused here, not at the first operation
        self.hosts, self.root, self.wait_s, self.tls = hosts, root, wait_s, tls
        self._tree = Tree(hosts, root, (_ENTRIES, _LEASES), wait_s, tls)

    def __repr__(self) -> str:
        return f"ZooKeeperMetadataStore({self.hosts!r}, {self.root!r}{', tls=True' if self.tls else ''})"

    def __getstate__(self) -> dict[str, Any]:
        return {"hosts": self.hosts, "root": self.root, "wait_s": self.wait_s, "tls": self.tls}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def close(self) -> None:
        """End this process's session; the next operation starts another."""
        self._tree.close()

    def get(self, key: str) -> Entry | None:
        cell = self._tree.read(_ENTRIES, check_key(key))
        return None if cell is None else Entry(key, cell.value, cell.created)

    def compare_and_set(self, key: str, value: bytes, expected_revision: int | None) -> int:
        check_key(key)
        if len(value) > MAX_VALUE_BYTES:
            raise SnapshotError(f"metadata key {key!r}: {len(value)} bytes; ZooKeeper holds at most {MAX_VALUE_BYTES}")
        while True:
            cell = self._expect(key, expected_revision)
            try:
                return self._tree.put(_ENTRIES, key, cell, bytes(value)).zxid
            except Changed:
                continue

    def delete(self, key: str, expected_revision: int) -> None:
        check_key(key)
        while (cell := self._expect(key, expected_revision)) is not None:
            try:
                self._tree.remove(_ENTRIES, key, cell)
                return
            except Changed:
                continue
        raise Conflict(f"metadata key {key!r} does not exist; read it again")

    def list(self, prefix: str) -> list[Entry]:
        cells = self._tree.walk(_ENTRIES, check_prefix(prefix))
        return [Entry(key, cell.value, cell.created) for key, cell in sorted(cells.items())]

    def acquire(self, name: str, owner: str, ttl_s: float) -> Lease:
        check_key(name), check_ttl(ttl_s)
        while True:
            cell = self._tree.read(_LEASES, name)
            if cell is not None:
                now = self._tree.clock()
                held = _lease(name, cell)
                if held.expires > now:
                    raise LeaseHeld(f"lease {name!r} is held by {held.owner!r} for {held.expires - now:.1f} s more")
            try:
                # Refused where the holder has extended it since: what was judged is deleted by its version.
                stamp = self._tree.put(_LEASES, name, cell, _encode(owner, ttl_s))
            except Changed:
                continue
            return Lease(name, owner, stamp.zxid, stamp.seconds + ttl_s)

    def extend(self, lease: Lease, ttl_s: float) -> Lease:
        check_ttl(ttl_s)
        while True:
            cell = self._own(lease)
            if cell is None:
                raise _lost(lease)
            try:
                stamp = self._tree.touch(cell, _encode(lease.owner, ttl_s))
            except Changed:
                continue
            if stamp.seconds >= _lease(lease.name, cell).expires:
                # It came too late by the server's clock. Nobody has judged the lease dead yet (they would have removed
                # it), so that it lived for a moment longer has harmed nobody.
                self.release(lease)
                raise _lost(lease)
            return Lease(lease.name, lease.owner, lease.token, stamp.seconds + ttl_s)

    def release(self, lease: Lease) -> None:
        while (cell := self._own(lease)) is not None:
            try:
                self._tree.remove(_LEASES, lease.name, cell)
                return
            except Changed:
                continue

    def leases(self, prefix: str) -> Sequence[Lease]:
        cells = self._tree.walk(_LEASES, check_prefix(prefix))
        now = self._tree.clock() if cells else 0.0
        living = []
        for name, found in sorted(cells.items()):
            cell: Cell | None = found
            while cell is not None and _lease(name, cell).expires <= now:
                # Who is told that a lease is dead may delete what it protected: it must not come alive again.
                try:
                    self._tree.remove(_LEASES, name, cell)
                    cell = None
                except Changed:
                    cell = self._tree.read(_LEASES, name)
            if cell is not None:
                living.append(_lease(name, cell))
        return living

    def _expect(self, key: str, revision: int | None) -> Cell | None:
        cell = self._tree.read(_ENTRIES, key)
        found = None if cell is None else cell.created
        if found != revision:
            raise Conflict(f"metadata key {key!r} is at revision {found}, not {revision}; read it again")
        return cell

    def _own(self, lease: Lease) -> Cell | None:
        """The lease's cell, if it is still this acquisition's."""
        cell = self._tree.read(_LEASES, lease.name)
        return cell if cell is not None and cell.created == lease.token else None


def _encode(owner: str, ttl_s: float) -> bytes:
    return json.dumps({"owner": owner, "ttl_s": ttl_s}).encode()


def _lease(name: str, cell: Cell) -> Lease:
    try:
        record = json.loads(cell.value)
        ttl_s = float(record["ttl_s"])
        if not math.isfinite(ttl_s):
            raise ValueError(f"ttl_s {ttl_s}")
        return Lease(name, str(record["owner"]), cell.created, cell.seconds + ttl_s)
    except (ValueError, KeyError, TypeError) as error:
        raise SnapshotError(f"{cell.path}: not a lease of rayfm ({error}); use a root of its own") from None


def _lost(lease: Lease) -> LeaseLost:
    return LeaseLost(f"lease {lease.name!r} of {lease.owner!r} (token {lease.token}) is lost; acquire it anew")
