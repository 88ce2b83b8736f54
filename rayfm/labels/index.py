"""Which data files of one table version, and which of their row groups, may hold which labels.

The log's statistics tell for a file, its footer for a row group; columns are read only where neither does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import DeltaTable

from rayfm.config import LabelError
from rayfm.labels.columns import KIND, LANE, PERIOD, PLACE, ROW, TASK_PREFIX, TEACHER, VERSION, task_column
from rayfm.labels.files import Files, one_line

BoundT = TypeVar("BoundT", int, str)


@dataclasses.dataclass(frozen=True)
class Bounds(Generic[BoundT]):
    """Lowest and highest value of a column in a file, inclusive; None where the log knows none."""

    low: BoundT | None
    high: BoundT | None

    def may_hold(self, value: BoundT | None) -> bool:
        """Whether ``value`` can lie between them (None: any value)."""
        return value is None or self.low is None or self.high is None or self.low <= value <= self.high

    @property
    def only(self) -> BoundT | None:
        """The one value, None where there are several or the log knows none."""
        return self.low if self.low == self.high else None


@dataclasses.dataclass(frozen=True)
class Placed:
    """Rows of which it is known, in bounds, whose labels they are and where their examples lie."""

    path: str
    """The data file's, relative to the table."""

    rows: int
    version: Bounds[str]
    kind: Bounds[str]
    lane: Bounds[int]
    nulls: dict[str, int]
    """Task -> rows without a prediction, where that is known."""

    def may_hold(self, version: str | None = None, kind: str | None = None, lane: int | None = None) -> bool:
        """Whether rows with these values (None: any) can be among them."""
        return self.version.may_hold(version) and self.kind.may_hold(kind) and self.lane.may_hold(lane)

    @property
    def place(self) -> tuple[str, str, int] | None:
        """The one version, kind and lane, None where there may be several."""
        version, kind, lane = self.version.only, self.kind.only, self.lane.only
        return None if version is None or kind is None or lane is None else (version, kind, lane)

    def labelled(self, tasks: tuple[str, ...], every: bool) -> int | None:
        """Rows with a prediction for every one, or for any, of ``tasks``; None where only the columns tell."""
        at_once, never = (all, any) if every else (any, all)
        if at_once(self.nulls.get(task) == 0 for task in tasks):
            return self.rows
        return 0 if never(self.nulls.get(task) == self.rows for task in tasks) else None


@dataclasses.dataclass(frozen=True)
class LabelFile(Placed):
    """A data file. One that was written for a lane has one version, kind and lane; a compacted one has several lanes,
    and one that another program compacted may have several versions.
    """

    teacher: str
    period: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class RowGroup(Placed):
    """A row group of a data file. Those that this package writes hold rows of one lane."""

    index: int
    row: Bounds[int]


@dataclasses.dataclass(frozen=True)
class LabelGroup:
    """Rows of one version, kind and lane in one file."""

    teacher: str
    period: str
    version: str
    kind: str
    lane: int
    rows: int
    labelled: int
    """Rows that have a prediction for each of the tasks asked for (for any task, where none was asked for)."""


def label_files(table: DeltaTable, teacher: str | None = None, period: str | None = None) -> list[LabelFile]:
    """The data files of the table at its version, optionally of one teacher or period."""
    actions = pa.table(table.get_add_actions(flatten=True))
    if actions.num_rows == 0:
        return []
    keep = pa.repeat(True, actions.num_rows)
    for name, value in ((TEACHER, teacher), (PERIOD, period)):
        if value is not None:
            keep = pc.and_(keep, pc.equal(actions[f"partition.{name}"], value))
    prefix = f"null_count.{TASK_PREFIX}"
    files = []
    for row in actions.filter(keep).to_pylist():  # one row a file
        version, kind, lane = (Bounds(row.get(f"min.{name}"), row.get(f"max.{name}")) for name in (VERSION, KIND, LANE))
        nulls = {name.removeprefix(prefix): count for name, count in row.items() if name.startswith(prefix)}
        files.append(
            LabelFile(
                path=row["path"],
                rows=row["num_records"] or 0,
                version=version,
                kind=kind,
                lane=lane,
                nulls={task: count for task, count in nulls.items() if count is not None},
                teacher=row[f"partition.{TEACHER}"],
                period=row[f"partition.{PERIOD}"],
                bytes=row["size_bytes"],
            )
        )
    return files


