"""The metadata store: small strongly consistent values and leases. SQLite serves one machine."""

from rayfm.snapshots.metadata.base import Conflict, Entry, Lease, LeaseHeld, LeaseLost, MetadataStore, check_key
from rayfm.snapshots.metadata.sqlite import SQLiteMetadataStore

__all__ = [
    "Conflict",
    "Entry",
    "Lease",
    "LeaseHeld",
    "LeaseLost",
    "MetadataStore",
    "SQLiteMetadataStore",
    "check_key",
]
