"""From KuaiVideo's rows to examples, a bucket of users at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rayfm.data.sources.base import KIND_COLUMN
from rayfm.data.sources.buckets import Run, read_bucket
from rayfm.data.sources.days import rows_of
from rayfm.data.sources.fields import Field, as_feature
from rayfm.data.sources.history import Clock, Events
from rayfm.data.sources.times import TimeColumn, to_microseconds
from rayfm.data.sources.vectors import Vectors
from rayfm.schema import EXAMPLE_ID, TIME, TRAFFIC, Schema

TASKS = {"click": "is_click", "like": "is_like", "follow": "is_follow"}
"""Task -> column of the log."""

SEQUENCES = {
    "clicked": ("is_click", 1),
    "not_clicked": ("is_click", 0),
    "liked": ("is_like", 1),
    "followed": ("is_follow", 1),
}
"""Sequence feature -> column of the log and the value that makes an event."""

PUBLISHED = ("pos_items", "neg_items")
DIM = 64
"""Dimensions of the visual features."""

VECTORS = {f"{key}_visual_{number}": (key, number) for key in ("item", "user") for number in range(DIM)}

FIELDS: dict[str, Field] = {
    "user_id": "id",
    "item_id": "id",
    **dict.fromkeys(VECTORS, "number"),
    **dict.fromkeys((*SEQUENCES, *PUBLISHED), "ids"),
}

BLOCK_ROWS = 16_384
DEFAULT_LENGTH = 100


def vector_of(name: str) -> tuple[str, int] | None:
    """The id (``item`` or ``user``) and the dimension that a feature is a vector's."""
    return VECTORS.get(name)


def microseconds(column: pa.ChunkedArray, unit: Literal["s", "ms"]) -> pa.ChunkedArray:
    """Times in microseconds, -1 for what cannot be a time."""
    return to_microseconds("log", column, TimeColumn(column="timestamp", unit=unit))


@dataclasses.dataclass(frozen=True)
class ExampleBuilder:
    """Everything that a task needs to build the examples of a bucket of users."""

    schema: Schema
    runs: tuple[Run, ...]
    vectors: dict[str, Vectors]
    """Visual features of ``item`` and ``user``, where the schema has them."""
    delay_ms: int
    time_unit: Literal["s", "ms"]
    spans: tuple[tuple[int, int], ...]
    """``[start, end)`` in microseconds of the wanted periods."""

    def __call__(self, bucket: int) -> Iterator[pa.Table]:
        log = read_bucket(self.runs, "log", bucket)
        if not log.num_rows:
            return
        log = log.append_column(TIME, microseconds(log["timestamp"], self.time_unit))
        events = self._events(log)
        rows = rows_of(log[TIME], self.spans)
        for start in range(0, len(rows), BLOCK_ROWS):
            yield self._examples(log.take(pa.array(rows[start : start + BLOCK_ROWS])).combine_chunks(), events)

    def _events(self, log: pa.Table) -> dict[str, Events]:
        names = [feature.name for feature in self.schema.features if feature.name in SEQUENCES]
        usable = log.filter(pc.fill_null(pc.greater_equal(log[TIME], 0), False))
        usable = usable.filter(pc.and_(usable["user_id"].is_valid(), usable["item_id"].is_valid()))
        users, items = usable["user_id"].to_numpy(), usable["item_id"].to_numpy()
        times = usable[TIME].to_numpy() // 1000
        clock = Clock.of(log["user_id"].fill_null(-1).to_numpy(), times)
        events = {}
        for name in names:
            column, value = SEQUENCES[name]
            happened = pc.fill_null(pc.equal(usable[column], value), False).to_numpy()
            events[name] = Events.of(clock, users[happened], times[happened], items[happened])
        return events

    def _examples(self, rows: pa.Table, events: dict[str, Events]) -> pa.Table:
        columns: dict[str, pa.Array | pa.ChunkedArray] = {
            EXAMPLE_ID: rows[EXAMPLE_ID],
            TIME: rows[TIME],
            TRAFFIC: pa.repeat("all", rows.num_rows),
            KIND_COLUMN: pa.repeat("impression", rows.num_rows),
            "user_id": rows["user_id"],
        }
        taken = {key: vectors.take(rows[f"{key}_id"].fill_null(-1).to_numpy()) for key, vectors in self.vectors.items()}
        users = rows["user_id"].fill_null(-1).to_numpy()
        times: npt.NDArray[np.int64] = rows[TIME].fill_null(-1).to_numpy() // 1000
        for feature in self.schema.features:
            vector = vector_of(feature.name)
            if feature.name in SEQUENCES:
                own = events[feature.name]
                first, last = own.before(users, times, self.delay_ms, feature.max_len or DEFAULT_LENGTH)
                items, offsets = own.gather(first, last)
                column = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(items))
            elif vector is not None:
                values = taken[vector[0]][:, vector[1]]
                column = pa.array(values, mask=np.isnan(values))
            else:
                column = rows[feature.name]
            columns[feature.name] = as_feature(column, feature)
        for task in self.schema.tasks:
            columns[task.name] = rows[TASKS[task.name]].cast(pa.float32())
        return pa.table(columns)
