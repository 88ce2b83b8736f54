"""KuaiRand-Pure: exposures of a short-video app with five kinds of feedback, features and users' earlier videos."""

from __future__ import annotations

import datetime
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from rayfm.config import ConfigError, DataError, nearest
from rayfm.data.sources import kuairand_files as files
from rayfm.data.sources.base import SOURCES, Period, Source, SourceConfig, task_numbers
from rayfm.data.sources.kuairand_examples import (
    LOG_FEATURES,
    SEQUENCES,
    TASKS,
    USER_COLUMNS,
    VIDEO_COLUMNS,
    ExampleBuilder,
    build_buckets,
)
from rayfm.schema import Schema

if TYPE_CHECKING:
    import ray.data

Int64 = npt.NDArray[np.int64]

HISTORY_ENDS = 20220425
"""The history file covers the days before this date."""

DAY_START = datetime.timedelta(hours=8, minutes=8)
"""The log's ``date`` turns at 23:52 of UTC+8: every day's last row lies within seconds before it."""

DAY_MS = 86_400_000
MAX_MISDATED = 0.05
"""Share of rows whose ``date`` may differ from the day that their ``time_ms`` falls in (0.6 % in the official log)."""

BUCKET_ROWS = 131_072
"""Rows of the log that a task holds, about."""


class KuaiRandConfig(SourceConfig):
    """KuaiRand-Pure under its official file names."""

    type: Literal["kuairand"] = "kuairand"
    path: str
    """Folder with log_standard_*_pure, user_features_pure and video_features_basic_pure, each .csv or .parquet."""

    feedback_delay: float = Field(60.0, ge=0)
    """Seconds until a row's feedback may enter the user's sequences."""

    start: datetime.date | None = None
    """First day; by default the log's first."""

    end: datetime.date | None = None
    """Last day (included); by default the log's last."""

    random_exposures: bool = False
    """Whether to add the random-exposure log."""


