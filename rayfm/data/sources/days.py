"""Periods of whole days, in the time zone of a log."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayfm.data.sources.base import Period
from rayfm.data.sources.times import LAST_TIME

DAY_US = 86_400_000_000
HOUR_US = 3_600_000_000
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


def usable(times: Int64) -> Bool:
    """Which times (microseconds since 1970 UTC, ``[N]``) can be a log's."""
    return (times >= 0) & (times < LAST_TIME)


@dataclasses.dataclass(frozen=True)
class Days:
    """Divides time into periods of ``length`` days of 24 hours."""

    zone_us: int = 0
    """Microseconds that the log's midnight lies before that of UTC: 8 hours for UTC+8."""
    length: int = 1
    origin_us: int | None = None
    """Where a period begins, in microseconds since 1970 UTC; by default at midnight of 1970-01-01 in the log's zone."""

    @property
    def _origin(self) -> int:
        return -self.zone_us if self.origin_us is None else self.origin_us

    def numbers(self, times: Int64) -> Int64:
        """Number of the period that each usable time falls into: ``[N] -> [N]``."""
        return (times - self._origin) // (self.length * DAY_US)

    def periods(
        self, numbers: Iterable[int], start: datetime.date | None = None, end: datetime.date | None = None
    ) -> list[Period]:
        """The periods of ``numbers``, cut to the days from ``start`` to ``end`` (both included) of the log's zone.

        A period is named by the day, in the log's zone, that it would begin on uncut.
        """
        low = None if start is None else _days(start) * DAY_US - self.zone_us
        high = None if end is None else (_days(end) + 1) * DAY_US - self.zone_us
        periods = []
        for number in sorted(set(numbers)):
            first = self._origin + number * self.length * DAY_US
            last = first + self.length * DAY_US
            name = (_instant(first) + datetime.timedelta(microseconds=self.zone_us)).strftime("%Y-%m-%d")
            first = first if low is None else max(first, low)
            last = last if high is None else min(last, high)
            if first < last:
                periods.append(Period(name=name, start=_instant(first), end=_instant(last)))
        return periods


def rows_of(times: pa.ChunkedArray, periods: Sequence[tuple[int, int]]) -> Int64:
    """Rows to hand on to prepare: those of the periods, and those without a usable time, which it rejects.

    Args:
        times: microseconds since 1970 UTC, null where missing ``[N]``.
        periods: ``[start, end)`` in the same unit.
    """
    values: Int64 = times.fill_null(-1).to_numpy()
    wanted = ~usable(values)
    for start, end in periods:
        wanted |= (values >= start) & (values < end)
    return np.flatnonzero(wanted)


def _days(day: datetime.date) -> int:
    return (day - datetime.date(1970, 1, 1)).days


def _instant(microseconds: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(0, datetime.UTC) + datetime.timedelta(microseconds=microseconds)
