"""Ad Display/Click Data on Taobao.com (Alimama): ad impressions with users' shopping behaviour of the weeks before."""

from __future__ import annotations

import datetime
import functools
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from rayfm.config import ConfigError, DataError
from rayfm.data.sources import taobao_ad_examples as examples
from rayfm.data.sources.base import SOURCES, Period, SourceConfig
from rayfm.data.sources.buckets import BucketedSource, Build, Part, Run
from rayfm.data.sources.days import HOUR_US, Days, usable
from rayfm.data.sources.fields import check_schema
from rayfm.data.sources.tables import find_table, guess_rows, split_file
from rayfm.schema import Schema

ADVICE = (
    "download and unpack raw_sample, ad_feature, user_profile and behavior_log of data set 56 of Tianchi (Ad "
    "Display/Click Data on Taobao.com), and point the source's path at them"
)
SAMPLES, ADS, USERS, BEHAVIOURS = "raw_sample", "ad_feature", "user_profile", "behavior_log"

DAYS = Days(zone_us=8 * HOUR_US)
"""A day is one of UTC+8."""

SAMPLE_COLUMNS = {
    "user": pa.int64(),
    "time_stamp": pa.int64(),
    "adgroup_id": pa.int64(),
    "pid": pa.string(),
    "clk": pa.int64(),
}
BEHAVIOUR_COLUMNS = {
    "user": pa.int64(),
    "time_stamp": pa.int64(),
    "btag": pa.string(),
    "cate": pa.int64(),
    "brand": pa.int64(),
}
SAMPLE_ROW_BYTES, BEHAVIOUR_ROW_BYTES = 40, 32
"""Bytes of a CSV line, to guess the rows."""

BUCKET_SAMPLES, BUCKET_BEHAVIOURS = 131_072, 4_000_000
"""Rows that a task holds, about: some 0.5 GB."""


class TaobaoAdConfig(SourceConfig):
    """Ad Display/Click Data on Taobao.com under its official file names."""

    type: Literal["taobao_ad"] = "taobao_ad"
    path: str
    """Folder with raw_sample, ad_feature, user_profile and behavior_log, each .csv, .csv.gz or .parquet. The last three
    are read only where the schema asks for what they have."""

    feedback_delay: float = Field(60.0, ge=0)
    """Seconds until a behaviour may enter the user's sequences."""

    outcome_window: float = Field(86_400.0, gt=0)
    """Seconds after an impression in which a behaviour counts for the tasks cart, fav and buy."""

    start: datetime.date | None = None
    """First day; by default the log's first."""

    end: datetime.date | None = None
    """Last day (included); by default the log's last."""


@SOURCES.register("taobao_ad")
class TaobaoAdSource(BucketedSource):
    """Days (UTC+8) of Taobao's display ads: 26 million impressions of 8 days, 700 million behaviours of 22.

    The scenario (``pid``) is the traffic; ``example_id`` is the row of raw_sample. Tasks: ``click``; and ``cart``,
    ``fav``, ``buy``: whether the user did that to the ad's category and brand within ``outcome_window`` after the
    impression (unknown where the window ends after the log's last impression). Sequences hold categories and brands of
    behaviours with ``t < impression - feedback_delay``; a behaviour without one of the two has 0 in its place.

    The files are Tianchi's data set 56; the columns, the trailing space in ``new_user_class_level `` and ``NULL`` for a
    missing brand are as published there. ``ipv``, which its description writes for ``pv``, is read as ``pv``.
    """

    Config = TaobaoAdConfig

    def __init__(self, config: TaobaoAdConfig, schema: Schema) -> None:
        super().__init__(config, schema)
        self._taobao = config
        self._folder = Path(config.path).expanduser().absolute()
        check_schema("taobao_ad", schema, examples.FIELDS, dict.fromkeys(examples.TASKS, "binary"))
        if config.start is not None and config.end is not None and config.start > config.end:
            raise ConfigError(f"taobao_ad: start {config.start} is after end {config.end}")

    @property
    def _behaviours(self) -> tuple[str, ...]:
        """Columns of the behaviour log that the schema needs."""
        return examples.behaviour_columns(self.schema)

    @functools.cached_property
    def _parts(self) -> list[Part]:
        parts: list[Part] = [*split_file(SAMPLES, self._find(SAMPLES), 0, SAMPLE_COLUMNS, "user")]
        if self._behaviours:
            columns = {name: type_ for name, type_ in BEHAVIOUR_COLUMNS.items() if name in self._behaviours}
            parts += split_file(BEHAVIOURS, self._find(BEHAVIOURS), 0, columns, "user")
        return parts

    def _find(self, stem: str) -> Path:
        return find_table(self._folder, stem, ADVICE)

    @functools.cached_property
    def _occupied(self) -> tuple[set[int], int]:
        """Numbers of the days that have impressions, and the last impression's time in microseconds."""
        path = self._find(SAMPLES)
        numbers: set[int] = set()
        last = -1
        for part in split_file(SAMPLES, path, 0, {"time_stamp": pa.int64()}, "time_stamp"):
            for table in part.tables():
                times = examples.microseconds(table["time_stamp"]).fill_null(-1).to_numpy()
                times = times[usable(times)]
                numbers.update(np.unique(DAYS.numbers(times)).tolist())
                last = max(last, int(times.max(initial=-1)))
        if not numbers:
            raise DataError(f"{path}: no row has a time_stamp in seconds since 1970 UTC; {ADVICE}")
        return numbers, last

    def periods(self) -> list[Period]:
        numbers, _ = self._occupied
        periods = DAYS.periods(numbers, self._taobao.start, self._taobao.end)
        if not periods:
            every = DAYS.periods(numbers)
            raise DataError(
                f"{self._folder}: the log has {every[0].name} to {every[-1].name}, none of it between start and end"
            )
        return periods

    def estimated_rows(self) -> int:
        return guess_rows(self._find(SAMPLES), SAMPLE_ROW_BYTES)

    def parts(self) -> list[Part]:
        return self._parts

    def buckets(self) -> int:
        buckets = -(-self.estimated_rows() // BUCKET_SAMPLES)
        if self._behaviours:
            behaviours = guess_rows(self._find(BEHAVIOURS), BEHAVIOUR_ROW_BYTES)
            buckets = max(buckets, -(-behaviours // BUCKET_BEHAVIOURS))
        return max(1, buckets)

    def builder(self, periods: list[Period], runs: list[Run], folder: Path) -> Build:
        names = {feature.name for feature in self.schema.features}
        needs_ads = bool(names & set(examples.AD_FIELDS)) or examples.outcomes(self.schema)
        return examples.ExampleBuilder(
            schema=self.schema,
            runs=tuple(runs),
            ads=self._find(ADS) if needs_ads else None,
            users=self._find(USERS) if names & set(examples.USER_FIELDS) else None,
            delay_ms=round(self._taobao.feedback_delay * 1000),
            window_ms=round(self._taobao.outcome_window * 1000),
            last_ms=self._occupied[1] // 1000,
            spans=tuple((period.start_us, period.end_us) for period in periods),
        )
