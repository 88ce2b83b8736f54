"""Which data files of one table version may hold which labels, from the log's statistics alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import DeltaTable

from rayfm.config import LabelError
from rayfm.labels.columns import KIND, LANE, PERIOD, PLACE, TASK_PREFIX, TEACHER, VERSION, task_column

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
class LabelFile:
    """A data file. One that was written for a lane has one version, kind and lane; a compacted one may have several."""

    path: str
    """Relative to the table."""

    teacher: str
    period: str
    rows: int
    version: Bounds[str]
    kind: Bounds[str]
    lane: Bounds[int]
    nulls: dict[str, int]
    """Task -> rows without a prediction, where the log knows."""

    def may_hold(self, version: str | None = None, kind: str | None = None, lane: int | None = None) -> bool:
        """Whether rows with these values (None: any) can be in the file."""
        return self.version.may_hold(version) and self.kind.may_hold(kind) and self.lane.may_hold(lane)


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
        files.append(
            LabelFile(
                path=row["path"],
                teacher=row[f"partition.{TEACHER}"],
                period=row[f"partition.{PERIOD}"],
                rows=row["num_records"] or 0,
                version=version,
                kind=kind,
                lane=lane,
                nulls={
                    name.removeprefix(prefix): nulls
                    for name, nulls in row.items()
                    if name.startswith(prefix) and nulls is not None
                },
            )
        )
    return files


def groups(
    folder: Path, file: LabelFile, all_tasks: tuple[str, ...], tasks: tuple[str, ...] | None = None
) -> Iterator[LabelGroup]:
    """What a file holds, from its statistics where they tell and from its columns where they do not.

    Args:
        folder: the table's.
        file: the file.
        all_tasks: the table's tasks.
        tasks: what counts as labelled: a prediction for each of these; None: a prediction for any task.
    """
    version, kind, lane = file.version.only, file.kind.only, file.lane.only
    counted = tasks if tasks is not None else all_tasks
    every, some = (all, any) if tasks is not None else (any, all)
    if version is not None and kind is not None and lane is not None:
        labelled = None
        if every(file.nulls.get(task) == 0 for task in counted):
            labelled = file.rows
        elif some(file.nulls.get(task) == file.rows for task in counted):
            labelled = 0
        if labelled is not None:
            yield LabelGroup(file.teacher, file.period, version, kind, lane, file.rows, labelled)
            return
    data = read_columns(folder / file.path, [VERSION, KIND, LANE, *map(task_column, counted)])
    known = [data[task_column(task)].is_valid() for task in counted if task_column(task) in data.column_names]
    missing = len(known) < len(counted)
    flag: Any = pa.repeat(tasks is not None and not missing, data.num_rows)
    for column in known:
        flag = pc.and_(flag, column) if tasks is not None else pc.or_(flag, column)
    counts = (
        data.select([VERSION, KIND, LANE])
        .append_column("labelled", pc.cast(flag, pa.int64()))
        .group_by([VERSION, KIND, LANE])
        .aggregate([("labelled", "sum"), ("labelled", "count")])
    )
    for row in counts.to_pylist():  # one row a lane
        yield LabelGroup(
            file.teacher,
            file.period,
            row[VERSION],
            row[KIND],
            row[LANE],
            row["labelled_count"],
            row["labelled_sum"],
        )


def read_columns(path: Path, columns: list[str]) -> pa.Table:
    """Those of ``columns`` that a data file has.

    Raises:
        LabelError: the file is missing, corrupt, or lacks a column that every label file has.
    """
    try:
        with pq.ParquetFile(path) as file:
            names = set(file.schema_arrow.names)
            table = file.read(columns=[name for name in columns if name in names], use_threads=False)
    except (OSError, pa.ArrowInvalid) as error:
        raise LabelError(f"{path}: missing or corrupt label file ({error}); label the period again") from None
    for name in columns:
        if name in PLACE and name not in names:
            raise LabelError(f"{path}: column {name!r} is missing; label the period again")
    return table