def row_groups(file: pq.ParquetFile, path: str) -> list[RowGroup]:
    """A data file's row groups, from its footer."""
    footer = file.metadata
    found: list[RowGroup] = []
    if footer.num_row_groups == 0:
        return found
    first = footer.row_group(0)
    places = {first.column(number).path_in_schema: number for number in range(first.num_columns)}
    tasks = {name.removeprefix(TASK_PREFIX): at for name, at in places.items() if name.startswith(TASK_PREFIX)}
    for index in range(footer.num_row_groups):
        group = footer.row_group(index)
        bounds = [
            _bounds(group.column(places[name]).statistics if name in places else None)
            for name in (VERSION, KIND, LANE, ROW)
        ]
        known = {task: group.column(number).statistics for task, number in tasks.items()}
        nulls = {
            task: statistics.null_count
            for task, statistics in known.items()
            if statistics is not None and statistics.has_null_count
        }
        found.append(RowGroup(path, group.num_rows, bounds[0], bounds[1], bounds[2], nulls, index, bounds[3]))
    return found


def _bounds(statistics: Any) -> Bounds[Any]:
    known = statistics is not None and statistics.has_min_max
    return Bounds(statistics.min, statistics.max) if known else Bounds(None, None)


def groups(
    data: Files, file: LabelFile, all_tasks: tuple[str, ...], tasks: tuple[str, ...] | None = None
) -> Iterator[LabelGroup]:
    """What a file holds, from its statistics where they tell and from its columns where they do not.

    Args:
        data: the table's files.
        file: the file.
        all_tasks: the table's tasks.
        tasks: what counts as labelled: a prediction for each of these; None: a prediction for any task.

    Raises:
        LabelError: the file had to be read, and is missing or corrupt.
    """
    counted, every = (all_tasks, False) if tasks is None else (tasks, True)
    labelled = file.labelled(counted, every)
    if file.place is not None and labelled is not None:
        yield LabelGroup(file.teacher, file.period, *file.place, file.rows, labelled)
        return
    totals: dict[tuple[str, str, int], list[int]] = {}
    for group in row_groups(open_file(data, file.path), file.path):
        labelled = group.labelled(counted, every)
        if group.place is not None and labelled is not None:
            found = [(*group.place, group.rows, labelled)]
        else:
            found = _counted(read_columns(data, group, [VERSION, KIND, LANE, *map(task_column, counted)]), every)
        for version, kind, lane, rows, labelled in found:
            total = totals.setdefault((version, kind, lane), [0, 0])
            total[0], total[1] = total[0] + rows, total[1] + labelled
    for place, (rows, labelled) in totals.items():
        yield LabelGroup(file.teacher, file.period, *place, rows, labelled)


def _counted(table: pa.Table, every: bool) -> list[tuple[str, str, int, int, int]]:
    """(version, kind, lane, rows, labelled) of rows with the columns that are counted."""
    counts = (
        table.select([VERSION, KIND, LANE])
        .append_column("labelled", pc.cast(predicted(table, every), pa.int64()))
        .group_by([VERSION, KIND, LANE])
        .aggregate([("labelled", "sum"), ("labelled", "count")])
    )
    names = (VERSION, KIND, LANE, "labelled_count", "labelled_sum")
    return list(zip(*(counts[name].to_pylist() for name in names), strict=True))  # one item a lane


def predicted(table: pa.Table, every: bool) -> pa.ChunkedArray:
    """Whether a row has a prediction in every one, or in any, of the table's task columns: booleans."""
    columns = [table[name].is_valid() for name in table.column_names if name.startswith(TASK_PREFIX)]
    if not columns:
        return pa.chunked_array([pa.repeat(pa.scalar(False), table.num_rows)])
    flag = columns[0]
    for column in columns[1:]:
        flag = pc.and_(flag, column) if every else pc.or_(flag, column)
    return flag


def open_file(data: Files, path: str) -> pq.ParquetFile:
    """A data file, to read.

    Raises:
        LabelError: it is missing or corrupt.
    """
    try:
        return data.open(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise unreadable(path, error) from None


def read_columns(data: Files, group: RowGroup, columns: list[str]) -> pa.Table:
    """Columns of a row group; those of tasks that the file lacks are null.

    Raises:
        LabelError: the file is missing, corrupt, or lacks a column that every label file has.
    """
    file = open_file(data, group.path)
    names = set(file.schema_arrow.names)
    for name in columns:
        if name in PLACE and name not in names:
            raise LabelError(f"{group.path}: column {name!r} is missing; label the period again")
    try:
        table = file.read_row_group(group.index, [name for name in columns if name in names], use_threads=False)
    except (OSError, pa.ArrowInvalid) as error:
        raise unreadable(group.path, error) from None
    for name in columns:
        if name not in names:
            table = table.append_column(name, pa.nulls(table.num_rows, pa.float32()))
    return table


def unreadable(path: str, error: Exception) -> LabelError:
    """The error about a data file that a table version names and that cannot be read."""
    if isinstance(error, FileNotFoundError):
        return LabelError(
            f"{path}: missing label file: vacuum takes what no pin holds ({one_line(error)}); pin the newest version "
            "of the table, or label the period again"
        )
    return LabelError(f"{path}: missing or corrupt label file ({one_line(error)}); label the period again")
