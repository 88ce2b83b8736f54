"""A ZooKeeper tree of cells, each changed as a whole, with every write's outcome known exactly.

::

    <root>/clients/<id>              one for each process that writes: what it wrote last
    <root>/<folder>/a/b/=/<nonce>    the cell of the key ``a/b``: one child, replaced by another at each change

**Replaced, not overwritten.** A znode's version starts anew when the znode is made anew, so a check of versions alone
mistakes a deleted and remade znode for the one that was read. A cell's child has a name that never comes back:
deleting it by name is the check.

**Writes whose reply is lost.** Each write is one transaction (ZooKeeper's ``multi``) that also puts a nonce into the
writer's own znode, from that znode's known version. When the connection breaks, the writer reads its znode: its nonce
there means that the write happened. Otherwise it raises the version, after which a straggler of the lost connection
can no more succeed, and writes again. This needs no session to survive, and no ephemeral znode.

**Servers that have lost a transaction.** A server of some versions of ZooKeeper that joins its ensemble anew may miss a
transaction that the others have: ours is then a cell with two children, for good. The one of the latest transaction is
the cell; the server that leads decides about writes, whatever another one shows.

**The server's clock.** The writer's znode carries the time and the transaction id of the write, both of the server.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from kazoo.client import KazooClient
from kazoo.exceptions import (
    BadVersionError,
    ConnectionClosedError,
    ConnectionLoss,
    KazooException,
    NoAuthError,
    NodeExistsError,
    NoNodeError,
    NotEmptyError,
    OperationTimeoutError,
    RolledBackError,
    RuntimeInconsistency,
    SessionExpiredError,
    SessionMovedError,
)
from kazoo.handlers.threading import KazooTimeoutError
from kazoo.protocol.states import KeeperState
from kazoo.retry import KazooRetry

from rayfm.snapshots.metadata.access import AUTH, client_options
from rayfm.snapshots.metadata.base import StoreUnavailable
from rayfm.snapshots.metadata.cells import CELL, Cell, Stamp, cells_below, read_cells, result, stamp_of

SESSION_S = 10.0
WAIT_S = 30.0
"""How long an operation goes on trying while the servers do not answer."""

CLIENT_KEPT_S = 86_400.0
"""A writer's znode that is older than this is removed once there are many; a writer that still lives makes another."""

CLIENTS_BEFORE_PRUNING = 64

_LOG = logging.getLogger(__name__)

_LOST = (
    ConnectionClosedError,
    ConnectionLoss,
    OperationTimeoutError,
    SessionExpiredError,
    SessionMovedError,
    KazooTimeoutError,
)

_T = TypeVar("_T")
_Operation = Callable[[Any], None]
"""Adds itself to a transaction."""


class Changed(Exception):
    """The cell is no longer what was read; nothing was written."""


