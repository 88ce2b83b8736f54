"""Small lanes of labels that tell where they come from, for tests of the store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from rayfm.labels import LabelLookup, LabelStore, Retention, Storage, expire, write_lane_file
from rayfm.schema import Task

TASKS = (Task(name="click"), Task(name="watch_time", kind="regression"))
LANES, ROWS, PERIOD = 3, 40, "2022-04-26"


def lane_labels(lane: int, rows: int = ROWS, offset: float = 0.0, kind: str = "impression") -> pa.Table:
    """Predictions that tell where they come from."""
    ids = np.arange(rows) * 10 + lane + (1_000_000 if kind == "consideration" else 0)
    return pa.table(
        {
            "example_id": pa.array(ids, pa.int64()),
            "click": pa.array((ids % 997) / 1000 + offset, pa.float32()),
            "watch_time": pa.array(ids * 0.5, pa.float64()),
        }
    )


def all_lanes(rows: int = ROWS) -> list:
    return [
        (kind, lane, lane_labels(lane, rows, kind=kind))
        for kind in ("impression", "consideration")
        for lane in range(LANES)
    ]


def write(root: str | Path | Storage, lane: int = 0, labels: pa.Table | None = None, **changed):
    arguments = {
        "teacher": "fm",
        "version": "2022-04-25-aa",
        "trained_through": "2022-04-25",
        "period": PERIOD,
        "kind": "impression",
        "lane": lane,
        "labels": lane_labels(lane) if labels is None else labels,
        "tasks": TASKS,
    }
    return write_lane_file(root, **(arguments | changed))


def run_job(root: str | Path | Storage, version: str = "2022-04-25-aa", period: str = PERIOD, rows: int = ROWS):
    return LabelStore(root).label("fm", version, "2022-04-25", period, all_lanes(rows), TASKS)


def check_complete(root: str | Path | Storage, version: str = "2022-04-25-aa") -> None:
    """Every label stands, once, with its value."""
    store = LabelStore(root)
    assert sum(part.rows for part in store.list("fm", PERIOD) if part.version == version) == 2 * LANES * ROWS
    lookup = LabelLookup((root, None), "fm", version, ("watch_time", "click"))
    for kind, lane, labels in all_lanes():
        ids = labels["example_id"].to_numpy()
        values, mask = lookup.rows(PERIOD, kind, lane, 0, ROWS, ids)
        assert mask.all()
        np.testing.assert_array_equal(values[:, 0], labels["watch_time"].to_numpy().astype(np.float32))
        np.testing.assert_array_equal(values[:, 1], labels["click"].to_numpy())


def take_out(store: LabelStore, version: str) -> int:
    """Expire a version whoever pins it: rows that went."""
    return sum(item.rows for item in expire(store, Retention(version=version), also_pinned=True))
