"""Step one of labelling: a worker writes one lane's predictions to a data file and hands the driver a small record.

The file belongs to no table yet. Step two (`rayfm.labels.LabelStore.commit`) makes the files of many records visible
at once, so no prediction passes the driver; files of a job that was killed stay invisible and are vacuumed.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayfm.config import Config, LabelError
from rayfm.labels.columns import (
    EXAMPLE_ID,
    KIND,
    LANE,
    PERIOD,
    PLACE,
    REPRESENTATION,
    ROW,
    TEACHER,
    VERSION,
    check_leak,
    check_part,
    task_column,
)
from rayfm.labels.storage import Storage
from rayfm.schema import KINDS, Kind, Task

ROW_GROUP_ROWS = 32_768
"""Rows that a look-up reads at once."""

ROW_GROUP_BYTES = 4 << 20
"""What the representations of those rows may take: a look-up holds some row groups of each of its lanes."""


class LaneRecord(Config):
    """What a worker wrote: plain values, for the driver to commit."""

    teacher: str
    version: str
    trained_through: str | None
    period: str
    kind: Kind
    lane: int
    rows: int
    labelled: int
    """Rows with at least one prediction."""

    tasks: tuple[str, ...]
    path: str
    """Relative to the table."""

    bytes: int
    modified_ms: int
    stats: str
    """Statistics of the columns, as Delta Lake's log holds them: JSON."""


def write_lane_file(
    root: str | Path | Storage,
    *,
    teacher: str,
    version: str,
    trained_through: str | None,
    period: str,
    kind: Kind,
    lane: int,
    labels: pa.Table,
    tasks: Sequence[Task],
) -> LaneRecord:
    """Write a lane's predictions below ``<root>/labels``, durably and invisibly.

    Args:
        root: as `LabelStore`'s.
        teacher, version, trained_through: the snapshot that made the predictions, and the last period it saw.
        period, kind, lane: the lane.
        labels: ``example_id`` (int64); a floating column per task, called as the task, null where there is no
            prediction; optional ``row`` (int64, the position in the lane; by default 0, 1, ...), optional
            ``representation`` (a fixed-size list of floats, null where there is none).
        tasks: what the teacher predicts.

    Raises:
        LabelError: a leak; a column is missing or of another type; a prediction or representation is NaN, infinite
            or, for a binary task, not in [0, 1]; a position is negative or stands twice; the folder cannot be written.
    """
    check_part("teacher", teacher), check_part("version", version), check_part("period", period)
    check_leak(teacher, version, trained_through, period)
    where = f"labels of {teacher}@{version} for {period}/{kind}/lane {lane}"
    if kind not in KINDS or lane < 0:
        raise LabelError(f"{where}: kind is one of {list(KINDS)}, a lane is 0 or more")
    table = _sorted_rows(where, labels)
    columns = {
        VERSION: pa.repeat(version, table.num_rows),
        KIND: pa.repeat(kind, table.num_rows),
        LANE: pa.repeat(pa.scalar(lane, pa.int32()), table.num_rows),
        ROW: table[ROW],
        EXAMPLE_ID: table[EXAMPLE_ID],
    }
    if not tasks:
        raise LabelError(f"{where}: no tasks; name what the teacher predicts")
    columns |= {task_column(task.name): _predictions(where, table, task) for task in tasks}
    if REPRESENTATION in table.column_names:
        columns[REPRESENTATION] = _representation(where, table)
    data = pa.table(columns)
    relative = data_path(teacher, period, f"{version}-{kind}-lane-{lane:05d}")
    size, modified_ms = Storage.of(root).files().write(relative, lambda file: _write(file, data))
    known = [data[task_column(task.name)].is_valid() for task in tasks]
    labelled = known[0]
    for other in known[1:]:
        labelled = pc.or_(labelled, other)
    return LaneRecord(
        teacher=teacher,
        version=version,
        trained_through=trained_through,
        period=period,
        kind=kind,
        lane=lane,
        rows=data.num_rows,
        labelled=pc.sum(labelled).as_py() or 0,
        tasks=tuple(task.name for task in tasks),
        path=relative,
        bytes=size,
        modified_ms=modified_ms,
        stats=json.dumps(_stats(data, {VERSION: version, KIND: kind, LANE: lane})),
    )


