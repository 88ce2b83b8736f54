"""The loader of ExFM's data augmentation service (section 3.2, Fig. 3b): what `current` names, loaded once a replica.

A newer version is loaded beside the one that answers, verified, warmed, and then takes its place in one assignment.
A request takes `Loader.current` once and keeps it to its end, so that no reply mixes two versions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from rayfm.config import SnapshotError
from rayfm.operations.metrics import LOAD_FAILURES, SERVED_PERIOD, SERVED_PUBLISHED, SWAP_SECONDS, SWAPS
from rayfm.snapshots.collect import JOB, REPLICA, Collector
from rayfm.snapshots.current import read_current
from rayfm.snapshots.failures import record_failure, record_load
from rayfm.snapshots.keeper import LeaseKeeper
from rayfm.snapshots.load import SnapshotStore
from rayfm.snapshots.metadata.base import Lease, StoreUnavailable
from rayfm.snapshots.updater import LEASE_S, Updater

log = logging.getLogger(__name__)

MAX_PAUSE_S = 300.0
"""Longest pause before a version that could not be loaded is tried again."""

T = TypeVar("T")


@dataclasses.dataclass
class _Held(Generic[T]):
    version: str
    value: T
    lease: Lease
    used: float
    orphan: bool = False
    """Its files are gone or going: it cannot be held any more."""


class Loader(Generic[T]):
    """The versions of one model that one replica has in memory, each under a lease that is extended at a fixed rate.

    Args:
        collector: the published versions and their metadata store.
        model: whose versions.
        owner: who loads, for people to read, and unlike other loaders' owners: failures to load are told apart by it.
        load: makes what answers from a version's files; called once for each version that is loaded.
        warm: called with it before it may answer, so that the first request does not pay for what is made lazily.
        unload: called with what has left, or was never warm; requests may still be using it.
        record: tell the updaters what cannot be loaded, so that `current` may leave it; False where ``load`` may fail
            for the sake of something else than the version.
        verify: compare all files with their hashes first; False where ``load`` does.
        spare: further versions that stay for requests that name them, last used first; those that the lease of a
            job names stay beyond this number.
        lease_s: seconds that a lease lives after each extension; it is extended four times in them.
    """

    def __init__(
        self,
        collector: Collector,
        model: str,
        owner: str,
        load: Callable[[str], T],
        warm: Callable[[T], None] | None = None,
        *,
        unload: Callable[[T], None] | None = None,
        record: bool = True,
        verify: bool = True,
        spare: int = 0,
        lease_s: float = LEASE_S,
    ) -> None:
        self.collector, self.model, self.owner = collector, model, owner
        self._unload, self._records = unload, record
        self._load, self._warm, self._verify, self._spare, self.lease_s = load, warm, verify, spare, lease_s
        self._keeper = LeaseKeeper(collector.metadata, lease_s)
        self._loading = threading.Lock()
        self._held: dict[str, _Held[T]] = {}
        self._current: _Held[T] | None = None
        self._failed: tuple[str, int, float] | None = None  # version, failures, monotonic time of the next try
        self.failure: str | None = None
        """Why the version that `current` names could not be loaded, while it could not."""

    @property
    def version(self) -> str | None:
        """The version that answers, None before the first."""
        current = self._current
        return None if current is None else current.version

    def current(self) -> T:
        """What answers from now on.

        Raises:
            SnapshotError: nothing is loaded yet.
        """
        current = self._current
        if current is None:
            why = f": {self.failure}" if self.failure else ""
            raise SnapshotError(f"{self.model} has no version that can be served yet{why}")
        return current.value

    def get(self, version: str) -> T:
        """A version that a request names, loaded beside the others if it is not there.

        Raises:
            SnapshotError: it is not published, is being deleted, or cannot be loaded.
        """
        held = self._held.get(version)
        if held is None:
            with self._loading:
                held = self._held.get(version) or self._take(version)
                held.used = time.monotonic()
                self._forget()
        held.used = time.monotonic()
        return held.value

    def versions(self) -> list[str]:
        """Versions in memory, oldest first."""
        return sorted(self._held)

    def step(self) -> bool:
        """Look once at what `current` names; whether another version answers now. Loading blocks no request.

        A version that cannot be loaded is recorded, so that an updater may leave it, and tried again after pauses that
        grow; what answered goes on answering.

        Raises:
            StoreUnavailable: the metadata store does not answer.
        """
        named = read_current(self.collector.metadata, self.model)
        with self._loading:
            swapped = False
            if named is not None and named.version != self.version:
                swapped = self._swap(named.version)
            elif named is not None:
                self._failed = self.failure = None
            self._renew()
            self._forget()
        return swapped

    def close(self) -> None:
        """Give all leases back. What is loaded still answers."""
        self._keeper.close()

    def _swap(self, version: str) -> bool:
        if self._failed is not None and self._failed[0] == version and time.monotonic() < self._failed[2]:
            return False
        started = time.monotonic()
        try:
            held = self._held.get(version) or self._take(version)
        except StoreUnavailable:
            raise
        except Exception as error:  # whatever is wrong with it, what answers goes on
            failures = self._failed[1] + 1 if self._failed is not None and self._failed[0] == version else 1
            pause = min(MAX_PAUSE_S, 2.0**failures)
            self._failed = (version, failures, time.monotonic() + pause)
            self.failure = f"{self.model}@{version}: {error}"
            log.error("%s@%s cannot be loaded (next try in %.0f s): %s", self.model, version, pause, error)
            LOAD_FAILURES.add(1, run=self.collector.store.root.name, model=self.model)
            if self._records:
                self._record(version, f"{type(error).__name__}: {error}")
            return False
        record_swap(self.collector.store, self.model, version, time.monotonic() - started)
        self._current, self._failed, self.failure = held, None, None
        held.used = time.monotonic()
        return True

    def _record(self, version: str, reason: str) -> None:
        """Tell the updaters of a failure; where the store is away, the next one."""
        metadata = self.collector.metadata
        with contextlib.suppress(StoreUnavailable):
            owners = [lease.owner for lease in self.collector.holders(self.model, version, kind=REPLICA)]
            record_failure(metadata, self.model, version, self.owner, reason, owners)

    def _take(self, version: str) -> _Held[T]:
        """Load a version under a lease."""
        lease = self.collector.hold(self.model, version, self.owner, self.lease_s, kind=REPLICA)
        self._keeper.keep(lease)
        try:
            if self._verify:
                self.collector.store.verify(self.model, version)
            value = self._load(version)
            try:
                if self._warm is not None:
                    self._warm(value)
            except BaseException:
                if self._unload is not None:
                    self._unload(value)
                raise
        except BaseException:
            self._keeper.drop(lease)
            raise
        with contextlib.suppress(StoreUnavailable):
            record_load(self.collector.metadata, self.model, version, self.owner)
        held = self._held[version] = _Held(version, value, lease, time.monotonic())
        return held

    def _renew(self) -> None:
        """Hold anew what lost its lease (a paused process, a store that was away): it is still in memory."""
        for held in self._held.values():
            if self._keeper.kept(held.lease):
                continue
            try:
                lease = self.collector.hold(self.model, held.version, self.owner, self.lease_s, kind=REPLICA)
            except StoreUnavailable:
                raise
            except SnapshotError as error:
                if not held.orphan:
                    log.warning("%s@%s answers from memory alone: %s", self.model, held.version, error)
                held.orphan = True
                continue
            held.lease, held.orphan = lease, False
            self._keeper.keep(lease)

    def _forget(self) -> None:
        """Let go of versions that neither answer, nor are named by a job's lease, nor are spare."""
        others = [held for held in self._held.values() if held is not self._current]
        others.sort(key=lambda held: held.used, reverse=True)
        for held in others[self._spare :]:
            if not self.collector.holders(self.model, held.version, kind=JOB):
                del self._held[held.version]
                if self._unload is not None:
                    self._unload(held.value)
                self._keeper.drop(held.lease)


