"""Published model versions: publish, verify, load, collect; the metadata store with leases (ExFM section 3.2).

Names that need torch are imported when they are first used: who only wants the metadata store does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rayfm.snapshots.current import Current, Pointer, Refusal, read_current, readmit, refusals
from rayfm.snapshots.failures import LoadFailure, LoadFailures, load_failures
from rayfm.snapshots.manifest import SnapshotManifest, check_name, version_id
from rayfm.snapshots.metadata import (
    Conflict,
    Entry,
    Lease,
    LeaseHeld,
    LeaseLost,
    MetadataStore,
    SQLiteMetadataStore,
    StoreUnavailable,
    open_metadata,
)

if TYPE_CHECKING:
    from rayfm.snapshots.collect import Collector
    from rayfm.snapshots.load import SnapshotStore
    from rayfm.snapshots.loader import Loader, SnapshotFollower
    from rayfm.snapshots.publish import RankFile, SnapshotWriter, TensorSlice
    from rayfm.snapshots.updater import Updater

_LAZY = {
    "Collector": "collect",
    "Loader": "loader",
    "SnapshotFollower": "loader",
    "Updater": "updater",
    "SnapshotStore": "load",
    "RankFile": "publish",
    "SnapshotWriter": "publish",
    "TensorSlice": "publish",
}

__all__ = [
    "Collector",
    "Conflict",
    "Current",
    "Entry",
    "Lease",
    "LeaseHeld",
    "LeaseLost",
    "LoadFailure",
    "LoadFailures",
    "Loader",
    "MetadataStore",
    "Pointer",
    "RankFile",
    "Refusal",
    "SQLiteMetadataStore",
    "SnapshotFollower",
    "SnapshotManifest",
    "SnapshotStore",
    "SnapshotWriter",
    "StoreUnavailable",
    "TensorSlice",
    "Updater",
    "check_name",
    "load_failures",
    "open_metadata",
    "read_current",
    "readmit",
    "refusals",
    "version_id",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
