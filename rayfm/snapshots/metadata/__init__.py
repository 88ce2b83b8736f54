"""The metadata store: small strongly consistent values and leases. SQLite serves one machine, ZooKeeper a cluster."""

from rayfm.snapshots.metadata.base import (
    Conflict,
    Entry,
    Lease,
    LeaseHeld,
    LeaseLost,
    MetadataStore,
    StoreUnavailable,
    check_key,
)
from rayfm.snapshots.metadata.fenced import Fenced, read_fenced, write_fenced
from rayfm.snapshots.metadata.sqlite import SQLiteMetadataStore
from rayfm.snapshots.metadata.url import check_metadata_url, open_metadata

__all__ = [
    "Conflict",
    "Entry",
    "Fenced",
    "Lease",
    "LeaseHeld",
    "LeaseLost",
    "MetadataStore",
    "SQLiteMetadataStore",
    "StoreUnavailable",
    "check_key",
    "check_metadata_url",
    "open_metadata",
    "read_fenced",
    "write_fenced",
]