def record_swap(store: SnapshotStore, model: str, version: str, seconds: float) -> None:
    """Tell the metrics that a version answers from now on, after ``seconds`` of loading beside the one before it."""
    labels = {"run": store.root.name, "model": model}
    SWAPS.add(1, **labels)
    SWAP_SECONDS.observe(seconds, **labels)
    with contextlib.suppress(SnapshotError, ValueError):
        manifest = store.manifest(model, version)
        SERVED_PUBLISHED.set(_seconds(manifest.created), **labels)
        if manifest.trained_through is not None:
            SERVED_PERIOD.set(_seconds(manifest.trained_through), **labels)


def _seconds(text: str) -> float:
    """Seconds since 1970 of an ISO time, in UTC unless it says otherwise. Raises ValueError where it is none."""
    moment = datetime.datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()


class SnapshotFollower(Generic[T]):
    """An updater and a loader in a thread of their own: what a replica of a service needs to follow `current`.

    Args:
        loader: the replica's.
        updater: None where others update.
        poll_s: seconds between looks.
    """

    def __init__(self, loader: Loader[T], updater: Updater | None = None, poll_s: float = 2.0) -> None:
        self.loader, self.updater, self.poll_s = loader, updater, poll_s
        self._closed = threading.Event()
        self._complaints: dict[str, str] = {}
        self.refresh()
        self._thread = threading.Thread(target=self._follow, daemon=True, name=f"rayfm-follow-{loader.model}")
        self._thread.start()

    def current(self) -> T:
        """As `Loader.current`."""
        return self.loader.current()

    def refresh(self) -> bool:
        """Look once for newer versions; whether another one answers now. Failures are logged: what answers goes on."""
        if self.updater is not None:
            self._try("newer versions", self.updater.step)
        return self._try("the current version", self.loader.step)

    def _try(self, what: str, step: Callable[[], bool]) -> bool:
        try:
            done = step()
        except Exception as error:
            if self._complaints.get(what) != str(error):  # once, not at each look
                log.error("%s: cannot look for %s: %s", self.loader.model, what, error)
            self._complaints[what] = str(error)
            return False
        self._complaints.pop(what, None)
        return done

    def close(self) -> None:
        """Stop following and give the leases back."""
        self._closed.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=self.poll_s + 1.0)
        self.loader.close()

    def _follow(self) -> None:
        while not self._closed.wait(self.poll_s):
            self.refresh()