def _sorted_rows(where: str, labels: pa.Table) -> pa.Table:
    """The labels sorted by position, positions and ids checked."""
    table = labels
    if ROW not in table.column_names:
        table = table.append_column(ROW, pa.array(np.arange(table.num_rows, dtype=np.int64)))
    for name in (EXAMPLE_ID, ROW):
        if name not in table.column_names:
            raise LabelError(f"{where}: column {name!r} is missing; give it")
        if table[name].type != PLACE[name] or table[name].null_count:
            raise LabelError(f"{where}: column {name!r} is {table[name].type}; it must be int64 without nulls")
    rows = table[ROW].to_numpy()
    if len(rows) and (np.diff(rows) <= 0).any():
        order = np.argsort(rows, kind="stable")
        table, rows = table.take(pa.array(order)), rows[order]
        twice = np.flatnonzero(np.diff(rows) == 0)
        if len(twice):
            raise LabelError(f"{where}: row {rows[twice[0]]} stands twice; give each row once")
    if len(rows) and rows[0] < 0:
        raise LabelError(f"{where}: row {rows[0]} is negative; rows count from 0")
    return table


def _predictions(where: str, table: pa.Table, task: Task) -> pa.ChunkedArray:
    """A task's predictions as float32, refused unless each is null or usable."""
    if task.name not in table.column_names:
        raise LabelError(f"{where}: column {task.name!r} is missing; give the teacher's predictions for the task")
    column = table[task.name]
    if not (pa.types.is_floating(column.type) or pa.types.is_null(column.type)):
        raise LabelError(f"{where}: column {task.name!r} is {column.type}; predictions are floats")
    column = column.cast(pa.float32())
    good = pc.is_finite(column)
    wanted = "finite"
    if task.kind == "binary":
        good = pc.and_(good, pc.and_(pc.greater_equal(column, 0.0), pc.less_equal(column, 1.0)))
        wanted = "a probability in [0, 1]"
    bad = pc.invert(pc.fill_null(good, True))
    if pc.any(bad).as_py():
        first = pc.index(bad, True).as_py()
        count = pc.sum(bad).as_py()
        raise LabelError(
            f"{where}: row {table[ROW][first]} (example {table[EXAMPLE_ID][first]}), task {task.name!r}: prediction "
            f"{column[first]} is not {wanted} ({count} such rows); fix the teacher, or leave the rows null"
        )
    return column


def _representation(where: str, table: pa.Table) -> pa.ChunkedArray:
    """The representations as float32, refused unless each is null or finite."""
    column = table[REPRESENTATION]
    kind = column.type
    if not pa.types.is_fixed_size_list(kind) or not pa.types.is_floating(kind.value_type):
        raise LabelError(f"{where}: column {REPRESENTATION!r} is {kind}; give a fixed-size list of floats")
    good = pc.is_finite(pc.list_flatten(column))
    if not pc.all(pc.fill_null(good, False), min_count=0).as_py():
        row = pc.index(pc.fill_null(good, False), False).as_py() // kind.list_size
        row = table[ROW].filter(column.is_valid())[row]
        raise LabelError(f"{where}: row {row}: its {REPRESENTATION} is not finite; fix the teacher")
    return column.cast(pa.list_(pa.float32(), kind.list_size))


def data_path(teacher: str, period: str, name: str) -> str:
    """A path that no other data file has, relative to the table."""
    return f"{TEACHER}={teacher}/{PERIOD}={period}/{name}-{uuid.uuid4().hex[:16]}.parquet"


def row_group_rows(schema: pa.Schema) -> int:
    """Rows of a row group of a file with these columns."""
    if REPRESENTATION not in schema.names:
        return ROW_GROUP_ROWS
    kind = schema.field(REPRESENTATION).type
    if not pa.types.is_fixed_size_list(kind):
        return 1024  # of any width: another program has written the file
    width = int(kind.list_size)
    return max(1024, min(ROW_GROUP_ROWS, ROW_GROUP_BYTES // (4 * width)))


def parquet_writer(file: Any, schema: pa.Schema) -> pq.ParquetWriter:
    """A writer of label files: compressed; version, kind and lane are dictionaries, and statistics stand."""
    return pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=[VERSION, KIND, LANE])


def _write(file: Any, data: pa.Table) -> None:
    with parquet_writer(file, data.schema) as writer:
        writer.write_table(data, row_group_size=row_group_rows(data.schema))


def _stats(data: pa.Table, place: dict[str, Any]) -> dict[str, Any]:
    """Row count, null counts and the bounds of what look-ups prune by."""
    stats: dict[str, Any] = {
        "numRecords": data.num_rows,
        "nullCount": {name: data[name].null_count for name in data.column_names if name != REPRESENTATION},
    }
    bounds = {name: pc.min_max(data[name]) for name in (ROW, EXAMPLE_ID)} if data.num_rows else {}
    for end, side in (("minValues", "min"), ("maxValues", "max")):
        # The place is stated even where there are no rows: an empty lane is labelled too.
        stats[end] = {**place, **{name: bound[side].as_py() for name, bound in bounds.items()}}
    return stats
