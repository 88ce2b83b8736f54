"""Pins: a student's right to one version of the label table, which vacuum never passes.

A pin is a lease in the metadata store. Beside the leases stands the *floor*, a pair: the table version that vacuum has
settled on (older ones are gone) and the one that it proposes. Vacuum proposes, looks for leases between the two, and
settles by compare-and-set; a reader takes its lease, then reads the floor, and lowers a proposal that it lies under.
So either vacuum sees the lease, or its compare-and-set fails, or the reader sees what was settled and lets go.
"""

from __future__ import annotations

import dataclasses
import json
import uuid

from rayfm.config import LabelError
from rayfm.labels.columns import check_part
from rayfm.labels.storage import Storage
from rayfm.snapshots.metadata.base import Conflict, Lease, MetadataStore

_PINS, _FLOOR = "labels/pins/", "labels/floor"


@dataclasses.dataclass(frozen=True)
class Pin:
    """One version of the label table, and whose labels are read from it. Pickles; a look-up is made from it."""

    storage: Storage

    table_version: int
    teacher: str
    version: str
    lease: Lease | None
    """None for a pin that nobody guards (a store without metadata)."""


def take(metadata: MetadataStore, table_version: int, teacher: str, version: str, owner: str, ttl_s: float) -> Lease:
    """A lease on a table version.

    Raises:
        LabelError: vacuum has passed the table version.
    """
    name = (
        f"{_PINS}{table_version}/{check_part('teacher', teacher)}/{check_part('version', version)}/{uuid.uuid4().hex}"
    )
    lease = metadata.acquire(name, owner, ttl_s)
    while True:
        settled, proposed, revision = _floor(metadata)
        if table_version < settled:
            metadata.release(lease)
            raise LabelError(
                f"version {table_version} of the label table is vacuumed (the oldest that can be pinned is {settled}); "
                f"pin the newest version, or run `rayfm label` again, which says where labels of {teacher}@{version} "
                "stand now"
            )
        if table_version >= proposed or _write(metadata, settled, table_version, revision) is not None:
            return lease


def floor(metadata: MetadataStore) -> int:
    """The oldest table version that may be pinned."""
    return _floor(metadata)[0]


def pinned_versions(metadata: MetadataStore) -> list[int]:
    """Table versions under a living lease, oldest first; also ones that are about to be refused."""
    return sorted({int(lease.name.removeprefix(_PINS).split("/")[0]) for lease in metadata.leases(_PINS)})


def pin_owners(metadata: MetadataStore) -> dict[tuple[str, str], list[str]]:
    """(teacher, version) under a living lease -> who holds it, by name."""
    owners: dict[tuple[str, str], set[str]] = {}
    for lease in metadata.leases(_PINS):
        _, teacher, version, _ = lease.name.removeprefix(_PINS).split("/")
        owners.setdefault((teacher, version), set()).add(lease.owner)
    return {what: sorted(names) for what, names in owners.items()}


def settle_floor(metadata: MetadataStore, newest: int) -> int:
    """Raise the floor as far as the living pins allow, at most to ``newest``; returns it."""
    while True:
        settled, _, revision = _floor(metadata)
        wanted = min([max(newest, settled), *_guarding(metadata, settled)])
        proposal = _write(metadata, settled, wanted, revision)
        if proposal is None or any(version < wanted for version in _guarding(metadata, settled)):
            continue
        if _write(metadata, wanted, wanted, proposal) is not None:
            return wanted


def _guarding(metadata: MetadataStore, settled: int) -> list[int]:
    return [version for version in pinned_versions(metadata) if version >= settled]


def _floor(metadata: MetadataStore) -> tuple[int, int, int | None]:
    """The floor that is settled, the one that is proposed, and the revision of the two."""
    entry = metadata.get(_FLOOR)
    if entry is None:
        return 0, 0, None
    settled, proposed = json.loads(entry.value)
    return settled, proposed, entry.revision


def _write(metadata: MetadataStore, settled: int, proposed: int, revision: int | None) -> int | None:
    """The floor's new revision, None where somebody else has changed it."""
    try:
        return metadata.compare_and_set(_FLOOR, json.dumps([settled, proposed]).encode(), revision)
    except Conflict:
        return None
