"""The updater of ExFM's data augmentation service (section 3.2, Fig. 3b): finds newer snapshots and makes them current.

Every task may run one, and none is special: whoever finds a version first verifies it and moves `current`, by
compare-and-set. The publishing database is only read.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from rayfm.config import RayfmError, SnapshotError
from rayfm.snapshots.collect import REPLICA, Collector
from rayfm.snapshots.current import (
    PAUSE_S,
    TRIES,
    Current,
    Pointer,
    given_up,
    pause,
    pause_s,
    paused,
    readmit,
    refusals,
    refuse,
)
from rayfm.snapshots.failures import FAILURES, LoadFailures, load_failures_of
from rayfm.snapshots.keeper import LeaseKeeper
from rayfm.snapshots.manifest import SnapshotManifest
from rayfm.snapshots.metadata.base import Conflict, Lease, LeaseHeld, StoreUnavailable

log = logging.getLogger(__name__)

LEASE_S = 30.0

OTHERS_FIRST = 1.25
"""An updater that a version failed for waits this many times as long as the others before it tries again."""


class Updater:
    """Moves `current` of one model to the newest intact version, and back from one that no replica can load.

    A version that the guard has refused, or has not decided on, is passed over (`rayfm.snapshots.promotion`).

    A version whose files differ from its manifest is not taken: the failure is recorded in the metadata store, nobody
    tries it for a while, and once it failed for `TRIES` updaters, in pauses that grow, all leave it (a file system may
    fail for a moment, or on one machine alone). A version that ``check`` refuses is passed over by this updater alone:
    another one's code may know it. So is a version refused that is current and that loaders failed to load often enough
    while nobody had it (`rayfm.snapshots.failures`): `current` then goes back to the newest intact older version that
    was not rolled back from, unless people pinned it.

    Args:
        collector: the published versions and their metadata store.
        model: whose versions.
        by: who updates, for people to read, and unlike other updaters' names: failures are told apart by it.
        check: raises a RayfmError, or one of Python's for a wrong value, for an intact version that cannot be used (a
            model that this code does not know).
        lease_s: how long this updater may be silent while it verifies before another one takes over.
        pause_s: seconds in which nobody tries a version after it failed for the first time.
    """

    def __init__(
        self,
        collector: Collector,
        model: str,
        by: str,
        check: Callable[[SnapshotManifest], None] | None = None,
        lease_s: float = LEASE_S,
        pause_s: float = PAUSE_S,
    ) -> None:
        self.collector, self.model, self.by = collector, model, by
        self.store, self.metadata = collector.store, collector.metadata
        self.pointer = Pointer(collector, model, by)
        self._check, self._lease_s, self._pause_s = check, lease_s, pause_s
        self._complained = ""
        self._unknown: set[str] = set()  # to this code
        self._turns: dict[str, float] = {}  # version that failed here -> monotonic time of the next try

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
                return self._advance(before, hopeless, lease)
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
        out = self._left_alone().union(self.collector.tombstones(self.model))
        left = [version for version in reversed(newer) if version not in out]
        return [version for version in left if not self.store.withheld(self.model, version)]

    def _left_alone(self) -> set[str]:
        """Versions that this updater does not try now."""
        failed = refusals(self.metadata, self.model)
        # What was readmitted is tried at once.
        self._turns = {version: turn for version, turn in self._turns.items() if version in failed}
        if not failed:
            return set(self._unknown)
        now = time.monotonic()
        others_first = {version for version, turn in self._turns.items() if turn > now}
        refused = {version for version, refusal in failed.items() if refusal.tries >= TRIES}
        return refused | others_first | paused(self.metadata, self.model) | self._unknown

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

    def _advance(self, before: Current | None, hopeless: LoadFailures | None, lease: Lease) -> bool:
        keeper = LeaseKeeper(self.metadata, self._lease_s)
        try:
            keeper.keep(lease)
            # Looked at anew under the lease: another updater may just have seen one fail.
            for version in self._candidates(before):
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
            refuse(self.metadata, self.model, before.version, why, self.by, for_good=True)
        left_alone = self._left_alone()
        for version in self.pointer.older(before):
            if version not in left_alone and self._verified(version):
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
            if not self._known(self.store.manifest(self.model, version)):
                return False
            self.store.verify(self.model, version)
        except StoreUnavailable:
            raise
        except SnapshotError as error:
            if version in self.store.versions(self.model):  # and was not deleted meanwhile
                self._refuse(version, str(error))
            return False
        return True

    def _known(self, manifest: SnapshotManifest) -> bool:
        """Whether this code can use the version: no failure of the version's, so others are told nothing."""
        try:
            if self._check is not None:
                self._check(manifest)
        except (RayfmError, ValueError, TypeError, LookupError) as error:
            self._unknown.add(manifest.version)
            log.error("%s@%s is passed over: this code cannot use it: %s", self.model, manifest.version, error)
            return False
        return True

    def _refuse(self, version: str, reason: str) -> None:
        refusal = refuse(self.metadata, self.model, version, reason, self.by)
        what = f"{self.model}@{version} failed for {refusal.tries} of {TRIES} updaters"
        if refusal.tries >= TRIES:
            log.error("%s and is kept out: %s", what, reason)
            return
        seconds = pause_s(refusal.times, self._pause_s)
        pause(self.metadata, self.model, version, self.by, seconds)
        self._turns[version] = time.monotonic() + OTHERS_FIRST * seconds
        log.error("%s, next try in %.0f s: %s", what, seconds, reason)


def verify_again(collector: Collector, model: str, version: str) -> bool:
    """Verify a version; one that was refused and is intact is readmitted, with new tries to load it. Whether it was
    refused.

    Raises:
        SnapshotError: it is not intact.
    """
    collector.store.verify(model, version)
    return readmit(collector.metadata, model, version)
