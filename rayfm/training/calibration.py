"""What a learner's calibrator is fitted on: rows with labels, or counts per cell where rows have none.

Shape letters: B examples, C cells.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from rayfm.config import Config, ConfigError, DataError, nearest
from rayfm.data.batch import Batch
from rayfm.data.encode import Encoder
from rayfm.export.aggregated_sums import AggregatedSums
from rayfm.export.calibration import CalibrationSums, Fits
from rayfm.schema import Schema

MAX_CELLS = 65_536
TRAFFIC = "traffic"

_LOG = logging.getLogger(__name__)


class CountsCalibration(Config):
    """Calibrate on aggregated labels alone: how many positives each cell had in a period (SEAD section 3)."""

    by: str
    """What a cell is: ``traffic``, or a sparse feature such as the campaign, whose table has a row per cell. Ids that
    share a row share a cell."""
    counts: str | None = None
    """Parquet file of reported counts: columns ``period``, the one that ``by`` names, and one of counts for each task.
    A period's counts are read when it is predicted; without any the calibrator stays as it was. By default the
    examples' own labels are counted, hidden ones (``lost_labels``) too: for experiments."""

    def check(self, schema: Schema) -> None:
        """Refuse cells that the schema does not have.

        Raises:
            ConfigError: naming the key.
        """
        if self.by == TRAFFIC:
            return
        sparse = [feature.name for feature in schema.features if feature.kind == "sparse"]
        if self.by not in sparse:
            raise ConfigError(f"calibrate.by: {self.by!r} is no sparse feature{nearest(self.by, [TRAFFIC, *sparse])}")
        table = schema.tables[schema.feature(self.by).table_name]
        if table.id_policy != "hash":
            raise ConfigError(
                f"calibrate.by: the rows of {self.by!r} are given away as ids come, and a cell's counts would be of "
                "another id later; give it a table with id_policy: hash, or take another feature"
            )
        rows = table.rows
        if rows > MAX_CELLS:
            raise ConfigError(
                f"calibrate.by: {self.by!r} has a table of {rows} rows, and each is a cell; at most {MAX_CELLS} can be"
            )

    def cells(self, schema: Schema) -> int:
        """C."""
        return len(schema.traffics) if self.by == TRAFFIC else schema.tables[schema.feature(self.by).table_name].rows


class Calibration(Protocol):
    """Gathers a period's predictions and fits the calibrator that is published with the period."""

    def add(self, batch: Batch, logits: dict[str, Tensor], rows: Tensor, seen: Batch) -> None:
        """Add a batch.

        Args:
            batch: its examples, with all their labels.
            logits: task -> ``[B]``.
            rows: bool ``[B]``, the learner's impressions.
            seen: the same examples with the labels that the learner is trained with.
        """
        ...

    def reduce_(self) -> None:
        """Sum over all ranks (a collective call)."""
        ...

    def fit(self, before: Fits) -> Fits:
        """Task -> slope and shift."""
        ...


class RowCalibration:
    """On the labels of rows, those that the learner is trained with."""

    def __init__(self, tasks: tuple[str, ...]) -> None:
        self.sums = CalibrationSums(tasks)

    def add(self, batch: Batch, logits: dict[str, Tensor], rows: Tensor, seen: Batch) -> None:
        """As `Calibration.add`."""
        for task in self.sums.tasks:
            label, known = seen.label(task)
            self.sums.update(task, logits[task], label, known & rows, seen.weight)

    def reduce_(self) -> None:
        """As `Calibration.reduce_`."""
        self.sums.reduce_()

    def fit(self, before: Fits) -> Fits:
        """As `Calibration.fit`."""
        return self.sums.fit(before)


