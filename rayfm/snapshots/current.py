"""Which version of a model is `current`: a record in the metadata store that tasks move and replicas follow.

The updater moves it forward, and back from a version that no replica can load; people move it back
(`Pointer.rollback`) or fix it (`Pointer.pin`). Every move is a compare-and-set under a hold on the version, so it never
points at files that are being deleted; `Collector` spares the version that it names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from rayfm.config import SnapshotError
from rayfm.snapshots.failures import forget_failures
from rayfm.snapshots.manifest import check_name
from rayfm.snapshots.metadata.base import Conflict, LeaseHeld, LeaseLost, MetadataStore

if TYPE_CHECKING:
    from rayfm.snapshots.collect import Collector

HOLD_S = 60.0
"""How long a version is held while the record is moved to it."""


@dataclasses.dataclass(frozen=True)
class Current:
    """What `current` says of a model."""

    version: str
    by: str
    """Who moved it, for people to read."""

    reason: str = ""
    pinned: bool = False
    """The updater leaves it alone."""

    barred: str = ""
    """The updater takes no version up to this one: they were rolled back from."""

    left: tuple[str, ...] = ()
    """The published versions that people rolled back from: nothing goes back to them by itself."""

    revision: int = 0
    """Of the record in the metadata store."""


def read_current(metadata: MetadataStore, model: str) -> Current | None:
    """The record of a model, None where no version was ever current.

    Raises:
        SnapshotError: the record is not one.
    """
    entry = metadata.get(_key(model))
    if entry is None:
        return None
    try:
        fields = json.loads(entry.value)
        return Current(**{**fields, "left": tuple(fields.get("left", ()))}, revision=entry.revision)
    except (ValueError, TypeError, AttributeError) as error:
        raise SnapshotError(f"metadata key {entry.key!r} does not say which version is current ({error})") from None


class Pointer:
    """Moves `current` of one model.

    Args:
        collector: the published versions and their metadata store.
        model: whose.
        by: who moves it, for people to read.
    """

    def __init__(self, collector: Collector, model: str, by: str) -> None:
        self.collector, self.metadata, self.model, self.by = (
            collector,
            collector.metadata,
            check_name("model", model),
            by,
        )

    def read(self) -> Current | None:
        """As `read_current`."""
        return read_current(self.metadata, self.model)

    def move(self, before: Current | None, after: Current, hold_s: float = HOLD_S) -> Current:
        """Write ``after`` in the place of ``before``; the caller has verified the version.

        Raises:
            Conflict: `current` is no longer ``before``; SnapshotError: the version is not there, or is being deleted.
        """
        lease = self.collector.hold(self.model, after.version, f"{self.by}: makes it current", hold_s)
        try:
            written = self._write(before, after)
            try:
                self.metadata.extend(lease, hold_s)  # still ours, so the version stood when the record was written
            except LeaseLost:
                self._undo(before, written)
                raise
            return written
        finally:
            self.metadata.release(lease)

    def pin(self, version: str, reason: str) -> Current:
        """Make ``version`` current, older or newer, and keep it so until `unpin`. A refusal of it is forgotten.

        Raises:
            SnapshotError: the version is not there, differs from its hashes, or is being deleted.
        """
        self.collector.store.verify(self.model, version)
        readmit(self.metadata, self.model, version)

        def pinned(before: Current | None) -> Current:
            barred, left = (before.barred, before.left) if before else ("", ())
            left = tuple(other for other in left if other != version)
            return Current(version, self.by, reason, pinned=True, barred=barred, left=left)

        return self._people_move(pinned)

    def unpin(self) -> Current:
        """Let the updater move `current` again.

        Raises:
            SnapshotError: it is not pinned.
        """

        def unpinned(before: Current | None) -> Current:
            if before is None or not before.pinned:
                raise SnapshotError(f"{self.model} is not pinned; `current` follows the newest version already")
            return dataclasses.replace(before, by=self.by, reason="unpinned", pinned=False)

        return self._people_move(unpinned)

    def rollback(self, reason: str, to: str | None = None) -> Current:
        """Move `current` back and bar what it was moved back from: the updater takes newer versions alone.

        By default it goes to the newest intact version before it that was neither refused nor rolled back from. A
        refusal of ``to`` is forgotten.

        Raises:
            SnapshotError: nothing is current, ``to`` is not an older version, or there is none to go back to.
        """
        first = self.read()
        if first is None:
            raise SnapshotError(f"{self.model} has no current version to roll back from")
        if to is not None and to >= first.version:
            raise SnapshotError(f"{self.model}@{to} is not older than the current {first.version}; pin it instead")
        if to is not None:
            self.collector.store.verify(self.model, to)
            readmit(self.metadata, self.model, to)
        target = to or self._older(first)

        def rolled_back(before: Current | None) -> Current:
            if before is None or before.version != first.version:
                raise SnapshotError(
                    f"{self.model} moved to {before.version if before else None} meanwhile; look again (snapshots show)"
                )
            published = self.collector.store.versions(self.model)
            left = {other for other in published if target < other <= before.version or other in before.left}
            barred = max(before.version, before.barred)
            return Current(target, self.by, reason, before.pinned, barred, tuple(sorted(left - {target})))

        return self._people_move(rolled_back)

    def older(self, current: Current) -> list[str]:
        """Versions that `current` may go back to, newest first; whether they are intact is not looked at."""
        out = given_up(self.metadata, self.model).union(self.collector.tombstones(self.model), current.left)
        versions = self.collector.store.takeable(self.model)
        return [version for version in reversed(versions) if version < current.version and version not in out]

    def _older(self, current: Current) -> str:
        """The newest intact version to go back to."""
        for candidate in self.older(current):
            try:
                self.collector.store.verify(self.model, candidate)
            except SnapshotError:
                continue
            return candidate
        raise SnapshotError(
            f"{self.model} has no intact version older than {current.version} but those that were refused or rolled "
            "back from; name one (--to), or pin it"
        )

    def _people_move(self, change: Callable[[Current | None], Current]) -> Current:
        while True:
            before = self.read()
            try:
                return self.move(before, change(before))
            except Conflict:
                continue  # the updater was faster

    def _write(self, before: Current | None, after: Current) -> Current:
        record = {key: value for key, value in dataclasses.asdict(after).items() if key != "revision"}
        revision = self.metadata.compare_and_set(
            _key(self.model), json.dumps(record).encode(), before.revision if before else None
        )
        return dataclasses.replace(after, revision=revision)

    def _undo(self, before: Current | None, written: Current) -> None:
        try:
            if before is None:
                self.metadata.delete(_key(self.model), written.revision)
            else:
                self._write(dataclasses.replace(before, revision=written.revision), before)
        except Conflict:
            pass  # somebody has moved it on already


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a published version is kept out."""

    reason: str
    by: str
    """Of the last failure."""

    tries: int
    """How many updaters it failed for; at `TRIES` it is tried no more."""

    times: int = 0
    """How often it failed, for all of them together."""

    updaters: tuple[str, ...] = ()
    """Those that count in ``tries``."""


