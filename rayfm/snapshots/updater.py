"""The updater of ExFM's data augmentation service (section 3.2, Fig. 3b): finds newer snapshots and makes them current.

Every task may run one, and none is special: whoever finds a version first verifies it and moves `current`, by
compare-and-set. The publishing database is only read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from rayfm.config import RayfmError
from rayfm.snapshots.collect import REPLICA, Collector
from rayfm.snapshots.current import TRIES, Current, Pointer, given_up, readmit, refuse
from rayfm.snapshots.failures import FAILURES, LoadFailures, load_failures_of
from rayfm.snapshots.keeper import LeaseKeeper
from rayfm.snapshots.manifest import SnapshotManifest
from rayfm.snapshots.metadata.base import Conflict, Lease, LeaseHeld, StoreUnavailable

log = logging.getLogger(__name__)

LEASE_S = 30.0


class Updater:
    """Moves `current` of one model to the newest intact version, and back from one that no replica can load.

    A version whose files differ from its manifest, or that ``check`` refuses, is kept out: the refusal is recorded in
    the metadata store, all updaters heed it after a few tries (a file system may fail for a moment), and the older
    version stays current. So is a version that is current and that loaders failed to load often enough while nobody had
    it (`rayfm.snapshots.failures`): `current` then goes back to the newest intact older version that was not rolled
    back from, unless people pinned it.

    Args:
        collector: the published versions and their metadata store.
        model: whose versions.
        by: who updates, for people to read.
        check: raises a RayfmError, or one of Python's for a wrong value, for an intact version that cannot be used (a
            model that this code does not know).
        lease_s: how long this updater may be silent while it verifies before another one takes over.
    """

    def __init__(
        self,
        collector: Collector,
        model: str,
        by: str,
        check: Callable[[SnapshotManifest], None] | None = None,
        lease_s: float = LEASE_S,
    ) -> None:
        self.collector, self.model, self.by = collector, model, by
        self.store, self.metadata = collector.store, collector.metadata
        self.pointer = Pointer(collector, model, by)
        self._check, self._lease_s = check, lease_s
        self._complained = ""

    def step(self) -> bool:
        """Look once; whether `current` was moved.

        Raises:
            StoreUnavailable: the metadata store does not answer; SnapshotError: its record of `current` is broken.
        """
        while True:
            before = self.pointer.read()
            candidates = self._candidates(before)
            hopeless = self._hopeless(before)
            if not candidates and hopeless is None:
                return False
            try:
                lease = self.metadata.acquire(f"snapshots/updating/{self.model}", self.by, self._lease_s)
            except LeaseHeld:
                return False  # another updater verifies; one reading of the files is enough
            try:
                return self._advance(before, candidates, hopeless, lease)
            except Conflict:
                continue  # `current` was moved meanwhile: look again, from there

    def _candidates(self, before: Current | None) -> list[str]:
        """Versions that may become current, newest first."""
        if before is not None and before.pinned:
            return []
        passed = max(before.version, before.barred) if before else ""
        newer = [version for version in self.store.versions(self.model) if version > passed]
        if not newer:
            return []
        out = given_up(self.metadata, self.model).union(self.collector.tombstones(self.model))
        return [version for version in reversed(newer) if version not in out]

    def _hopeless(self, before: Current | None) -> LoadFailures | None:
        """The failures to load the current version, where it is to be left for them."""
        if before is None:
            return None
        failures = load_failures_of(self.metadata, self.model, before.version)
        if failures is None or failures.counted < FAILURES:
            return None
        holders = self.collector.holders(self.model, before.version, REPLICA)
        if not failures.hopeless([lease.owner for lease in holders]):
            return None
        if before.pinned:
            self._complain(before.version, f"no replica can load it, and it is pinned; last {failures.last()}")
            return None
        return failures

    def _advance(
        self, before: Current | None, candidates: list[str], hopeless: LoadFailures | None, lease: Lease
    ) -> bool:
        keeper = LeaseKeeper(self.metadata, self._lease_s)
        try:
            keeper.keep(lease)
            for version in candidates:
                if self._verified(version):
                    barred, left = (before.barred, before.left) if before else ("", ())
                    self.pointer.move(before, Current(version, self.by, "newest", barred=barred, left=left))
                    readmit(self.metadata, self.model, version)
                    return True
            return before is not None and hopeless is not None and self._retreat(before, hopeless)
        finally:
            keeper.close()

    def _retreat(self, before: Current, failures: LoadFailures) -> bool:
        """Refuse the current version and go back to an older one; whether there was one."""
        why = f"no replica can load it ({failures.counted} failures), last {failures.last()}"
        # First: where this updater dies in between, another one finds what is left to do.
        if before.version not in given_up(self.metadata, self.model):
            refuse(self.metadata, self.model, before.version, why, self.by, TRIES)
        for version in self.pointer.older(before):
            if self._verified(version):
                reason = f"{before.version} was refused: {why}"
                after = Current(version, self.by, reason, barred=before.barred, left=before.left)
                self.pointer.move(before, after)
                log.error("%s goes back to %s: %s", self.model, version, reason)
                return True
        self._complain(before.version, f"{why}; there is no older version to go back to")
        return False

    def _complain(self, version: str, why: str) -> None:
        """Once, not at each look."""
        if self._complained != version:
            log.error("%s@%s stays current: %s", self.model, version, why)
        self._complained = version

    def _verified(self, version: str) -> bool:
        try:
            manifest = self.store.verify(self.model, version)
            if self._check is not None:
                self._check(manifest)
        except StoreUnavailable:
            raise
        except (RayfmError, ValueError, TypeError, LookupError) as error:
            refusal = refuse(self.metadata, self.model, version, str(error), self.by)
            end = "it is kept out" if refusal.tries >= TRIES else "it is tried again"
            log.error("%s@%s is refused (try %d of %d), %s: %s", self.model, version, refusal.tries, TRIES, end, error)
            return False
        return True


def verify_again(collector: Collector, model: str, version: str) -> bool:
    """Verify a version; one that was refused and is intact is readmitted, with new tries to load it. Whether it was
    refused.

    Raises:
        SnapshotError: it is not intact.
    """
    collector.store.verify(model, version)
    return readmit(collector.metadata, model, version)
