"""Collecting old versions without pulling one from under a reader (ExFM section 3.2: the store's lease collects).

Two hands that never trust each other. A task *expires* a version: it writes a tombstone into the metadata store. The
publisher *sweeps*: it deletes the files of a tombstoned version that no lease protects. A reader *holds* a version
before it touches a file: it takes a lease first and looks for the tombstone second. The store is strongly consistent,
so either the reader sees the tombstone and lets go, or the sweep sees the lease and waits.
"""

from __future__ import annotations

import contextlib
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rayfm.config import SnapshotError
from rayfm.snapshots.current import read_current, readmit, refusals
from rayfm.snapshots.keeper import LeaseKeeper
from rayfm.snapshots.load import SnapshotStore
from rayfm.snapshots.manifest import MANIFEST, check_name
from rayfm.snapshots.metadata.base import Conflict, Lease, LeaseHeld, LeaseLost, MetadataStore

JOB, REPLICA = "job", "replica"
"""Who holds a version: a job that names it, or a replica that has it in memory."""

SWEEP_S = 60.0
"""How long a sweep may be silent before another one may delete."""


class Collector:
    """Leases, pins and garbage collection of the versions in ``store``.

    Args:
        store: the published files.
        metadata: where leases, pins and tombstones live.
        keep: how many of the newest versions of a model are never expired.
    """

    def __init__(self, store: SnapshotStore, metadata: MetadataStore, keep: int = 3) -> None:
        if keep < 1:
            raise SnapshotError(f"keep={keep}: at least the newest version must be kept; give 1 or more")
        self.store, self.metadata, self.keep = store, metadata, keep

    def hold(self, model: str, version: str, owner: str, ttl_s: float, kind: str = JOB) -> Lease:
        """A lease that keeps the version's files for ``ttl_s`` seconds; extend it through the metadata store.

        Any number of holders may hold one version. Replicas keep a version in memory as long as a `JOB` holds it.

        Raises:
            SnapshotError: the version does not exist, or is being deleted.
        """
        name = f"{_key('holds', model, version)}/{kind}:{uuid.uuid4().hex}"
        lease = self.metadata.acquire(name, owner, ttl_s)
        try:
            if self.metadata.get(_key("tombstones", model, version)) is not None:
                raise SnapshotError(f"snapshot {model}@{version} is being deleted; use a newer version")
            self.store.manifest(model, version)
        except BaseException:
            self.metadata.release(lease)
            raise
        return lease

    def holders(self, model: str, version: str, kind: str | None = None) -> Sequence[Lease]:
        """Living leases on the version, by default of holders of every kind."""
        prefix = _key("holds", model, version) + "/"
        found = self.metadata.leases(prefix)
        return [lease for lease in found if kind is None or lease.name.startswith(f"{prefix}{kind}:")]

    def pin(self, model: str, version: str, reason: str) -> None:
        """Keep the version until it is unpinned.

        Raises:
            SnapshotError: the version does not exist, or is being deleted.
        """
        # Under a lease, so that the version cannot go between the look and the write.
        lease = self.hold(model, version, f"pin: {reason}", 60.0)
        try:
            self._put(_key("pins", model, version), reason)
            self.metadata.extend(lease, 60.0)  # still ours, so the version stood when the pin was written
        except LeaseLost:
            self.unpin(model, version)
            raise
        finally:
            self.metadata.release(lease)

    def unpin(self, model: str, version: str) -> None:
        """Take the pin away; nothing happens where there is none."""
        self._drop(_key("pins", model, version))

    def pins(self, model: str) -> dict[str, str]:
        """Pinned versions with the reason."""
        prefix = f"snapshots/pins/{check_name('model', model)}/"
        return {entry.key.removeprefix(prefix): entry.value.decode() for entry in self.metadata.list(prefix)}

    def tombstones(self, model: str) -> list[str]:
        """Versions that are being deleted."""
        prefix = f"snapshots/tombstones/{check_name('model', model)}/"
        return [entry.key.removeprefix(prefix) for entry in self.metadata.list(prefix)]

    def expire(self, model: str) -> list[str]:
        """Tombstone every version than which ``keep`` newer ones stand, and that is neither current, held nor pinned.

        It deletes no file. A version that failed does not count as newer, whoever it failed for: it pushes out no
        intact one; nor does one that the guard withholds. It goes itself when ``keep`` others do stand, and so never
        before an intact one in its place would.

        Any task may call it, at any time, in any number.

        Returns:
            The versions tombstoned now.
        """
        buried, pinned, failed = set(self.tombstones(model)), self.pins(model), refusals(self.metadata, model)
        living = [version for version in self.store.versions(model) if version not in buried]
        intact = [v for v in living if v not in failed and not self.store.withheld(model, v)]
        expired: list[str] = []
        if len(intact) < self.keep:
            return expired
        current = self._current(model)
        for version in living:
            if version >= intact[-self.keep] or version == current:
                continue
            if version in pinned or self.holders(model, version):
                continue
            try:
                self.metadata.compare_and_set(_key("tombstones", model, version), b"", None)
            except Conflict:
                continue  # another task was faster
            expired.append(version)
        return expired

    def sweep(self, model: str) -> list[str]:
        """Delete the files of tombstoned versions that nobody holds. Only the publisher and operators call this.

        A version that was pinned or held just before its tombstone came stays until it is not. A sweep that is killed
        is taken up by the next one, once its lease has ended. Where another sweep of the model is under way, nothing is
        deleted.

        Returns:
            The versions deleted.

        Raises:
            LeaseLost: this process was paused for so long that another may sweep by now; it left off.
        """
        deleted: list[str] = []
        if not self.tombstones(model):
            return deleted
        with self._sweeping(model) as still_alone:
            if still_alone is None:
                return deleted
            for version in self.tombstones(model):
                if self.holders(model, version):
                    continue
                # A pin that was set, or `current` moved, under a lease that was older than the tombstone.
                if version in self.pins(model) or version == self._current(model):
                    self._drop(_key("tombstones", model, version))
                    continue
                # Its tombstone still stands then: nobody has deleted it, and published it again under its name.
                still_alone()
                folder = self.store.folder(model, version)
                (folder / MANIFEST).unlink(missing_ok=True)  # first: half-deleted must look unpublished
                _remove(folder)
                readmit(self.metadata, model, version)  # what was said of it goes with it
                self._drop(_key("tombstones", model, version))
                deleted.append(version)
        return deleted

    def sweep_unfinished(self, model: str, older_than_s: float = 86_400.0) -> list[str]:
        """Delete folders of publications that were never committed and were last written ``older_than_s`` ago.

        Where a sweep of the model is under way, nothing is deleted; raises as `sweep`.
        """
        folder = self.store.root / "snapshots" / check_name("model", model)
        limit = time.time() - older_than_s
        deleted: list[str] = []
        with self._sweeping(model) as still_alone:
            if still_alone is None:
                return deleted
            for path in sorted(folder.iterdir()) if folder.exists() else []:
                if not path.is_dir() or (path / MANIFEST).exists():
                    continue
                try:
                    written = max(item.stat().st_mtime for item in (path, *path.iterdir()))
                except FileNotFoundError:
                    continue  # a file was renamed or deleted just now: somebody is at work in it
                if written < limit:
                    still_alone()
                    _remove(path)
                    deleted.append(path.name)
        return deleted

    @contextlib.contextmanager
    def _sweeping(self, model: str) -> Iterator[Callable[[], object] | None]:
        """The right to delete a model's files, None where another has it. What it yields raises LeaseLost once it is
        lost.
        """
        try:
            lease = self.metadata.acquire(f"snapshots/sweeping/{check_name('model', model)}", "a sweep", SWEEP_S)
        except LeaseHeld:
            yield None
            return
        with contextlib.closing(LeaseKeeper(self.metadata, SWEEP_S)) as keeper:
            keeper.keep(lease)
            yield lambda: self.metadata.extend(lease, SWEEP_S)

    def forget(self, model: str) -> None:
        """Forget which versions were to be deleted or were refused: all go, and others may come to bear their names."""
        for version in self.tombstones(model):
            self._drop(_key("tombstones", model, version))
        for version in refusals(self.metadata, model):
            readmit(self.metadata, model, version)

    def _current(self, model: str) -> str | None:
        current = read_current(self.metadata, model)
        return None if current is None else current.version

    def _put(self, key: str, value: str) -> None:
        while True:
            entry = self.metadata.get(key)
            try:
                self.metadata.compare_and_set(key, value.encode(), entry.revision if entry else None)
                return
            except Conflict:
                continue

    def _drop(self, key: str) -> None:
        while (entry := self.metadata.get(key)) is not None:
            try:
                self.metadata.delete(key, entry.revision)
            except Conflict:
                continue


def _remove(folder: Path) -> None:
    """Delete a folder in which others may delete too."""
    while folder.exists():
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)


def _key(what: str, model: str, version: str) -> str:
    return f"snapshots/{what}/{check_name('model', model)}/{check_name('version', version)}"
