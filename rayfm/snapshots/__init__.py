"""Published model versions: publish, verify, load, collect; the metadata store with leases (ExFM section 3.2).

Names that need torch are imported when they are first used: who only wants the metadata store does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rayfm.snapshots.manifest import SnapshotManifest, check_name, version_id
from rayfm.snapshots.metadata import (
    Conflict,
    Entry,
    Lease,
    LeaseHeld,
    LeaseLost,
    MetadataStore,
    SQLiteMetadataStore,
)

if TYPE_CHECKING:
    from rayfm.snapshots.collect import Collector
    from rayfm.snapshots.load import SnapshotStore
    from rayfm.snapshots.publish import RankFile, SnapshotWriter, TensorSlice

_LAZY = {
    "Collector": "collect",
    "SnapshotStore": "load",
    "RankFile": "publish",
    "SnapshotWriter": "publish",
    "TensorSlice": "publish",
}

__all__ = [
    "Collector",
    "Conflict",
    "Entry",
    "Lease",
    "LeaseHeld",
    "LeaseLost",
    "MetadataStore",
    "RankFile",
    "SQLiteMetadataStore",
    "SnapshotManifest",
    "SnapshotStore",
    "SnapshotWriter",
    "TensorSlice",
    "check_name",
    "version_id",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
