"""The metadata store of one machine: an SQLite file that all processes open.

Not for network file systems: SQLite's write-ahead log needs shared memory.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rayfm.config import SnapshotError
from rayfm.snapshots.metadata.base import (
    Conflict,
    Entry,
    Lease,
    LeaseHeld,
    LeaseLost,
    StoreUnavailable,
    check_key,
    check_prefix,
    check_ttl,
)

BUSY_TIMEOUT_S = 30.0

_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS entries (key TEXT PRIMARY KEY, value BLOB NOT NULL, revision INTEGER NOT NULL)",
    "CREATE TABLE IF NOT EXISTS leases "
    "(name TEXT PRIMARY KEY, owner TEXT NOT NULL, token INTEGER NOT NULL, expires REAL NOT NULL)",
    # One row: the last revision, the last token, and the latest time that any lease was judged by.
    "CREATE TABLE IF NOT EXISTS state "
    "(one INTEGER PRIMARY KEY CHECK (one = 1), revision INTEGER NOT NULL, token INTEGER NOT NULL, clock REAL NOT NULL)",
    "INSERT OR IGNORE INTO state VALUES (1, 0, 0, 0)",
)

# SQLite's clock in seconds since 1970. It never runs backwards: a lease that once counted as expired stays so even if
# the machine's clock is set back.
_NOW = "max(clock, (julianday('now') - 2440587.5) * 86400.0)"


class SQLiteMetadataStore:
    """`MetadataStore` in the SQLite file ``path``, which is created with its folder.

    May be shared by threads, and by processes (each opens its own connection; the object pickles as its path).

    Raises:
        SnapshotError: the file cannot be opened or is not such a store.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.RLock()
        self._open: sqlite3.Connection | None = None
        self._pid = -1
        self._connection()

    def __repr__(self) -> str:
        return f"SQLiteMetadataStore({str(self.path)!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path = state["path"]
        self._lock, self._open, self._pid = threading.RLock(), None, -1

    def close(self) -> None:
        """Close this process's connection; the next operation opens another."""
        with self._lock:
            if self._open is not None and self._pid == os.getpid():
                self._open.close()
            self._open = None

    def _connection(self) -> sqlite3.Connection:
        # A connection must not cross a fork: the child would share file locks with its parent.
        if self._open is None or self._pid != os.getpid():
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._open, self._pid = _connect(self.path), os.getpid()
            except (OSError, sqlite3.Error) as error:
                raise SnapshotError(
                    f"metadata store {self.path}: {error}; name a writable file on a local disk"
                ) from None
        return self._open

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """A write transaction: serialised over all processes, all or nothing."""
        with self._lock:
            connection = self._connection()
            try:
                connection.execute("BEGIN IMMEDIATE")
                yield connection
                connection.execute("COMMIT")
            except BaseException as error:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error):
                    raise self._failed(error) from error
                raise

    def _query(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock:
            try:
                return self._connection().execute(sql, values).fetchall()
            except sqlite3.Error as error:
                raise self._failed(error) from error

    def _failed(self, error: sqlite3.Error) -> SnapshotError:
        # Operational: locked for too long, a full or a failing disk; anything else is no such store.
        kind = StoreUnavailable if isinstance(error, sqlite3.OperationalError) else SnapshotError
        return kind(f"metadata store {self.path}: {error}")

    def get(self, key: str) -> Entry | None:
        rows = self._query("SELECT key, value, revision FROM entries WHERE key = ?", check_key(key))
        return Entry(*rows[0]) if rows else None

    def compare_and_set(self, key: str, value: bytes, expected_revision: int | None) -> int:
        check_key(key)
        with self._transaction() as connection:
            _expect(connection, key, expected_revision)
            connection.execute("UPDATE state SET revision = revision + 1")
            revision = int(connection.execute("SELECT revision FROM state").fetchone()[0])
            connection.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?)", (key, bytes(value), revision))
        return revision

    def delete(self, key: str, expected_revision: int) -> None:
        check_key(key)
        with self._transaction() as connection:
            _expect(connection, key, expected_revision)
            connection.execute("DELETE FROM entries WHERE key = ?", (key,))

    def list(self, prefix: str) -> list[Entry]:
        low, high = _range(prefix)
        sql = "SELECT key, value, revision FROM entries WHERE key >= ? AND key < ? ORDER BY key"
        return [Entry(*row) for row in self._query(sql, low, high)]

    def acquire(self, name: str, owner: str, ttl_s: float) -> Lease:
        check_key(name), check_ttl(ttl_s)
        with self._transaction() as connection:
            now = _tick(connection)
            held = connection.execute(
                "SELECT owner, expires FROM leases WHERE name = ? AND expires > ?", (name, now)
            ).fetchone()
            if held:
                raise LeaseHeld(f"lease {name!r} is held by {held[0]!r} for {held[1] - now:.1f} s more")
            connection.execute("UPDATE state SET token = token + 1")
            token = int(connection.execute("SELECT token FROM state").fetchone()[0])
            lease = Lease(name, owner, token, now + ttl_s)
            connection.execute("DELETE FROM leases WHERE expires <= ?", (now,))
            connection.execute("INSERT INTO leases VALUES (?, ?, ?, ?)", (name, owner, token, lease.expires))
        return lease

    def extend(self, lease: Lease, ttl_s: float) -> Lease:
        check_ttl(ttl_s)
        with self._transaction() as connection:
            now = _tick(connection)
            changed = connection.execute(
                "UPDATE leases SET expires = ? WHERE name = ? AND token = ? AND expires > ?",
                (now + ttl_s, lease.name, lease.token, now),
            ).rowcount
        if not changed:
            raise LeaseLost(f"lease {lease.name!r} of {lease.owner!r} (token {lease.token}) is lost; acquire it anew")
        return Lease(lease.name, lease.owner, lease.token, now + ttl_s)

    def release(self, lease: Lease) -> None:
        with self._transaction() as connection:
            connection.execute("DELETE FROM leases WHERE name = ? AND token = ?", (lease.name, lease.token))

    def leases(self, prefix: str) -> Sequence[Lease]:
        low, high = _range(prefix)
        with self._transaction() as connection:  # it judges leases, so it moves the clock's floor
            now = _tick(connection)
            rows = connection.execute(
                "SELECT name, owner, token, expires FROM leases "
                "WHERE name >= ? AND name < ? AND expires > ? ORDER BY name",
                (low, high, now),
            ).fetchall()
        return [Lease(*row) for row in rows]


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            # Switching to the write-ahead log does not wait for other processes that do the same.
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("BEGIN IMMEDIATE")
            for statement in _SCHEMA:
                connection.execute(statement)
            connection.execute("COMMIT")
            return connection
        except sqlite3.OperationalError as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            if "locked" not in str(error) or time.monotonic() > deadline:
                connection.close()
                raise
            time.sleep(0.01)
        except sqlite3.Error:
            connection.close()
            raise


def _tick(connection: sqlite3.Connection) -> float:
    """The store's time, from now on the earliest that it can be."""
    connection.execute(f"UPDATE state SET clock = {_NOW}")
    return float(connection.execute("SELECT clock FROM state").fetchone()[0])


def _expect(connection: sqlite3.Connection, key: str, revision: int | None) -> None:
    row = connection.execute("SELECT revision FROM entries WHERE key = ?", (key,)).fetchone()
    found = row[0] if row else None
    if found != revision:
        raise Conflict(f"metadata key {key!r} is at revision {found}, not {revision}; read it again")


def _range(prefix: str) -> tuple[str, str]:
    """Bounds ``[low, high)`` of the keys below a prefix; '0' follows '/' in the alphabet."""
    check_prefix(prefix)
    return (prefix, prefix[:-1] + "0") if prefix else ("", "\x7f")
