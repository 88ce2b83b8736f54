"""Rows of the streams as they came, brought into the join's form; what cannot be used becomes a reject."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayfm.augment.config import FeedbackConfig, ImpressionsConfig, JoinConfig, StreamConfig
from rayfm.augment.rules import Bool, Int64
from rayfm.augment.state import EVENT_ID, FEEDBACK, STREAM, TASK, VALUE
from rayfm.config import DataError, nearest
from rayfm.data.columns import one_array
from rayfm.data.conform import conform
from rayfm.data.sources.base import KIND_COLUMN
from rayfm.data.sources.times import to_microseconds
from rayfm.data.validate import REASON
from rayfm.schema import EXAMPLE_ID, TIME

CLOCK_SLACK_US = 3_600_000_000
"""How far ahead of this machine's clock an event time may be. One wrong time in the far future would move the watermark
past every window that is still open, and make negatives of all."""


@dataclasses.dataclass(frozen=True)
class Arrivals:
    """Usable rows of one stream, and the others."""

    good: pa.Table
    bad: pa.Table
    """As they came, with a ``reason``."""

    newest: int | None
    """Newest event time among the good rows."""


def with_reasons(table: pa.Table, reasons: pa.Array) -> pa.Table:
    """Rejected rows with a ``reason``; a column of theirs that has this name becomes ``reason_``."""
    names = [f"{name}_" if name == REASON else name for name in table.column_names]
    return table.rename_columns(names).append_column(REASON, reasons)


class _Reasons:
    """The first reason against each row."""

    def __init__(self, rows: int) -> None:
        self.reason = np.full(rows, "", object)

    def against(self, mask: Bool | pa.Array | None, reason: str) -> None:
        if mask is None:
            return
        if not isinstance(mask, np.ndarray):
            mask = pc.fill_null(mask, False).to_numpy(zero_copy_only=False)
        self.reason[mask & (self.reason == "")] = reason

    def split(self, raw: pa.Table, good: pa.Table) -> Arrivals:
        bad = self.reason != ""
        table = good.filter(pa.array(~bad)).combine_chunks()
        newest = int(pc.max(table[TIME]).as_py()) if table.num_rows else None
        return Arrivals(table, with_reasons(raw.filter(pa.array(bad)), pa.array(self.reason[bad], pa.string())), newest)


def now_us() -> int:
    """This machine's clock in microseconds since 1970 UTC."""
    return time.time_ns() // 1000


def check_columns(where: str, config: JoinConfig, stream: str | None, names: list[str]) -> None:
    """Refuse rows without the columns that the config names.

    Args:
        where: opens the message: a file.
        config: the join's.
        stream: a stream of feedback; None: the impressions.
        names: the columns that are there.

    Raises:
        DataError: a column is missing, stands twice, or has a name that the join needs for itself.
    """
    part: StreamConfig = config.impressions if stream is None else config.feedback[stream]
    key = "impressions" if stream is None else f"feedback.{stream}"
    wanted = {"time.column": part.time.column}
    if isinstance(part, ImpressionsConfig | FeedbackConfig):
        wanted["example_id"] = part.example_id
    if isinstance(part, FeedbackConfig):
        wanted["event_id"] = part.event_id
        if not isinstance(part.task, str):
            wanted["task.column"] = part.task.column
        if part.value is not None:
            wanted["value"] = part.value
    for what, name in wanted.items():
        if name not in names:
            raise DataError(f"{where}: column {name!r} ({key}.{what}) is missing{nearest(name, names)}")
    if stream is not None:
        return
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{where}: column {name!r} stands twice; keep one")
    own = {wanted["example_id"]: EXAMPLE_ID, wanted["time.column"]: TIME}
    for name in (EXAMPLE_ID, TIME, *config.tasks):
        if name in names and name not in own:
            what = "is a task, whose column the join makes" if name in config.tasks else "would stand twice"
            raise DataError(f"{where}: column {name!r} {what}; rename it in the log, or the task in the config")


