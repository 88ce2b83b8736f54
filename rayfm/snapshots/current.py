"""Which version of a model is `current`: a record in the metadata store that tasks move and replicas follow.

The updater moves it forward, and back from a version that no replica can load; people move it back
(`Pointer.rollback`) or fix it (`Pointer.pin`). Every move is a compare-and-set under a hold on the version, so it never
points at files that are being deleted; `Collector` spares the version that it names.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from rayfm.config import SnapshotError
from rayfm.snapshots.failures import forget_failures
from rayfm.snapshots.manifest import check_name
from rayfm.snapshots.metadata.base import Conflict, LeaseLost, MetadataStore

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
        versions = self.collector.store.versions(self.model)
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
    tries: int
    """How often it was tried; at `TRIES` it is tried no more."""


TRIES = 3


def refusals(metadata: MetadataStore, model: str) -> dict[str, Refusal]:
    """Versions of a model that were refused, with the reason."""
    prefix = f"snapshots/refused/{check_name('model', model)}/"
    return {entry.key.removeprefix(prefix): _refusal(entry.value) for entry in metadata.list(prefix)}


def given_up(metadata: MetadataStore, model: str) -> set[str]:
    """Versions of a model that were refused so often that they are tried no more."""
    return {version for version, found in refusals(metadata, model).items() if found.tries >= TRIES}


def refuse(metadata: MetadataStore, model: str, version: str, reason: str, by: str, tries: int = 1) -> Refusal:
    """Count ``tries`` more failed tries of a version, so that everybody sees it."""
    key = _refused_key(model, version)
    while True:
        entry = metadata.get(key)
        refusal = Refusal(reason, by, _refusal(entry.value).tries + tries if entry else tries)
        try:
            metadata.compare_and_set(
                key, json.dumps(dataclasses.asdict(refusal)).encode(), entry.revision if entry else None
            )
            return refusal
        except Conflict:
            continue


def readmit(metadata: MetadataStore, model: str, version: str) -> bool:
    """Forget that a version was refused, and who could not load it: it is tried again. Whether it was refused."""
    forget_failures(metadata, model, version)
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
        return Refusal(**json.loads(value))
    except (ValueError, TypeError):
        return Refusal("refused", "unknown", TRIES)


def _key(model: str) -> str:
    return f"snapshots/current/{check_name('model', model)}"


def _refused_key(model: str, version: str) -> str:
    return f"snapshots/refused/{check_name('model', model)}/{check_name('version', version)}"
