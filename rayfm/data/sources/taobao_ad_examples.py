"""From the rows of Taobao's ad logs to examples, a bucket of users at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rayfm.config import DataError
from rayfm.data.sources.base import KIND_COLUMN
from rayfm.data.sources.buckets import Run, read_bucket
from rayfm.data.sources.days import DAY_US, HOUR_US, rows_of
from rayfm.data.sources.fields import Field, as_feature
from rayfm.data.sources.history import Clock, Events
from rayfm.data.sources.tables import Side, read_side
from rayfm.data.sources.times import TimeColumn, to_microseconds
from rayfm.schema import EXAMPLE_ID, TIME, TRAFFIC, Feature, Schema

Int64 = npt.NDArray[np.int64]

TAGS = ("pv", "cart", "fav", "buy")
"""Kinds of behaviour; ``btag_his`` has 1 for pv, 2 for cart, 3 for fav, 4 for buy."""

OUTCOMES = ("cart", "fav", "buy")
TASKS = ("click", *OUTCOMES)

USER_FIELDS = (
    *("cms_segid", "cms_group_id", "final_gender_code", "age_level", "pvalue_level"),
    *("shopping_level", "occupation", "new_user_class_level"),
)
AD_FIELDS = ("cate_id", "campaign_id", "customer", "brand", "price")
SEQUENCES: dict[str, tuple[str | None, str]] = {
    "btag_his": (None, "tag"),
    "cate_his": (None, "cate"),
    "brand_his": (None, "brand"),
    **{f"{tag}_{column}": (tag, column) for tag in TAGS for column in ("cate", "brand")},
}
"""Sequence feature -> kind of behaviour (None: all kinds), what of it."""

FIELDS: dict[str, Field] = {
    "user_id": "id",
    "adgroup_id": "id",
    "pid": "text",
    "hour": "id",
    "weekday": "id",
    **dict.fromkeys(USER_FIELDS, "id"),
    **dict.fromkeys(AD_FIELDS, "id"),
    "price": "number",
    **dict.fromkeys(SEQUENCES, "ids"),
}
"""``hour`` and ``weekday`` (Monday is 0) are those of UTC+8."""

UNKNOWN = 0
"""Stands for a missing category or brand in a sequence; official ids count from 1."""

BLOCK_ROWS = 32_768
DEFAULT_LENGTH = 50
_SECONDS = TimeColumn(column="time_stamp", unit="s")
_PATH = "raw_sample"


def outcomes(schema: Schema) -> bool:
    """Whether a task is made of later behaviour."""
    return any(task.name in OUTCOMES for task in schema.tasks)


def behaviour_columns(schema: Schema) -> tuple[str, ...]:
    """What the schema needs of the behaviour log; nothing, where it has neither sequences nor outcomes."""
    wanted = [SEQUENCES[feature.name] for feature in schema.features if feature.name in SEQUENCES]
    if not wanted and not outcomes(schema):
        return ()
    return ("user", "time_stamp", "btag", "cate", "brand")


def microseconds(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Times in microseconds, -1 for what cannot be a time."""
    return to_microseconds(_PATH, column, _SECONDS)


@dataclasses.dataclass(frozen=True)
class Behaviours:
    """Behaviours of a bucket's users ``[E]``, in the log's order; those without user, time or btag are left out."""

    users: Int64
    times: Int64
    """Milliseconds since 1970 UTC."""
    columns: dict[str, Int64]
    """``tag`` (position in TAGS, from 1), ``cate`` and ``brand`` (0 where missing)."""

    @classmethod
    def of(cls, log: pa.Table) -> Behaviours:
        """From rows of the behaviour log.

        Raises:
            DataError: a btag that is none of the official ones.
        """
        times = microseconds(log["time_stamp"])
        log = log.set_column(log.column_names.index("time_stamp"), "time_stamp", times)
        whole = pc.and_(pc.is_valid(log["user"]), pc.is_valid(log["btag"]))
        log = log.filter(pc.and_(whole, pc.fill_null(pc.greater_equal(times, 0), False)))
        tags = pc.if_else(pc.equal(log["btag"], "ipv"), "pv", log["btag"])
        found = pc.index_in(tags, value_set=pa.array(TAGS))
        if found.null_count:
            odd = pc.unique(tags.filter(pc.is_null(found))).to_pylist()[:3]
            raise DataError(
                f"behavior_log: column 'btag' has {', '.join(map(repr, odd))}; known: {', '.join(TAGS)}; correct the "
                "file"
            )
        columns = {name: log[name].fill_null(UNKNOWN).to_numpy() for name in ("cate", "brand")}
        return cls(
            users=log["user"].to_numpy(),
            times=log["time_stamp"].to_numpy() // 1000,
            columns={"tag": found.to_numpy().astype(np.int64) + 1, **columns},
        )