def take_impressions(where: str, config: JoinConfig, raw: pa.Table, clock_us: int) -> Arrivals:
    """Impressions: ``example_id`` and ``time`` first, then every other column as it came.

    Raises:
        DataError: a column is missing or of a type that never fits.
    """
    part = config.impressions
    check_columns(where, config, None, raw.column_names)
    reasons = _Reasons(raw.num_rows)
    times = _times(where, raw, part, clock_us, reasons)
    ids = _ids(where, raw, part.example_id, reasons)
    if KIND_COLUMN in raw.column_names:
        # Nothing was shown: no feedback can come, and its absence says nothing.
        kind = raw[KIND_COLUMN].cast(pa.string())
        reasons.against(one_array(pc.fill_null(pc.not_equal(kind, "impression"), True)), "not an impression")
    others = [name for name in raw.column_names if name not in (part.example_id, part.time.column)]
    good = pa.table({EXAMPLE_ID: ids, TIME: times, **{name: raw[name] for name in others}})
    return reasons.split(raw, good.replace_schema_metadata(None))


def take_feedback(where: str, config: JoinConfig, stream: str, raw: pa.Table, clock_us: int) -> Arrivals:
    """Feedback, as `FEEDBACK`.

    Raises:
        DataError: a column is missing or of a type that never fits.
    """
    part = config.feedback[stream]
    check_columns(where, config, stream, raw.column_names)
    reasons = _Reasons(raw.num_rows)
    times = _times(where, raw, part, clock_us, reasons)
    examples = _ids(where, raw, part.example_id, reasons)
    events = one_array(raw[part.event_id])
    if not (pa.types.is_integer(events.type) or _is_text(events.type) or pa.types.is_null(events.type)):
        raise DataError(f"{where}: column {part.event_id!r} is {events.type}; event ids are integers or text")
    events = events.cast(pa.string())
    reasons.against(events.is_null(), "null event id")
    names = list(config.tasks)
    if isinstance(part.task, str):
        tasks = np.full(raw.num_rows, names.index(part.task), np.int8)
    else:
        column = one_array(raw[part.task.column])
        if not (_is_text(column.type) or pa.types.is_null(column.type)):
            raise DataError(f"{where}: column {part.task.column!r} is {column.type}; tasks are named by text")
        found = pc.index_in(column.cast(pa.string()), value_set=pa.array(names, pa.string()))
        reasons.against(found.is_null(), "unknown task")
        tasks = pc.fill_null(found, 0).to_numpy(zero_copy_only=False).astype(np.int8)
    takes = np.array([task.label != "any" for task in config.tasks.values()])[tasks]
    if part.value is None:
        values = pa.array(np.zeros(raw.num_rows))
        reasons.against(takes, "no value, which the task takes")
    else:
        try:
            values, _ = conform(part.value, raw[part.value], pa.float64())
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        usable = pc.fill_null(pc.is_finite(values), False).to_numpy(zero_copy_only=False)
        reasons.against(takes & ~usable, "value is null or not finite")
        values = pa.array(np.where(usable & takes, pc.fill_null(values, 0.0).to_numpy(zero_copy_only=False), 0.0))
    number = list(config.feedback).index(stream)
    good = pa.table(
        {
            STREAM: pa.array(np.full(raw.num_rows, number, np.int8)),
            EVENT_ID: events,
            EXAMPLE_ID: examples,
            TASK: pa.array(tasks),
            TIME: times,
            VALUE: values,
        },
        schema=FEEDBACK,
    )
    return reasons.split(raw, good)


def _is_text(type_: pa.DataType) -> bool:
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_))


def _times(where: str, raw: pa.Table, part: StreamConfig, clock_us: int, reasons: _Reasons) -> pa.Array:
    times = to_microseconds(where, raw[part.time.column], part.time)
    values: Int64 = times.fill_null(-1).to_numpy()
    reasons.against(one_array(times.is_null()), "null time")
    reasons.against(values < 0, "time cannot be read")
    reasons.against(values > clock_us + CLOCK_SLACK_US, "time in the future")
    return pa.array(values)


def _ids(where: str, raw: pa.Table, column: str, reasons: _Reasons) -> pa.Array:
    try:
        ids, misfits = conform(column, raw[column], pa.int64())
    except DataError as error:
        raise DataError(f"{where}: {str(error).split(' (for ids')[0]}") from None
    reasons.against(misfits, "example id beyond int64")
    reasons.against(ids.is_null(), "null example id")
    return pc.fill_null(ids, 0)
