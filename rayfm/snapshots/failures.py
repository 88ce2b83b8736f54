"""Versions that loaders could not load: an intact version may be one that no replica can use.

One record a version says who failed, how often and why. A failure counts against the version only while nobody else
has it or may still come to have it: a replica without memory says nothing of what others have loaded.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection

from rayfm.snapshots.manifest import check_name
from rayfm.snapshots.metadata.base import Conflict, MetadataStore

FAILURES = 3
"""How many failures that count it takes until a version is refused. A loader that is alone tries after 2 and 6 seconds
again: a fault that passes within seconds (another's memory, a file system) refuses nothing, and a version that nobody
can load is out of the way before its absence is felt."""

LOADERS = 32
"""How many loaders a record names; the one that failed first leaves."""

REASON_CHARACTERS = 1000


@dataclasses.dataclass(frozen=True)
class LoadFailure:
    """One loader's failures."""

    reason: str
    """Of the last one."""

    times: int


@dataclasses.dataclass(frozen=True)
class LoadFailures:
    """What is known of the failures to load one version."""

    counted: int
    """Failures since anybody loaded it, while nobody had it."""

    loaders: dict[str, LoadFailure]
    """Who -> how often, and why."""

    @property
    def times(self) -> int:
        """Failures of all that are named."""
        return sum(failure.times for failure in self.loaders.values())

    def hopeless(self, owners: Collection[str]) -> bool:
        """Whether the version is to be refused: it failed often enough, and none of the ``owners`` of living leases on
        it has it or tries for the first time.
        """
        return self.counted >= FAILURES and set(owners) <= set(self.loaders)

    def last(self) -> str:
        """The last failure, for people."""
        who, failure = list(self.loaders.items())[-1]
        return f"{who}: {failure.reason}"


def load_failures(metadata: MetadataStore, model: str) -> dict[str, LoadFailures]:
    """Versions of a model that some loader could not load."""
    prefix = f"snapshots/failures/{check_name('model', model)}/"
    return {entry.key.removeprefix(prefix): _parsed(entry.value) for entry in metadata.list(prefix)}


def load_failures_of(metadata: MetadataStore, model: str, version: str) -> LoadFailures | None:
    """The failures of one version, None where there are none."""
    entry = metadata.get(_key(model, version))
    return None if entry is None else _parsed(entry.value)


def record_failure(
    metadata: MetadataStore, model: str, version: str, owner: str, reason: str, owners: Collection[str]
) -> LoadFailures:
    """Say that ``owner`` could not load a version.

    Args:
        metadata, model, version: what failed.
        owner: the loader.
        reason: why.
        owners: of the leases that other replicas have on the version now.
    """
    while True:
        entry = metadata.get(_key(model, version))
        before = LoadFailures(0, {}) if entry is None else _parsed(entry.value)
        others = set(owners) - {owner} - set(before.loaders)  # have it, or try for the first time
        loaders = dict(before.loaders)
        times = loaders.pop(owner).times + 1 if owner in loaders else 1
        loaders[owner] = LoadFailure(reason[:REASON_CHARACTERS], times)
        named = dict(list(loaders.items())[-LOADERS:])
        after = LoadFailures(before.counted + (not others), named)
        try:
            metadata.compare_and_set(
                _key(model, version), json.dumps(dataclasses.asdict(after)).encode(), entry.revision if entry else None
            )
            return after
        except Conflict:
            continue


def record_load(metadata: MetadataStore, model: str, version: str, owner: str) -> None:
    """Say that ``owner`` has loaded a version: what others fail at is their own from now on."""
    while (entry := metadata.get(_key(model, version))) is not None:
        before = _parsed(entry.value)
        loaders = {who: failure for who, failure in before.loaders.items() if who != owner}
        try:
            if not loaders:
                metadata.delete(entry.key, entry.revision)
            elif (after := LoadFailures(0, loaders)) != before:
                metadata.compare_and_set(entry.key, json.dumps(dataclasses.asdict(after)).encode(), entry.revision)
            return
        except Conflict:
            continue


def forget_failures(metadata: MetadataStore, model: str, version: str) -> None:
    """Forget who could not load a version."""
    while (entry := metadata.get(_key(model, version))) is not None:
        try:
            metadata.delete(entry.key, entry.revision)
        except Conflict:
            continue


def _parsed(value: bytes) -> LoadFailures:
    """A record that cannot be read counts for nothing."""
    try:
        found = json.loads(value)
        loaders = {str(who): LoadFailure(**failure) for who, failure in found["loaders"].items()}
        return LoadFailures(int(found["counted"]) if loaders else 0, loaders)
    except (ValueError, TypeError, LookupError, AttributeError):
        return LoadFailures(0, {})


def _key(model: str, version: str) -> str:
    return f"snapshots/failures/{check_name('model', model)}/{check_name('version', version)}"
