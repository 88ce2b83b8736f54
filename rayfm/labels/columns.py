"""The label table's columns: one row per (example, teacher, version).

=================  ============================================================================
``teacher``        partition: the teacher's name
``period``         partition: the period that the example belongs to
``version``        the teacher's snapshot
``kind``, ``lane`` where the example lies in the example store
``row``            its position in that lane; files are sorted by it
``example_id``     the example, to check the position by
``task_<task>``    the prediction: a probability, or a regression's (transformed) value; null where there is none
``representation`` the teacher's representation, where it is stored; null elsewhere
=================  ============================================================================
"""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa

from rayfm.config import LabelError, nearest
from rayfm.config.names import check_stored_name

TEACHER, PERIOD, VERSION, KIND, LANE, ROW = "teacher", "period", "version", "kind", "lane", "row"
EXAMPLE_ID, REPRESENTATION = "example_id", "representation"
TASK_PREFIX = "task_"

PARTITIONS = (TEACHER, PERIOD)
PLACE: dict[str, pa.DataType] = {
    VERSION: pa.string(),
    KIND: pa.string(),
    LANE: pa.int32(),
    ROW: pa.int64(),
    EXAMPLE_ID: pa.int64(),
}
"""The columns that every data file has before its task columns."""


def task_column(task: str) -> str:
    """The column of a task's predictions."""
    return TASK_PREFIX + task


def table_schema(tasks: Iterable[str]) -> pa.Schema:
    """Columns of a label table with these tasks, as Delta Lake stores them."""
    return pa.schema(
        [pa.field(name, pa.string()) for name in PARTITIONS]
        + [pa.field(name, type_) for name, type_ in PLACE.items()]
        + [pa.field(REPRESENTATION, pa.list_(pa.float32()))]
        + [pa.field(task_column(task), pa.float32()) for task in tasks]
    )


def check_table(where: str, found: pa.Schema, partitions: Iterable[str]) -> None:
    """Refuse a table that is not a label table.

    Raises:
        LabelError: naming the first column that differs.
    """
    found_types = {field.name: field.type for field in found}
    for field in table_schema(()):
        if field.name not in found_types:
            raise LabelError(f"{where}: not a label table: column {field.name!r} is missing; name another folder")
        if not _same(found_types[field.name], field.type):
            raise LabelError(
                f"{where}: not a label table: column {field.name!r} is {found_types[field.name]}, not {field.type}; "
                "name another folder"
            )
        del found_types[field.name]
    for name, type_ in found_types.items():
        if not name.startswith(TASK_PREFIX):
            raise LabelError(f"{where}: not a label table: unknown column {name!r}; name another folder")
        if type_ != pa.float32():
            raise LabelError(f"{where}: not a label table: column {name!r} is {type_}, not float; name another folder")
    if tuple(partitions) != PARTITIONS:
        raise LabelError(f"{where}: not a label table: partitioned by {list(partitions)}, not {list(PARTITIONS)}")


def _same(found: pa.DataType, wanted: pa.DataType) -> bool:
    if pa.types.is_list(wanted):
        return bool(
            (pa.types.is_list(found) or pa.types.is_large_list(found)) and found.value_type == wanted.value_type
        )
    return bool(found == wanted or (pa.types.is_string(wanted) and pa.types.is_large_string(found)))


def check_part(what: str, name: str) -> str:
    """``name`` if it is safe in a path and in a predicate.

    Raises:
        LabelError: it has an odd character.
    """
    return check_stored_name(what, name, LabelError)


def has_seen(trained_through: str | None, period: str) -> bool:
    """Whether a snapshot was trained on rows of ``period`` or of a later one; the two may be of different lengths.

    A period is named by its ISO start, so a day's name is the beginning of its hours': what was trained through a day
    has seen each of its hours, and what was trained through an hour has seen a part of its day.
    """
    return trained_through is not None and trained_through >= period[: len(trained_through)]


def check_leak(teacher: str, version: str, trained_through: str | None, period: str) -> None:
    """The leak rule: a teacher labels only periods after the last one that it was trained on (DESIGN section 2).

    Raises:
        LabelError: it was trained on ``period``, on a part of it, or on a later one (`has_seen`).
    """
    if has_seen(trained_through, period):
        raise LabelError(
            f"leak: {teacher}@{version} was trained through {trained_through} and must not label period {period}; "
            "label it with a version trained through an earlier period"
        )


def check_task(task: str, known: Iterable[str], whose: str) -> None:
    """Refuse a task that has no predictions. Raises LabelError with the nearest known one."""
    known = list(known)
    if task not in known:
        raise LabelError(f"{whose} has no labels of task {task!r}{nearest(task, known)}")
