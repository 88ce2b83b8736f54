"""Times as logs write them, to microseconds since 1970 UTC."""

from __future__ import annotations

import datetime
from typing import Literal

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from rayfm.config import Config, DataError

MICROSECONDS = {"s": 1_000_000, "ms": 1_000, "us": 1}

LAST_TIME = 4_102_444_800_000_000
"""2100-01-01 in microseconds: a later time is a bad value, not a period of its own."""


class TimeColumn(Config):
    """Where an example's time stands."""

    column: str = "time"
    unit: Literal["s", "ms", "us", "iso"] = "us"
    """Seconds, milliseconds or microseconds since 1970 UTC, or ISO 8601 text; Arrow timestamps need no unit."""


def utc(time: datetime.datetime) -> datetime.datetime:
    """A time without a zone is taken as UTC."""
    return time.replace(tzinfo=datetime.UTC) if time.tzinfo is None else time.astimezone(datetime.UTC)


def microseconds(time: datetime.datetime) -> int:
    """Microseconds since 1970 UTC."""
    return round(utc(time).timestamp() * 1e6)


def to_microseconds(path: str, column: pa.ChunkedArray, time: TimeColumn) -> pa.ChunkedArray:
    """Times in microseconds since 1970 UTC (int64); what does not fit an int64 or is no ISO time becomes -1.

    Raises:
        DataError: the column is of no type that a time can have.
    """
    found = column.type
    if pa.types.is_timestamp(found) or pa.types.is_date(found):
        return column.cast(pa.timestamp("us", getattr(found, "tz", None)), safe=False).cast(pa.int64())
    if pa.types.is_null(found):
        return column.cast(pa.int64())
    if time.unit == "iso":
        if not (pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_dictionary(found)):
            raise DataError(f"{path}: time column {time.column!r} is {found}, unit 'iso' wants string or a timestamp")
        parsed = pd.to_datetime(column.cast(pa.string()).to_pandas(), errors="coerce", utc=True, format="ISO8601")
        micro = pa.chunked_array([pa.array(parsed).cast(pa.timestamp("us", "UTC"), safe=False).cast(pa.int64())])
        malformed = pa.array(column.is_valid().to_numpy() & micro.is_null().to_numpy())
        return pc.if_else(malformed, pa.scalar(-1, pa.int64()), micro)
    if not pa.types.is_integer(found):
        raise DataError(
            f"{path}: time column {time.column!r} is {found}, unit {time.unit!r} wants int64 (or give a timestamp, or "
            "ISO text with unit 'iso')"
        )
    if found == pa.uint64():
        column = pc.min_element_wise(column, pa.scalar(2**63 - 1, pa.uint64()))
    column = column.cast(pa.int64())
    limit = LAST_TIME // MICROSECONDS[time.unit]
    usable = pc.and_(pc.greater_equal(column, 0), pc.less_equal(column, limit))
    return pc.multiply(pc.if_else(usable, column, pa.scalar(-1, pa.int64())), MICROSECONDS[time.unit])
