"""From Amazon's reviews to positives and sampled negatives, a bucket of users at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rayfm.data.sources.amazon_items import Items
from rayfm.data.sources.base import KIND_COLUMN
from rayfm.data.sources.buckets import FILE_SHIFT, Run, read_bucket
from rayfm.data.sources.days import rows_of, usable
from rayfm.data.sources.fields import Field, as_feature
from rayfm.data.sources.history import Clock, Events
from rayfm.data.sources.times import TimeColumn, to_microseconds
from rayfm.schema import EXAMPLE_ID, TIME, TRAFFIC, Schema, mix64

Int64 = npt.NDArray[np.int64]

FIELDS: dict[str, Field] = {
    "user_id": "text",
    "item_id": "text",
    "cate_id": "text",
    "item_history": "texts",
    "cate_history": "texts",
}
SEQUENCES = ("item_history", "cate_history")
TASKS: dict[str, Literal["binary", "regression"]] = {"click": "binary", "overall": "regression"}

BLOCK_ROWS = 16_384
"""Reviews of the blocks that go on to prepare, with their negatives twice as many rows."""

DEFAULT_LENGTH = 50


def needs_categories(schema: Schema) -> bool:
    """Whether the metadata are to be read."""
    return any(feature.name in ("cate_id", "cate_history") for feature in schema.features)


def microseconds(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Times in microseconds, -1 for what cannot be a time."""
    return to_microseconds("reviews", column, TimeColumn(column="unixReviewTime", unit="s"))


def sample_negatives(users: Int64, items: Int64, rows: Int64, ids: Int64, total: int, seed: int) -> Int64:
    """One item for each of some rows, uniform over those that its user never has.

    The draw is the rank of the item among the ``total - n_u`` items that the user does not have; it is found by
    skipping the user's own, so no draw is repeated and none is lost.

    Args:
        users: number of the user of every row of the bucket ``[N]``, below 2^31.
        items: item of every row ``[N]``, in ``[0, total)``, total below 2^32.
        rows: the rows to draw for ``[R]``.
        ids: example ids of those rows ``[R]``; with ``seed`` they decide the draw, whatever else is in the bucket.
        total: I, how many items there are.
        seed: of the draw.

    Returns:
        ``[R]`` items, -1 for a user who has every item.
    """
    pairs = np.unique((users << 32) | items)
    owners, owned = pairs >> 32, pairs & 0xFFFFFFFF
    starts = np.searchsorted(owners, users[rows], "left")
    counts = np.searchsorted(owners, users[rows], "right") - starts
    free = np.maximum(total - counts, 1)
    rank = (mix64(mix64(ids), seed) % free.astype(np.uint64)).astype(np.int64)
    # Of a user's rising items s_0, s_1, ... the i-th is skipped if s_i - i <= rank; s_i - i never falls.
    position_in_user = np.arange(len(pairs)) - np.searchsorted(owners, owners, "left")
    keys = (owners << 32) | (owned - position_in_user)
    skipped = np.searchsorted(keys, (users[rows] << 32) | rank, "right") - starts
    return np.where(counts < total, rank + skipped, -1)


@dataclasses.dataclass(frozen=True)
class ExampleBuilder:
    """Everything that a task needs to build the examples of a bucket of users."""

    schema: Schema
    runs: tuple[Run, ...]
    items: Path
    """File of `Items`."""
    seed: int
    min_history: int
    delay_ms: int
    spans: tuple[tuple[int, int], ...]
    """``[start, end)`` in microseconds of the wanted periods."""

    def __call__(self, bucket: int) -> Iterator[pa.Table]:
        reviews = read_bucket(self.runs, "reviews", bucket)
        if not reviews.num_rows:
            return
        reviews = reviews.append_column(TIME, microseconds(reviews["unixReviewTime"]))
        items = Items.read(self.items)
        item = items.find(reviews["asin"])
        user = pc.index_in(reviews["reviewerID"], value_set=pc.drop_null(pc.unique(reviews["reviewerID"])))
        user = user.cast(pa.int64()).fill_null(-1).to_numpy()
        time = reviews[TIME].fill_null(-1).to_numpy() // 1000
        whole = (user >= 0) & (item >= 0) & (time >= 0)
        events = Events.of(Clock.of(user, time[whole]), user[whole], time[whole], item[whole])
        rows = rows_of(reviews[TIME], self.spans)
        first, last = events.before(user[rows], time[rows], self.delay_ms, len(user))
        bad = ~usable(reviews[TIME].fill_null(-1).to_numpy()[rows])  # for prepare to reject
        rows = rows[(last - first >= self.min_history) | bad]
        negative = np.full(len(user), -1)
        drawn = rows[whole[rows]]
        place = (np.cumsum(whole) - 1)[drawn]  # among the whole rows
        ids = reviews[EXAMPLE_ID].to_numpy()[drawn]
        negative[drawn] = sample_negatives(user[whole], item[whole], place, ids, len(items.asins), self.seed)
        for start in range(0, len(rows), BLOCK_ROWS):
            block = rows[start : start + BLOCK_ROWS]
            with_negative = block[negative[block] >= 0]
            both = np.concatenate([block, with_negative])
            block_items = np.concatenate([item[block], negative[with_negative]])
            yield self._examples(reviews.take(pa.array(both)), len(block), block_items, items, events, user[both])

    def _examples(
        self, rows: pa.Table, positives: int, item: Int64, items: Items, events: Events, user: Int64
    ) -> pa.Table:
        """Examples of reviews, the ``positives`` first, then negatives, each row with its ``item``."""
        is_negative = np.arange(rows.num_rows) >= positives
        ids = rows[EXAMPLE_ID].to_numpy() + (is_negative.astype(np.int64) << FILE_SHIFT)
        columns: dict[str, pa.Array | pa.ChunkedArray] = {
            EXAMPLE_ID: pa.array(ids),
            TIME: rows[TIME],
            TRAFFIC: pa.repeat("all", rows.num_rows),
            KIND_COLUMN: pa.repeat("impression", rows.num_rows),
        }
        where = pa.array(item, mask=item < 0)
        categories = pa.nulls(len(items.asins), pa.string()) if items.categories is None else items.categories
        time = rows[TIME].fill_null(-1).to_numpy() // 1000
        for feature in self.schema.features:
            of_item = categories if feature.name.startswith("cate_") else items.asins
            if feature.name == "user_id":
                column = rows["reviewerID"]
            elif feature.name in SEQUENCES:
                first, last = events.before(user, time, self.delay_ms, feature.max_len or DEFAULT_LENGTH)
                positions, offsets = events.gather(first, last)
                column = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), of_item.take(pa.array(positions)))
            else:
                column = of_item.take(where)
            columns[feature.name] = as_feature(column, feature)
        for task in self.schema.tasks:
            if task.name == "click":
                columns["click"] = pa.array((~is_negative).astype(np.float32))
            else:
                overall = rows["overall"].cast(pa.float32()).combine_chunks()
                columns["overall"] = pc.if_else(pa.array(is_negative), pa.scalar(None, pa.float32()), overall)
        return pa.table(columns)