@dataclasses.dataclass(frozen=True)
class ExampleBuilder:
    """Everything that a task needs to build the examples of a bucket of users."""

    schema: Schema
    runs: tuple[Run, ...]
    ads: Path | None
    users: Path | None
    delay_ms: int
    window_ms: int
    last_ms: int
    """Time of the log's last impression, where the log of behaviours is taken to end as well."""
    spans: tuple[tuple[int, int], ...]
    """``[start, end)`` in microseconds of the wanted periods."""

    def __call__(self, bucket: int) -> Iterator[pa.Table]:
        samples = read_bucket(self.runs, "raw_sample", bucket)
        samples = samples.append_column(TIME, microseconds(samples["time_stamp"]))
        samples = samples.take(pa.array(rows_of(samples[TIME], self.spans)))
        if not samples.num_rows:
            return
        names = {feature.name for feature in self.schema.features}
        users = None if self.users is None else _side(self.users, "userid", names, USER_FIELDS)
        ads = None
        if self.ads is not None:
            needed = names | {"cate_id", "brand"} if outcomes(self.schema) else names
            ads = _side(self.ads, "adgroup_id", needed, AD_FIELDS)
        events, later = self._behaviours(bucket, samples)
        for start in range(0, samples.num_rows, BLOCK_ROWS):
            yield self._examples(samples.slice(start, BLOCK_ROWS).combine_chunks(), users, ads, events, later)

    def _behaviours(
        self, bucket: int, samples: pa.Table
    ) -> tuple[dict[str | None, tuple[Events, Behaviours]], Behaviours | None]:
        """Events by kind of behaviour, as positions in the behaviours; and the behaviours that make outcomes."""
        if not behaviour_columns(self.schema):
            return {}, None
        known = Behaviours.of(read_bucket(self.runs, "behavior_log", bucket))
        clock = Clock.of(np.concatenate([samples["user"].fill_null(-1).to_numpy(), known.users]), known.times)
        events: dict[str | None, tuple[Events, Behaviours]] = {}
        for feature in self.schema.features:
            tag = SEQUENCES.get(feature.name, ("", ""))[0]
            if tag != "" and tag not in events:
                rows = np.arange(len(known.users)) if tag is None else _tagged(known, tag)
                events[tag] = Events.of(clock, known.users[rows], known.times[rows], rows), known
        return events, known if outcomes(self.schema) else None

    def _examples(
        self,
        rows: pa.Table,
        users: Side | None,
        ads: Side | None,
        events: dict[str | None, tuple[Events, Behaviours]],
        later: Behaviours | None,
    ) -> pa.Table:
        local = pc.add(pc.if_else(pc.greater_equal(rows[TIME], 0), rows[TIME], None), 8 * HOUR_US)
        columns: dict[str, pa.Array | pa.ChunkedArray] = {
            EXAMPLE_ID: rows[EXAMPLE_ID],
            TIME: rows[TIME],
            TRAFFIC: rows["pid"],
            KIND_COLUMN: pa.repeat("impression", rows.num_rows),
            "user_id": rows["user"],
        }
        ready = {
            "user_id": rows["user"],
            "adgroup_id": rows["adgroup_id"],
            "pid": rows["pid"],
            "hour": pc.divide(_modulo(local, DAY_US), HOUR_US),
            "weekday": _modulo(pc.add(pc.divide(local, DAY_US), 3), 7),  # 1970-01-01 was a Thursday
        }
        user_rows = None if users is None else users.find(rows["user"])
        ad_rows = None if ads is None else ads.find(rows["adgroup_id"])
        for feature in self.schema.features:
            column = ready.get(feature.name)
            if feature.name in SEQUENCES:
                column = self._sequence(feature, rows, *events[SEQUENCES[feature.name][0]])
            elif users is not None and feature.name in USER_FIELDS:
                column = users.table[feature.name].take(user_rows)
            elif ads is not None and feature.name in AD_FIELDS:
                column = ads.table[feature.name].take(ad_rows)
            columns[feature.name] = as_feature(column, feature)
        for task in self.schema.tasks:
            if task.name == "click":
                columns["click"] = rows["clk"].cast(pa.float32())
            elif ads is not None and later is not None:
                ad = {
                    name: ads.table[column].take(ad_rows) for name, column in (("cate", "cate_id"), ("brand", "brand"))
                }
                columns[task.name] = self._outcome(task.name, rows, ad, later)
        return pa.table(columns)

    def _sequence(self, feature: Feature, rows: pa.Table, events: Events, known: Behaviours) -> pa.Array:
        first, last = events.before(
            rows["user"].fill_null(-1).to_numpy(),
            rows[TIME].fill_null(-1).to_numpy() // 1000,
            self.delay_ms,
            feature.max_len or DEFAULT_LENGTH,
        )
        positions, offsets = events.gather(first, last)
        values = known.columns[SEQUENCES[feature.name][1]][positions]
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))

    def _outcome(self, tag: str, rows: pa.Table, ad: dict[str, pa.ChunkedArray], known: Behaviours) -> pa.Array:
        """1 where the user did ``tag`` to the ad's category and brand in ``(t, t + window]``, else 0.

        Null where the window is not over when the log ends, and where the user or the ad's category is missing.
        """
        own = _tagged(known, tag)
        users = rows["user"].fill_null(-1).to_numpy()
        times = rows[TIME].fill_null(-1).to_numpy() // 1000
        wanted = {name: column.fill_null(UNKNOWN).to_numpy() for name, column in ad.items()}
        groups = _groups(
            np.concatenate([known.users[own], users]),
            np.concatenate([known.columns["cate"][own], wanted["cate"]]),
            np.concatenate([known.columns["brand"][own], wanted["brand"]]),
        )
        clock = Clock.of(groups, known.times[own])
        events = Events.of(clock, groups[: len(own)], known.times[own], own)
        mine = groups[len(own) :]
        # `before` excludes its bound, so a millisecond more includes it.
        until_now = events.before(mine, times + 1, 0, len(own) + 1)[1]
        until_end = events.before(mine, times + self.window_ms + 1, 0, len(own) + 1)[1]
        unknown = (times + self.window_ms > self.last_ms) | (times < 0)
        unknown |= rows["user"].is_null().to_numpy() | ad["cate"].is_null().to_numpy()
        return pa.array((until_end > until_now).astype(np.float32), mask=unknown)


def _tagged(known: Behaviours, tag: str) -> Int64:
    return np.flatnonzero(known.columns["tag"] == TAGS.index(tag) + 1)


def _groups(*columns: Int64) -> Int64:
    """A number for each combination of values: ``[N], [N], ... -> [N]``, equal where all columns are."""
    groups = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        values, codes = np.unique(column, return_inverse=True)
        groups = np.unique(groups * len(values) + codes, return_inverse=True)[1]
    return groups.astype(np.int64)


def _side(path: Path, key: str, names: set[str], known: Sequence[str]) -> Side:
    types = {"number": pa.float64(), "id": pa.int64()}
    return read_side(path, key, {name: types[FIELDS[name]] for name in known if name in names})


def _modulo(column: pa.ChunkedArray, divisor: int) -> pa.ChunkedArray:
    return pc.subtract(column, pc.multiply(pc.divide(column, divisor), divisor))
