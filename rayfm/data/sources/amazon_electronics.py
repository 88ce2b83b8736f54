"""Amazon reviews of Electronics, as click-through prediction: which item does a user review next?"""

from __future__ import annotations

import datetime
import functools
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from rayfm.config import ConfigError, DataError
from rayfm.data.sources import amazon_examples as examples
from rayfm.data.sources.amazon_items import Items, read_categories
from rayfm.data.sources.base import SOURCES, Period, SourceConfig
from rayfm.data.sources.buckets import BucketedSource, Build, Part, Run
from rayfm.data.sources.days import Days, usable
from rayfm.data.sources.fields import check_schema
from rayfm.data.sources.records import RecordPart, find_records, split_records
from rayfm.schema import Schema

ADVICE = (
    "download the Electronics reviews (5-core, or all with five_core: false) and their metadata from Amazon's review "
    "data of 2014 or 2018, and point the source's path at them"
)
FIVE_CORE, ALL_REVIEWS = ("reviews_Electronics_5", "Electronics_5"), ("reviews_Electronics", "Electronics")
META = ("meta_Electronics",)

REVIEW_COLUMNS = {
    "reviewerID": pa.string(),
    "asin": pa.string(),
    "overall": pa.float64(),
    "unixReviewTime": pa.int64(),
}
BUCKET_ROWS = 262_144
"""Reviews that a task holds, about."""


class AmazonElectronicsConfig(SourceConfig):
    """Amazon's Electronics reviews and metadata under their official file names."""

    type: Literal["amazon_electronics"] = "amazon_electronics"
    path: str
    """Folder with reviews_Electronics_5 (of 2014) or Electronics_5 (of 2018), and meta_Electronics, each .json or
    .json.gz. The metadata are read only where the schema asks for categories."""

    five_core: bool = True
    """Whether to read the 5-core reviews; else all of them: reviews_Electronics or Electronics."""

    seed: int = Field(0, ge=0)
    """Chooses the negative items."""

    min_history: int = Field(1, ge=0)
    """Earlier reviews that a user must have for a review to become an example; 1 as in DIN's set-up."""

    feedback_delay: float = Field(0.0, ge=0)
    """Seconds until a review may enter the user's sequences."""

    period_days: int = Field(1, gt=0)
    """Days of a period. The reviews span 15 years or more, so that single days make thousands of periods."""

    start: datetime.date | None = None
    """First day (UTC); by default that of the first review."""

    end: datetime.date | None = None
    """Last day (UTC, included); by default that of the last review."""


@SOURCES.register("amazon_electronics")
class AmazonElectronicsSource(BucketedSource):
    """Amazon reviews as click-through prediction, in the set-up of DIN (Zhou et al., KDD 2018, section 6.1).

    A review is a positive (``click`` 1, ``overall`` its rating); with it comes one negative of the same user and time
    (``click`` 0, ``overall`` unknown): an item drawn uniformly, by a hash of seed and row, from all items of the review
    file that the user never reviews in it. As in the field's set-up the draw knows the whole file: it shuns what the
    user reviews later, and may take what nobody has reviewed yet.

    Sequences hold the items, and their categories, of the user's reviews with ``t < time - feedback_delay``. Review
    times are whole days, so reviews of one day do not see one another; the field's files, which order them by their
    place in the file, let them. An item's category is the last of its last category path; ``unknown`` where it has
    none. Ids are text.

    ``example_id`` is the row of the review, and of its negative ``1 << 40 | row``. A day is one of UTC. Files of 2014
    and of 2018 are read, records as JSON or as Python literals.
    """

    Config = AmazonElectronicsConfig

    def __init__(self, config: AmazonElectronicsConfig, schema: Schema) -> None:
        super().__init__(config, schema)
        self._amazon = config
        self._folder = Path(config.path).expanduser().absolute()
        check_schema("amazon_electronics", schema, examples.FIELDS, examples.TASKS)
        if config.start is not None and config.end is not None and config.start > config.end:
            raise ConfigError(f"amazon_electronics: start {config.start} is after end {config.end}")

    @property
    def _days(self) -> Days:
        return Days(length=self._amazon.period_days)

    @functools.cached_property
    def _reviews(self) -> list[RecordPart]:
        path = find_records(self._folder, FIVE_CORE if self._amazon.five_core else ALL_REVIEWS, ADVICE)
        return split_records("reviews", path, REVIEW_COLUMNS, "reviewerID")

    @functools.cached_property
    def _scan(self) -> tuple[set[int], pa.Array, int]:
        """Numbers of the periods with reviews, all items rising, and how many reviews there are."""
        numbers: set[int] = set()
        asins = pa.array([], pa.string())
        rows = 0
        for part in self._reviews:
            for table in part.select("asin", "unixReviewTime").tables():
                rows += table.num_rows
                times = examples.microseconds(table["unixReviewTime"]).fill_null(-1).to_numpy()
                numbers.update(np.unique(self._days.numbers(times[usable(times)])).tolist())
                seen = pc.drop_null(pc.unique(table["asin"]))
                asins = pc.unique(pa.concat_arrays([asins, seen]))
        if not numbers:
            raise DataError(f"{self._reviews[0].path}: no record has a unixReviewTime in seconds since 1970; {ADVICE}")
        return numbers, asins.take(pc.array_sort_indices(asins)), rows

    def periods(self) -> list[Period]:
        numbers, _, _ = self._scan
        periods = self._days.periods(numbers, self._amazon.start, self._amazon.end)
        if not periods:
            every = self._days.periods(numbers)
            raise DataError(
                f"{self._folder}: the reviews go from {every[0].name} to {every[-1].name}, none of that lies between "
                "start and end"
            )
        return periods

    def estimated_rows(self) -> int:
        return 2 * self._scan[2]

    def parts(self) -> list[Part]:
        if examples.needs_categories(self.schema):
            find_records(self._folder, META, ADVICE)  # before the work begins
        return [*self._reviews]

    def buckets(self) -> int:
        return max(1, -(-self._scan[2] // BUCKET_ROWS))

    def builder(self, periods: list[Period], runs: list[Run], folder: Path) -> Build:
        asins = self._scan[1]
        categories = None
        if examples.needs_categories(self.schema):
            categories = read_categories(find_records(self._folder, META, ADVICE), asins)
        return examples.ExampleBuilder(
            schema=self.schema,
            runs=tuple(runs),
            items=Items(asins, categories).write(folder),
            seed=self._amazon.seed,
            min_history=self._amazon.min_history,
            delay_ms=round(self._amazon.feedback_delay * 1000),
            spans=tuple((period.start_us, period.end_us) for period in periods),
        )
