"""The label store (Delta Lake): write exactly once, pin, look up by lane, compact, expire."""

from rayfm.labels.compaction import Compacted, compact
from rayfm.labels.coverage import Coverage, coverage
from rayfm.labels.index import LabelGroup
from rayfm.labels.lane_file import LaneRecord, write_lane_file
from rayfm.labels.lookup import LabelLookup, LaneLabels
from rayfm.labels.pins import Pin
from rayfm.labels.retention import Expiry, Retention, expire
from rayfm.labels.storage import Storage
from rayfm.labels.store import Committed, LabelStore

__all__ = [
    "Committed",
    "Compacted",
    "Coverage",
    "Expiry",
    "LabelGroup",
    "LabelLookup",
    "LabelStore",
    "LaneLabels",
    "LaneRecord",
    "Pin",
    "Retention",
    "Storage",
    "compact",
    "coverage",
    "expire",
    "write_lane_file",
]