class Tree:
    """Cells below ``root`` on the ensemble ``hosts``. Threads may share it; after a fork it connects anew.

    Args:
        hosts: ``host:port``, several separated by commas.
        root: a znode's absolute path; made where it is missing.
        folders: names of the trees of cells below it.
        wait_s: how long an operation goes on trying while the servers do not answer.
        tls: whether to talk to them over TLS.
    """

    def __init__(
        self, hosts: str, root: str, folders: Iterable[str], wait_s: float = WAIT_S, tls: bool = False
    ) -> None:
        self.hosts, self.root, self.folders, self.wait_s, self.tls = hosts, root, tuple(folders), wait_s, tls
        self._connecting, self._writing = threading.RLock(), threading.RLock()
        self._client: KazooClient | None = None
        self._end: weakref.finalize[..., Any] | None = None
        self._pid = -1
        self._own: list[str] = []
        """This process's own znode, once it has written; shared with what ends the session."""
        self._version: int | None = None
        """Of that znode, where it is known."""
        self._warned = False

    def close(self) -> None:
        """End the session; the next operation starts another."""
        with self._writing, self._connecting:
            if self._end is not None and self._pid == os.getpid():
                self._end()
            self._client, self._end, self._own, self._version = None, None, [], None

    def _drop(self, client: KazooClient | None) -> None:
        """Give up a connection, and what is queued in it; the writer's znode stays, for writes that are unsettled."""
        with self._connecting:
            if client is None or client is not self._client:
                return
            if self._end is not None:
                self._end.detach()
            self._client = self._end = None
        _stop(client, [], self._pid)

    # -- reading --------------------------------------------------------------------------------------------------

    def read(self, folder: str, key: str) -> Cell | None:
        """The key's cell, None where the key does not exist."""
        home = self._home(folder, key)

        def attempt(client: KazooClient, deadline: float) -> Cell | None:
            while True:
                synced = client.sync_async(self.root)  # the server that we ask may lag behind its leader
                names = client.get_children_async(home)
                result(synced, deadline)
                try:
                    paths = [f"{home}/{name}" for name in result(names, deadline)]
                except NoNodeError:
                    return None
                found = read_cells(client, paths, deadline)
                if len(found) == len(paths):
                    if len(found) > 1:
                        self._warn(key)
                    return found[-1]
                # replaced in between: look again

        return self._retry(attempt)

    def walk(self, folder: str, prefix: str) -> dict[str, Cell]:
        """All cells whose key starts with ``prefix``, as they stood together at one moment."""
        base = f"{self.root}/{folder}"

        def attempt(client: KazooClient, deadline: float) -> dict[str, Cell]:
            while True:
                result(client.sync_async(self.root), deadline)
                try:
                    before = result(client.get_async(base), deadline)[1].mzxid
                    cells = cells_below(client, base, prefix, deadline)
                    # Each write that adds, replaces or removes a cell touches the folder's own znode.
                    if result(client.get_async(base), deadline)[1].mzxid == before:
                        return cells
                except NoNodeError:  # somebody has removed the whole tree
                    return {}
                if time.monotonic() > deadline:
                    raise KazooTimeoutError("the cells keep changing")

        return self._retry(attempt)

    # -- writing --------------------------------------------------------------------------------------------------

    def put(self, folder: str, key: str, old: Cell | None, value: bytes) -> Stamp:
        """Give the key a new cell in the place of ``old`` (None: the key must not exist).

        Raises:
            Changed: the cell is another by now, or was touched.
        """
        home = self._home(folder, key)
        new = f"{home}/{uuid.uuid4().hex}"

        def make(transaction: Any) -> None:
            if old is None:
                transaction.create(home)
            else:
                transaction.delete(old.path, old.version)
            transaction.create(new, value)
            transaction.set_data(f"{self.root}/{folder}", b"")

        while True:
            try:
                return self._write(make)[0]
            except (NodeExistsError, BadVersionError):
                raise Changed from None
            except NoNodeError:
                if old is not None:
                    raise Changed from None
                with contextlib.suppress(NoNodeError):  # a writer that removes the last key beside ours tidies it away
                    self._ensure(home.removesuffix(f"/{CELL}"))

    def remove(self, folder: str, key: str, old: Cell) -> None:
        """Remove the key.

        Raises:
            Changed: the cell is another by now, or was touched.
        """
        home = self._home(folder, key)

        def unmake(transaction: Any) -> None:
            transaction.delete(old.path, old.version)
            transaction.delete(home)
            transaction.set_data(f"{self.root}/{folder}", b"")

        while True:
            try:
                self._write(unmake)
                break
            except (NoNodeError, BadVersionError):
                raise Changed from None
            except NotEmptyError:
                self._bury(home, key)
        self._tidy(f"{self.root}/{folder}", home)

    def touch(self, cell: Cell, value: bytes) -> Stamp:
        """Write into the cell in place; it stays the same cell, with a newer time.

        Raises:
            Changed: the cell is another by now, or was touched.
        """
        try:
            return self._write(lambda transaction: transaction.set_data(cell.path, value, cell.version))[0]
        except (NoNodeError, BadVersionError):
            raise Changed from None

    def clock(self) -> float:
        """The server's time, seconds since 1970."""
        return self._write(lambda transaction: None)[0].seconds

    def _write(self, add: _Operation) -> tuple[Stamp, list[Any]]:
        """Carry out one transaction, once, whatever happens to the connection.

        Raises:
            KazooException: the one of the operation that was refused; StoreUnavailable: no answer in `wait_s`.
        """
        nonce = uuid.uuid4().bytes
        uncertain = False

        def attempt(client: KazooClient, deadline: float) -> tuple[Stamp, list[Any]]:
            nonlocal uncertain
            while True:
                if uncertain or self._version is None:
                    done = self._settle(client, nonce, deadline)
                    if done is not None:
                        return done, []
                    uncertain = False
                transaction = client.transaction()
                transaction.set_data(self._own[0], nonce, self._version)
                add(transaction)
                uncertain = True
                results = result(transaction.commit_async(), deadline)
                uncertain = False
                refused = [outcome for outcome in results if isinstance(outcome, KazooException)]
                if not refused:
                    self._version = results[0].version
                    return stamp_of(results[0]), results[1:]
                if isinstance(results[0], (BadVersionError, NoNodeError)):
                    self._version = None  # a straggler of ours, or our znode was pruned
                    continue
                raise next(error for error in refused if not isinstance(error, (RolledBackError, RuntimeInconsistency)))

        with self._writing:
            try:
                return self._retry(attempt)
            except StoreUnavailable as error:
                if not uncertain:
                    raise
                raise StoreUnavailable(f"{error}; whether the last write happened is not known") from None
            finally:
                if uncertain:
                    self._version = None

    def _settle(self, client: KazooClient, nonce: bytes, deadline: float) -> Stamp | None:
        """Find out whether the transaction with ``nonce`` happened; where it did not, see to it that it never will."""
        fence = uuid.uuid4().bytes
        while True:
            if not self._own:
                self._own.append(f"{self.root}/clients/{uuid.uuid4().hex}")
                result(client.create_async(self._own[0], fence, makepath=True), deadline)
            try:
                result(client.sync_async(self.root), deadline)
                value, stat = result(client.get_async(self._own[0]), deadline)
            except NoNodeError:
                # Gone, so no transaction that names it can succeed; the next has another name for the same reason.
                self._own.clear()
                continue
            if value == nonce:
                self._version = stat.version
                return stamp_of(stat)
            if value == fence:
                self._version = stat.version
                return None
            with contextlib.suppress(BadVersionError, NoNodeError):
                result(client.set_async(self._own[0], fence, stat.version), deadline)

    def _tidy(self, base: str, path: str) -> None:
        """Remove the empty znodes above a removed cell. What is left behind is harmless."""

        def attempt(client: KazooClient, deadline: float) -> None:
            above = path
            while (above := above.rpartition("/")[0]) != base:
                result(client.delete_async(above), deadline)

        with contextlib.suppress(NotEmptyError, NoNodeError, StoreUnavailable):
            self._retry(attempt)

    def _bury(self, home: str, key: str) -> None:
        """Remove what the server that leads still holds of a cell's former children.

        Raises:
            StoreUnavailable: the server that we ask does not show them, so that nothing could be removed.
        """

        def attempt(client: KazooClient, deadline: float) -> bool:
            paths = [f"{home}/{name}" for name in result(client.get_children_async(home), deadline)]
            removed = False
            for cell in read_cells(client, paths, deadline)[:-1]:
                with contextlib.suppress(NoNodeError, BadVersionError):
                    result(client.delete_async(cell.path, cell.version), deadline)
                    removed = True
            return removed

        with contextlib.suppress(NoNodeError):  # removed in between
            if not self._retry(attempt):
                raise StoreUnavailable(
                    f"ZooKeeper at {self.hosts}: its servers differ about {home} ({key}); restart the one that leads, "
                    "without its data, so that it copies another's"
                )

    def _warn(self, key: str) -> None:
        if not self._warned:
            self._warned = True
            _LOG.warning(
                "ZooKeeper at %s: one of its servers shows former values of %s beside the present one, which is taken: "
                "it has lost a transaction as it joined the others (ZOOKEEPER-4785 and the like); upgrade the servers",
                self.hosts,
                key,
            )

    def _ensure(self, path: str) -> None:
        self._retry(lambda client, deadline: result(client.ensure_path_async(path), deadline))

    # -- the connection -------------------------------------------------------------------------------------------

    def _retry(self, attempt: Callable[[KazooClient, float], _T]) -> _T:
        """Try until it succeeds or is refused; lost connections and sessions are tried again."""
        deadline = time.monotonic() + self.wait_s
        pause = 0.02
        while True:
            client = None
            try:
                client = self._connection(deadline)
                return attempt(client, deadline)
            except _LOST as error:
                if time.monotonic() + pause > deadline:
                    self._drop(client)  # what is queued in the client must not be sent later
                    why = f"{type(error).__name__} {error}".strip()
                    raise StoreUnavailable(
                        f"ZooKeeper at {self.hosts} does not answer for {self.wait_s:g} s ({why}); "
                        f"check the servers and the network{', and the certificates' if self.tls else ''}"
                    ) from None
                if client is not None and client.client_state == KeeperState.CLOSED:
                    self._drop(client)
            except (NoNodeError, NodeExistsError, BadVersionError, NotEmptyError):
                raise
            except NoAuthError:
                raise StoreUnavailable(
                    f"ZooKeeper at {self.hosts}: who made {self.root}, or what is above it, lets nobody else in; set "
                    f"{AUTH} to the same USER:PASSWORD"
                ) from None
            except KazooException as error:
                raise StoreUnavailable(f"ZooKeeper at {self.hosts} refuses: {type(error).__name__} {error}") from error
            time.sleep(pause)
            pause = min(2 * pause, 0.5)

    def _connection(self, deadline: float) -> KazooClient:
        if not self._connecting.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise KazooTimeoutError("another thread is still connecting")
        try:
            if self._pid != os.getpid():  # threads and sockets do not cross a fork
                self._pid, self._client, self._end, self._own, self._version = os.getpid(), None, None, [], None
            if self._client is not None:
                return self._client
            client = KazooClient(
                hosts=self.hosts,
                timeout=SESSION_S,
                connection_retry=KazooRetry(max_tries=-1, delay=0.05, max_delay=1.0),
                **client_options(self.tls),
            )
            client.start(timeout=max(0.1, deadline - time.monotonic()))
            try:
                self._prepare(client, deadline)
            except BaseException:
                _stop(client, [], os.getpid())
                raise
            self._client = client
            self._end = weakref.finalize(self, _stop, client, self._own, self._pid)
            return client
        finally:
            self._connecting.release()

    def _prepare(self, client: KazooClient, deadline: float) -> None:
        """Make what the tree needs; remove what writers that died long ago have left."""
        for folder in (*self.folders, "clients"):
            result(client.ensure_path_async(f"{self.root}/{folder}"), deadline)
        names = result(client.get_children_async(f"{self.root}/clients"), deadline)
        if len(names) <= CLIENTS_BEFORE_PRUNING:
            return
        now = result(client.set_async(f"{self.root}/clients", b""), deadline).mtime
        for path in (f"{self.root}/clients/{name}" for name in names):
            with contextlib.suppress(NoNodeError, BadVersionError):
                stat = result(client.get_async(path), deadline)[1]
                if now - stat.mtime > CLIENT_KEPT_S * 1e3:
                    result(client.delete_async(path, stat.version), deadline)

    def _home(self, folder: str, key: str) -> str:
        return f"{self.root}/{folder}/{key}/{CELL}"


def _stop(client: KazooClient, own: list[str], pid: int) -> None:
    """End a client's session and remove its writer's znode, as far as that goes without waiting."""
    if pid != os.getpid():
        return
    with contextlib.suppress(Exception):
        if own and client.connected:
            client.delete_async(own[0]).get(timeout=1.0)
    with contextlib.suppress(Exception):
        client.stop()
        client.close()
