"""Plain Parquet logs: any pyarrow filesystem, one mapping from the files' columns to the schema's."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs as pafs
from pydantic import model_validator

from rayfm.config import Config, DataError, nearest
from rayfm.data.conform import conform
from rayfm.data.sources.base import KIND_COLUMN, SOURCES, TRUTH_PREFIX, Period, Source, SourceConfig, task_numbers
from rayfm.data.sources.files import list_files, open_parquet, parquet_errors
from rayfm.data.sources.times import LAST_TIME, TimeColumn, microseconds, to_microseconds, utc
from rayfm.data.store import period_name
from rayfm.schema import (
    EXAMPLE_ID,
    LOGGED_PREFIX,
    RESERVED_COLUMNS,
    TIME,
    TRAFFIC,
    Kind,
    Schema,
)

if TYPE_CHECKING:
    import ray.data

LENGTHS = {"1d": datetime.timedelta(days=1), "1h": datetime.timedelta(hours=1)}
UNIT_ROWS = 262_144
"""Rows that a task reads, in whole row groups."""

BLOCK_ROWS = 65_536
FILE_SHIFT = 40


class FromColumn(Config):
    """A value that a column of the log holds."""

    column: str


class ParquetConfig(SourceConfig):
    """Logs as Parquet files."""

    type: Literal["parquet"] = "parquet"
    path: str
    """A file, a folder (read with its sub-folders) or a glob; local, or a pyarrow URI such as s3://bucket/logs/*."""

    columns: dict[str, str] = {}
    """Schema column -> source column, for those whose names differ."""

    example_id: str | None = None
    """Column of the example id; without one, an id is made of the file's position and the row number."""

    time: TimeColumn = TimeColumn()
    traffic: str | FromColumn = "all"
    """A constant, or the column that holds it."""

    kind: Kind | FromColumn = "impression"
    """A constant, or the column that holds it."""

    period: Literal["1d", "1h"] = "1d"
    start: datetime.datetime | None = None
    """Only rows from here on (UTC)."""

    end: datetime.datetime | None = None
    """Only rows before this (UTC)."""

    @model_validator(mode="after")
    def _in_order(self) -> ParquetConfig:
        if self.start is not None and self.end is not None and utc(self.start) >= utc(self.end):
            raise ValueError(f"start {self.start} is not before end {self.end}")
        return self


class _Footer(Config):
    """What a file's footer says."""

    path: str
    names: tuple[str, ...]
    group_rows: tuple[int, ...]


class _Unit(Config):
    """What one task reads: consecutive row groups of one file."""

    path: str
    file: int
    first_row: int
    groups: tuple[int, ...]