TRIES = 3
"""How many updaters must fail to verify a version before all leave it: one that is alone in it, on a machine whose
mount is broken, keeps no version from the others."""

PAUSE_S = 30.0
"""How long nobody tries a version that just failed: `TRIES` updaters that look at once see one fault of a file system,
and not three."""

PAUSE_GROWTH, LONGEST_PAUSE_S = 4.0, 3600.0
"""How much longer each further pause is, up to the longest: a large version is not read over and over."""


def refusals(metadata: MetadataStore, model: str) -> dict[str, Refusal]:
    """Versions of a model that were refused, with the reason."""
    prefix = f"snapshots/refused/{check_name('model', model)}/"
    return {entry.key.removeprefix(prefix): _refusal(entry.value) for entry in metadata.list(prefix)}


def given_up(metadata: MetadataStore, model: str) -> set[str]:
    """Versions of a model that were refused so often that they are tried no more."""
    return {version for version, found in refusals(metadata, model).items() if found.tries >= TRIES}


def refuse(metadata: MetadataStore, model: str, version: str, reason: str, by: str, for_good: bool = False) -> Refusal:
    """Say that a version failed for ``by``, so that everybody sees it; ``for_good``: it is tried no more."""
    key = _refused_key(model, version)
    while True:
        entry = metadata.get(key)
        before = _refusal(entry.value) if entry else Refusal("", "", 0)
        counts = by not in before.updaters
        refusal = Refusal(
            reason,
            by,
            max(TRIES, before.tries) if for_good else before.tries + counts,
            before.times + 1,
            (*before.updaters, by) if counts else before.updaters,
        )
        try:
            metadata.compare_and_set(
                key, json.dumps(dataclasses.asdict(refusal)).encode(), entry.revision if entry else None
            )
            return refusal
        except Conflict:
            continue


def pause_s(times: int, first_s: float = PAUSE_S) -> float:
    """Seconds until a version that failed ``times`` times is tried again."""
    return min(LONGEST_PAUSE_S, first_s * PAUSE_GROWTH ** min(times - 1, 10))


def pause(metadata: MetadataStore, model: str, version: str, by: str, seconds: float) -> None:
    """Keep all updaters from trying a version for a time: a lease, so that the store's clock alone judges it."""
    with contextlib.suppress(LeaseHeld):
        metadata.acquire(f"{_pauses(model)}{check_name('version', version)}", by, seconds)


def paused(metadata: MetadataStore, model: str) -> set[str]:
    """Versions of a model that nobody tries now."""
    return {lease.name.removeprefix(_pauses(model)) for lease in metadata.leases(_pauses(model))}


def readmit(metadata: MetadataStore, model: str, version: str) -> bool:
    """Forget that a version was refused, and who could not load it: it is tried at once. Whether it was refused."""
    forget_failures(metadata, model, version)
    for lease in metadata.leases(_pauses(model)):
        if lease.name == f"{_pauses(model)}{version}":
            metadata.release(lease)
    key, found = _refused_key(model, version), False
    while (entry := metadata.get(key)) is not None:
        found = True
        try:
            metadata.delete(key, entry.revision)
        except Conflict:
            continue
    return found


def _refusal(value: bytes) -> Refusal:
    try:
        fields = json.loads(value)
        return Refusal(**{**fields, "updaters": tuple(fields.get("updaters", ()))})
    except (ValueError, TypeError, AttributeError):
        return Refusal("refused", "unknown", TRIES)


def _key(model: str) -> str:
    return f"snapshots/current/{check_name('model', model)}"


def _pauses(model: str) -> str:
    return f"snapshots/pauses/{check_name('model', model)}/"


def _refused_key(model: str, version: str) -> str:
    return f"snapshots/refused/{check_name('model', model)}/{check_name('version', version)}"