@SOURCES.register("kuairand")
class KuaiRandSource(Source):
    """Days of KuaiRand-Pure. The surface (``tab``) is the traffic; the official log's exact duplicates are kept.

    ``example_id`` is ``log file << 40 | row``. A day is a period of 24 hours from 23:52 of the day before, UTC+8, as in
    the log's ``date`` column; rows fall into it by ``time_ms``.
    """

    Config = KuaiRandConfig
    has_requests = False

    def __init__(self, config: KuaiRandConfig, schema: Schema) -> None:
        super().__init__(config, schema)
        self._kuairand = config
        self._folder = Path(config.path).expanduser().absolute()
        known = [*LOG_FEATURES, *USER_COLUMNS, *VIDEO_COLUMNS, *SEQUENCES]
        for feature in schema.features:
            if feature.name not in known:
                raise ConfigError(f"kuairand has no feature {feature.name!r}{nearest(feature.name, known)}")
        for task in schema.tasks:
            if task.name not in TASKS:
                raise ConfigError(f"kuairand has no task {task.name!r}{nearest(task.name, list(TASKS))}")

    @functools.cached_property
    def _logs(self) -> list[files.LogFile]:
        return files.find_logs(self._folder, self._kuairand.random_exposures)

    @functools.cached_property
    def _days(self) -> dict[int, tuple[int, int]]:
        """Day number -> first and last time_ms of its rows, over all logs.

        Raises:
            DataError: ``date`` and ``time_ms`` disagree.
        """
        days: dict[int, tuple[int, int]] = {}
        rows = misdated = 0
        for log in self._logs:
            for table in files.read_batches(log.path, ["date", "time_ms"]):
                table = table.drop_null()
                dates, times = table["date"].to_numpy(), table["time_ms"].to_numpy()
                numbers = day_numbers(dates)
                off = np.abs(numbers - (times + _shift_ms()) // DAY_MS)
                rows += len(times)
                misdated += int((off > 0).sum())
                numbers, times = numbers[off <= 1], times[off <= 1]
                if not len(times):
                    continue
                order = np.argsort(numbers, kind="stable")
                numbers, times = numbers[order], times[order]
                unique, starts = np.unique(numbers, return_index=True)
                lows, highs = np.minimum.reduceat(times, starts), np.maximum.reduceat(times, starts)
                for day, low, high in zip(unique.tolist(), lows.tolist(), highs.tolist(), strict=True):
                    known = days.get(day, (low, high))
                    days[day] = min(known[0], low), max(known[1], high)
        if misdated > max(MAX_MISDATED * rows, 1):
            raise DataError(
                f"{self._folder}: {misdated} of {rows} rows have a time_ms that is not on their date; "
                "expected date as YYYYMMDD in UTC+8 and time_ms in milliseconds since 1970 UTC"
            )
        if not days:
            raise DataError(f"{self._folder}: the logs have no rows with a date and a time_ms")
        return days

    def periods(self) -> list[Period]:
        config = self._kuairand
        days = self._days
        first, last = min(days), max(days)
        chosen = [
            day
            for day in range(first, last + 1)
            if (config.start is None or day >= _number(config.start))
            and (config.end is None or day <= _number(config.end))
        ]
        if not chosen:
            raise DataError(
                f"{self._folder}: the log has {_name(first)} to {_name(last)}, none of it between start and end"
            )
        periods = []
        for day in chosen:
            start, end = day * DAY_MS - _shift_ms(), (day + 1) * DAY_MS - _shift_ms()
            # The log was cut by date: what strays over its ends still belongs to its first and last day.
            start = min(start, days[day][0]) if day == first else start
            end = max(end, days[day][1] + 1) if day == last else end
            periods.append(Period(name=_name(day), start=_instant(start), end=_instant(end)))
        return periods

    def estimated_rows(self) -> int:
        return sum(files.guess_rows(log.path) for log in self._logs)

    def dataset(self, periods: list[Period]) -> ray.data.Dataset:
        buckets = max(1, -(-self.estimated_rows() // BUCKET_ROWS))
        build = functools.partial(build_buckets, builder=self.builder(periods, buckets))
        return task_numbers(buckets).map_batches(
            build, batch_size=None, batch_format="pyarrow", num_cpus=self.cpus_per_task
        )

    def builder(self, periods: list[Period], buckets: int) -> ExampleBuilder:
        """What builds the examples of ``periods`` from each of ``buckets`` groups of users."""
        days = self._days.values()
        return ExampleBuilder(
            schema=self.schema,
            folder=self._folder,
            logs=tuple(self._logs),
            history=self._history(),
            delay_ms=round(self._kuairand.feedback_delay * 1000),
            buckets=buckets,
            spans=tuple((period.start_us // 1000, period.end_us // 1000) for period in periods),
            log_span=(min(low for low, _ in days), max(high for _, high in days) + 1),
        )

    def _history(self) -> Path | None:
        """The history file, which stands in for the log before 25 April; without need where the log goes further."""
        return files.find(self._folder, files.HISTORY) if min(self._days) >= day_numbers(HISTORY_ENDS) else None


def _shift_ms() -> int:
    return round(DAY_START.total_seconds() * 1000)


def day_numbers(dates: Int64 | int) -> Int64:
    """Days since 1970 of dates written as YYYYMMDD."""
    dates = np.asarray(dates, np.int64)
    months = (dates // 10_000 - 1970) * 12 + dates // 100 % 100 - 1
    return months.astype("datetime64[M]").astype("datetime64[D]").astype(np.int64) + dates % 100 - 1


def _number(day: datetime.date) -> int:
    return (day - datetime.date(1970, 1, 1)).days


def _name(day: int) -> str:
    return (datetime.date(1970, 1, 1) + datetime.timedelta(days=day)).isoformat()


def _instant(milliseconds: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(0, datetime.UTC) + datetime.timedelta(milliseconds=milliseconds)