@SOURCES.register("parquet")
class ParquetSource(Source):
    """Examples from Parquet files. ``example_id`` without a column: ``file position << 40 | row``, files by path."""

    Config = ParquetConfig

    def __init__(self, config: ParquetConfig, schema: Schema) -> None:
        super().__init__(config, schema)
        self._parquet = config

    @functools.cached_property
    def _files(self) -> tuple[pafs.FileSystem, list[str]]:
        return list_files(self._parquet.path)

    @functools.cached_property
    def _footers(self) -> list[_Footer]:
        filesystem, paths = self._files
        footers = []
        for path in paths:
            file = open_parquet(filesystem, path)
            rows = tuple(file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups))
            footers.append(_Footer(path=path, names=tuple(file.schema_arrow.names), group_rows=rows))
        return footers

    @functools.cached_property
    def _wanted(self) -> dict[str, str]:
        """Schema column -> source column of every column to read; each file must have them.

        Reserved, ``logged/`` and ``truth/`` columns are read where the first file has them.
        """
        columns = self._parquet.columns
        wanted = _mapping(self._parquet, self.schema)
        first = self._footers[0].names
        for name in [*RESERVED_COLUMNS, *columns, *first]:
            optional = name in RESERVED_COLUMNS or name.startswith((LOGGED_PREFIX, TRUTH_PREFIX))
            if optional and name not in wanted and (name in columns or name in first):
                wanted[name] = columns.get(name, name)
        for footer in self._footers:
            for name, column in wanted.items():
                if column not in footer.names:
                    role = "" if name == column else f" (for {name!r})"
                    close = nearest(column, list(footer.names))
                    raise DataError(f"{footer.path}: column {column!r}{role} is missing{close}")
        return wanted

    def periods(self) -> list[Period]:
        config = self._parquet
        length = LENGTHS[config.period]
        step = round(length.total_seconds() * 1e6)
        start = None if config.start is None else microseconds(config.start)
        end = None if config.end is None else microseconds(config.end)
        _ = self._wanted
        if start is not None and end is not None:
            found = set(range(start // step, -(-end // step)))
        else:
            found = {
                index
                for index in self._occupied(step)
                if (start is None or (index + 1) * step > start) and (end is None or index * step < end)
            }
        if not found:
            raise DataError(f"{config.path}: no row has a time between start and end; check `time` and its unit")
        periods = []
        for index in sorted(found):
            begin = datetime.datetime.fromtimestamp(index * step / 1e6, datetime.UTC)
            periods.append(Period(name=period_name(begin, length), start=begin, end=begin + length))
        if config.start is not None:
            periods[0] = periods[0].model_copy(update={"start": max(periods[0].start, utc(config.start))})
        if config.end is not None:
            periods[-1] = periods[-1].model_copy(update={"end": min(periods[-1].end, utc(config.end))})
        return periods

    def _occupied(self, step: int) -> set[int]:
        """Numbers of the periods (of ``step`` microseconds) that have rows."""
        filesystem, paths = self._files
        found: set[int] = set()
        for path in paths:
            file = open_parquet(filesystem, path)
            with parquet_errors(path):
                for batch in file.iter_batches(BLOCK_ROWS, columns=[self._parquet.time.column], use_threads=False):
                    times = to_microseconds(path, pa.Table.from_batches([batch]).column(0), self._parquet.time)
                    values = times.drop_null().to_numpy()
                    found.update(np.unique(values[(values >= 0) & (values < LAST_TIME)] // step).tolist())
        return found

    @property
    def _units(self) -> list[_Unit]:
        units = []
        for position, footer in enumerate(self._footers):
            row = first = 0
            groups: list[int] = []
            for group, rows in enumerate(footer.group_rows):
                groups.append(group)
                row += rows
                if row - first >= UNIT_ROWS or group == len(footer.group_rows) - 1:
                    units.append(_Unit(path=footer.path, file=position, first_row=first, groups=tuple(groups)))
                    first, groups = row, []
        if not units:
            raise DataError(f"{self._parquet.path}: the files have no rows")
        return units

    def estimated_rows(self) -> int:
        return sum(sum(footer.group_rows) for footer in self._footers)

    def dataset(self, periods: list[Period]) -> ray.data.Dataset:
        units = self._units
        read = functools.partial(
            read_units, units=units, config=self._parquet, schema=self.schema, wanted=self._wanted, periods=periods
        )
        return task_numbers(len(units)).map_batches(
            read, batch_size=None, batch_format="pyarrow", num_cpus=self.cpus_per_task
        )


def _mapping(config: ParquetConfig, schema: Schema) -> dict[str, str]:
    """Schema column -> source column, for the columns that must be there."""
    names = [name for name in schema.arrow_schema().names if name not in (EXAMPLE_ID, TIME, TRAFFIC)]
    for name in config.columns:
        if name not in names and name not in RESERVED_COLUMNS and not name.startswith((LOGGED_PREFIX, TRUTH_PREFIX)):
            raise DataError(f"source.columns: the schema has no column {name!r}{nearest(name, names)}")
    mapped = {name: config.columns.get(name, name) for name in names}
    mapped[TIME] = config.time.column
    if config.example_id is not None:
        mapped[EXAMPLE_ID] = config.example_id
    if isinstance(config.traffic, FromColumn):
        mapped[TRAFFIC] = config.traffic.column
    if isinstance(config.kind, FromColumn):
        mapped[KIND_COLUMN] = config.kind.column
    return mapped


def read_units(
    batch: pa.Table,
    units: list[_Unit],
    config: ParquetConfig,
    schema: Schema,
    wanted: dict[str, str],
    periods: list[Period],
) -> Iterator[pa.Table]:
    """The examples of the units whose positions stand in ``batch["id"]``, a block of rows at a time.

    Raises:
        DataError: a file is corrupt, or a column has a type that cannot fit.
    """
    filesystem, _ = list_files(config.path, expand=False)
    target = {field.name: field.type for field in schema.arrow_schema()}
    for unit in (units[position] for position in batch["id"].to_pylist()):
        file = open_parquet(filesystem, unit.path)
        row = unit.first_row
        columns = list(dict.fromkeys(wanted.values()))
        with parquet_errors(unit.path):
            pieces = file.iter_batches(BLOCK_ROWS, row_groups=list(unit.groups), columns=columns, use_threads=False)
        while True:
            with parquet_errors(unit.path):
                piece = next(pieces, None)
            if piece is None:
                break
            yield _examples(unit, row, pa.Table.from_batches([piece]), config, wanted, target, periods)
            row += piece.num_rows


def _examples(
    unit: _Unit,
    row: int,
    raw: pa.Table,
    config: ParquetConfig,
    wanted: dict[str, str],
    target: dict[str, pa.DataType],
    periods: list[Period],
) -> pa.Table:
    rows = raw.num_rows
    columns: dict[str, Any] = {name: raw[column] for name, column in wanted.items()}
    columns[TIME] = to_microseconds(unit.path, raw[config.time.column], config.time)
    if config.example_id is None:
        columns[EXAMPLE_ID] = pa.array((unit.file << FILE_SHIFT) + np.arange(row, row + rows, dtype=np.int64))
    if isinstance(config.traffic, str):
        columns[TRAFFIC] = pa.repeat(config.traffic, rows)
    elif pa.types.is_integer(columns[TRAFFIC].type):
        columns[TRAFFIC] = columns[TRAFFIC].cast(pa.string())
    if not isinstance(config.kind, FromColumn):
        columns[KIND_COLUMN] = pa.repeat(config.kind, rows)
    for name, type_ in target.items():
        if name in wanted and name != TIME:
            source = wanted[name]
            try:
                conform(source, columns[name].slice(0, 0) if columns[name].num_chunks else columns[name], type_)
            except DataError as error:
                raise DataError(f"{unit.path}: {error}") from None
    table, keep = pa.table(columns), _keep(columns[TIME], config, periods)
    return table if keep.all() else table.filter(pa.array(keep))


def _keep(times: pa.ChunkedArray, config: ParquetConfig, periods: list[Period]) -> npt.NDArray[np.bool_]:
    """Rows to hand on: those that ``start`` and ``end`` choose, and those without a usable time, which are rejects."""
    values: npt.NDArray[np.int64] = times.fill_null(-1).to_numpy()
    usable = (values >= 0) & (values < LAST_TIME)
    keep = np.ones(len(values), np.bool_)
    if config.start is not None:
        keep &= values >= microseconds(config.start)
    if config.end is not None:
        keep &= values < microseconds(config.end)
    inside = np.zeros(len(values), np.bool_)
    for period in periods:
        inside |= (values >= period.start_us) & (values < period.end_us)
    chosen: npt.NDArray[np.bool_] = (keep & inside) | ~usable
    return chosen