class CountCalibration:
    """On the counts of cells.

    Args:
        config: what a cell is.
        schema: the pipeline's schema.
        tasks: the learner's binary tasks.
        reported: this rank's share of the reported counts, ``[T, C]``; None: the examples' own labels are counted.
    """

    def __init__(
        self, config: CountsCalibration, schema: Schema, tasks: tuple[str, ...], reported: Tensor | None = None
    ) -> None:
        self.config, self.sums = config, AggregatedSums(tasks, config.cells(schema))
        self.reported = reported

    def add(self, batch: Batch, logits: dict[str, Tensor], rows: Tensor, seen: Batch) -> None:
        """As `Calibration.add`; labels are looked at only where they are to be counted."""
        cell, has_cell = self._cells(batch)
        rows = rows & has_cell
        for task in self.sums.tasks:
            self.sums.update(task, logits[task][rows], cell[rows], batch.weight[rows])
            if self.reported is None:
                label, known = batch.label(task)
                counted = rows & known
                self.sums.count(task, cell[counted], label[counted], batch.weight[counted])

    def _cells(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cell of each row ``[B]``, 0 where the row has none, and which have one."""
        if self.config.by == TRAFFIC:
            return batch.traffic, torch.ones_like(batch.traffic, dtype=torch.bool)
        assert batch.sparse is not None
        ids = batch.sparse[self.config.by]
        has_one = ids.lengths() > 0
        cell = torch.zeros_like(batch.traffic)
        cell[has_one] = ids.values()
        return cell, has_one

    def reduce_(self) -> None:
        """As `Calibration.reduce_`."""
        if self.reported is not None:
            self.sums.counts = self.reported.clone()
        self.sums.reduce_()

    def fit(self, before: Fits) -> Fits:
        """As `Calibration.fit`."""
        return self.sums.fit(before)


def reported_counts(
    config: CountsCalibration, schema: Schema, tasks: tuple[str, ...], period: str, periods: tuple[str, ...]
) -> Tensor:
    """The counts of a period from the file: float64 ``[T, C]``; zeros, and a warning, where it has none of the period.

    Args:
        config: which file, and what a cell is.
        schema: the pipeline's schema.
        tasks: T of them.
        period: whose counts.
        periods: all of the run.

    Raises:
        DataError: it cannot be read, lacks a column, has periods and none of the run's, or a count is negative or not
            finite.
    """
    path = Path(config.counts or "")
    columns = ["period", config.by, *tasks]
    try:
        fields = pq.read_schema(path)
        missing = [name for name in columns if name not in fields.names]
        if missing:
            raise DataError(f"{path}: column {missing[0]!r} is missing; the file of counts has {', '.join(columns)}")
        kind = fields.field("period").type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DataError(
                f"{path}: column 'period' is {kind}; write the periods as the run names them, as strings: {period!r}"
            )
        table = pq.read_table(path, columns=columns, filters=[("period", "==", period)])
        if table.num_rows == 0:
            _none_of_period(path, period, periods)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: cannot read the counts ({error}); check calibrate.counts") from None
    counts = np.zeros((len(tasks), config.cells(schema)))
    keys = table[config.by].combine_chunks()
    if config.by == TRAFFIC:
        cells = pc.index_in(keys.cast(pa.string()), value_set=pa.array(schema.traffics, pa.string()))
        if cells.null_count:
            unknown = keys.filter(cells.is_null())[0]
            raise DataError(
                f"{path}: traffic {unknown} is not in the schema{nearest(str(unknown), [*schema.traffics])}"
            )
        cell = cells.to_numpy(zero_copy_only=False).astype(np.int64)
    else:
        feature = schema.feature(config.by)
        typed = keys.cast(pa.string() if feature.id_type == "string" else pa.int64())
        cell = Encoder(schema, (config.by,), labels=False).table_rows_of(feature, typed)
    for position, task in enumerate(tasks):
        value = table[task].cast(pa.float64()).to_numpy()
        if not np.isfinite(value).all() or (value < 0).any():
            raise DataError(f"{path}: period {period}: a count of task {task!r} is negative or no number")
        np.add.at(counts[position], cell, value)
    return torch.from_numpy(counts)


def _none_of_period(path: Path, period: str, periods: tuple[str, ...]) -> None:
    found = sorted(name for name in pc.unique(pq.read_table(path, columns=["period"])["period"]).to_pylist() if name)
    span = f"{found[0]} .. {found[-1]}" if found else "none"
    if found and not set(found) & set(periods):
        raise DataError(
            f"{path}: none of its periods ({span}) is one of the run's ({periods[0]} .. {periods[-1]}); write them as "
            "the run names them, or leave out calibrate.counts"
        )
    _LOG.warning(
        "%s: no counts of period %s (its periods: %s); the calibrator stays as it was before the period, and counts "
        "that come later are not used",
        path,
        period,
        span,
    )


def start_calibrations(
    asked: Mapping[str, tuple[bool | CountsCalibration, tuple[str, ...]]],
    schema: Schema,
    period: str,
    periods: tuple[str, ...],
    rank: int,
) -> dict[str, Calibration]:
    """What gathers a period's predictions, for each learner that has a calibrator.

    A file of counts is read by rank 0 alone, once for all learners: the sum over ranks brings it to the others.

    Args:
        asked: learner -> its ``calibrate`` and its binary tasks.
        schema: the pipeline's schema.
        period: the period that is predicted.
        periods: all of the run.
        rank: this one.

    Raises:
        DataError: as `reported_counts`.
    """
    read: dict[tuple[CountsCalibration, tuple[str, ...]], Tensor] = {}
    found: dict[str, Calibration] = {}
    for key, (calibrate, tasks) in asked.items():
        if isinstance(calibrate, CountsCalibration):
            reported = None
            if calibrate.counts is not None and rank > 0:
                reported = torch.zeros(len(tasks), calibrate.cells(schema), dtype=torch.float64)
            elif calibrate.counts is not None:
                if (calibrate, tasks) not in read:
                    read[calibrate, tasks] = reported_counts(calibrate, schema, tasks, period, periods)
                reported = read[calibrate, tasks]
            found[key] = CountCalibration(calibrate, schema, tasks, reported)
        elif calibrate:
            found[key] = RowCalibration(tasks)
    return found
