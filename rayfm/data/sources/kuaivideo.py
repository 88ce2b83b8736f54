"""KuaiVideo_x1: a short-video app's exposures with clicks, likes and follows, and visual features."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from rayfm.config import DataError
from rayfm.data.sources import kuaivideo_examples as examples
from rayfm.data.sources.base import SOURCES, Period, SourceConfig
from rayfm.data.sources.buckets import BucketedSource, Build, Part, Run
from rayfm.data.sources.days import DAY_US, HOUR_US, Days, usable
from rayfm.data.sources.fields import check_schema
from rayfm.data.sources.tables import TablePart, find_table, split_file
from rayfm.data.sources.vectors import Vectors, find_vectors
from rayfm.schema import Schema

ADVICE = "download and unpack KuaiVideo_x1 (huggingface.co/datasets/reczoo), and point the source's path at it"
LOGS = ("train", "test")
COLUMNS = {
    "timestamp": pa.int64(),
    "user_id": pa.int64(),
    "item_id": pa.int64(),
    "is_click": pa.int64(),
    "is_like": pa.int64(),
    "is_follow": pa.int64(),
}
LISTS = {name: pa.list_(pa.int64()) for name in examples.PUBLISHED}

BUCKET_ROWS = 131_072
"""Rows that a task holds, about."""

MAX_DAYS = 1000
"""More days than that are a wrong unit, not a log."""


class KuaiVideoConfig(SourceConfig):
    """KuaiVideo_x1 under its file names."""

    type: Literal["kuaivideo"] = "kuaivideo"
    path: str
    """Folder with train and test, each .csv, .csv.gz or .parquet; and item_visual_emb_dim64 and user_visual_emb_dim64,
    each .h5 (which needs h5py) or .npy, where the schema asks for them."""

    feedback_delay: float = Field(60.0, ge=0)
    """Seconds until a row's feedback may enter the user's sequences; not those that the files bring."""

    time_unit: Literal["s", "ms"] = "ms"
    """Of ``timestamp``."""


@SOURCES.register("kuaivideo")
class KuaiVideoSource(BucketedSource):
    """KuaiVideo_x1, the form in which FuxiCTR and BARS publish the data of Kuaishou's China MM 2018 challenge.

    Read are the files that RecZoo's ``convert_kuaivideo_x1.py`` writes from ALPINE's (Li et al., MM 2019): train.csv
    and test.csv with timestamp, user_id, item_id, is_click, is_like, is_follow, pos_items and neg_items (``1^2^3``),
    and visual features in HDF5 with ``key`` (the id) and ``value``. The challenge's own files (train_interaction.txt
    and the like) are not read.

    Both files make one log, in the order of time; the published split is not kept. ``example_id`` is the file (train 0,
    test 1) and its row. The timestamps were shifted before publication, so neither the date nor the hour is known: a
    period is 24 hours from the hour of the first row on, named by its day on the shifted clock.

    ``pos_items`` and ``neg_items`` are as published: the conversion keeps a user's first 100, not the newest, and which
    events count as earlier was decided elsewhere. ``clicked``, ``not_clicked``, ``liked`` and ``followed`` are built
    here from rows of both files with ``t < timestamp - feedback_delay``.
    """

    Config = KuaiVideoConfig

    def __init__(self, config: KuaiVideoConfig, schema: Schema) -> None:
        super().__init__(config, schema)
        self._kuaivideo = config
        self._folder = Path(config.path).expanduser().absolute()
        check_schema("kuaivideo", schema, examples.FIELDS, dict.fromkeys(examples.TASKS, "binary"))

    @functools.cached_property
    def _parts(self) -> list[TablePart]:
        names = {feature.name for feature in self.schema.features}
        columns = {**COLUMNS, **{name: type_ for name, type_ in LISTS.items() if name in names}}
        parts = []
        for position, stem in enumerate(LOGS):
            parts += split_file("log", find_table(self._folder, stem, ADVICE), position, columns, "user_id")
        return parts

    @functools.cached_property
    def _scan(self) -> tuple[Days, set[int], int]:
        """How the log divides into days, the numbers of those with rows, and how many rows there are."""
        hours: set[int] = set()
        rows = 0
        for part in self._parts:
            for table in part.select("timestamp").tables():
                rows += table.num_rows
                times = examples.microseconds(table["timestamp"], self._kuaivideo.time_unit).fill_null(-1).to_numpy()
                hours.update(np.unique(times[usable(times)] // HOUR_US).tolist())
        if not hours:
            raise DataError(f"{self._folder}: no row of train and test has a timestamp; {ADVICE}")
        days = Days(origin_us=min(hours) * HOUR_US)
        span = (max(hours) - min(hours)) * HOUR_US // DAY_US + 1
        if span > MAX_DAYS:
            raise DataError(
                f"{self._folder}: the timestamps span {span} days in the unit {self._kuaivideo.time_unit!r}; set the "
                "source's time_unit, or correct the rows"
            )
        numbers = days.numbers(np.array(sorted(hours), np.int64) * HOUR_US)
        return days, set(numbers.tolist()), rows

    def periods(self) -> list[Period]:
        days, numbers, _ = self._scan
        return days.periods(numbers)

    def estimated_rows(self) -> int:
        return self._scan[2]

    def parts(self) -> list[Part]:
        for stem in self._vector_stems.values():
            find_vectors(self._folder, stem, ADVICE)  # before the work begins
        return [*self._parts]

    @property
    def _vector_stems(self) -> dict[str, str]:
        """Files of vectors that the schema needs, by the id that they belong to."""
        wanted = {examples.vector_of(feature.name) for feature in self.schema.features} - {None}
        return {key: f"{key}_visual_emb_dim{examples.DIM}" for key, _ in sorted(filter(None, wanted))}

    def buckets(self) -> int:
        return max(1, -(-self._scan[2] // BUCKET_ROWS))

    def builder(self, periods: list[Period], runs: list[Run], folder: Path) -> Build:
        vectors = {}
        for key, stem in self._vector_stems.items():
            path = find_vectors(self._folder, stem, ADVICE)
            vectors[key] = Vectors.open(path, folder)
            if vectors[key].dim != examples.DIM:
                raise DataError(
                    f"{path}: vectors of {vectors[key].dim} dimensions, {examples.DIM} are wanted; {ADVICE}"
                )
        return examples.ExampleBuilder(
            schema=self.schema,
            runs=tuple(runs),
            vectors=vectors,
            delay_ms=round(self._kuaivideo.feedback_delay * 1000),
            time_unit=self._kuaivideo.time_unit,
            spans=tuple((period.start_us, period.end_us) for period in periods),
        )
