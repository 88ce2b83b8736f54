"""The label store (Delta Lake): write exactly once, pin, look up by lane."""

from rayfm.labels.index import LabelGroup
from rayfm.labels.lane_file import LaneRecord, write_lane_file
from rayfm.labels.lookup import LabelLookup, LaneLabels
from rayfm.labels.pins import Pin
from rayfm.labels.store import Committed, LabelStore

__all__ = [
    "Committed",
    "LabelGroup",
    "LabelLookup",
    "LabelStore",
    "LaneLabels",
    "LaneRecord",
    "Pin",
    "write_lane_file",
]
