"""Labelling in the window: the teacher scores each example once, for all students that share it (ExFM section 3.2).

The result is a shared data set: the examples that any of the students wants, in the example store's types, with the
teacher's predictions and the version that made them. `rayfm.augment.views` gives each student its part.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rayfm.augment.step import first_of
from rayfm.augment.views import VERSION_PREFIX, ViewConfig, chosen, with_clusters
from rayfm.config import DataError, LabelError
from rayfm.data.sources.base import KIND_COLUMN, Period
from rayfm.data.validate import DUPLICATE, REASON, split_rejects
from rayfm.labels.columns import check_leak, check_task
from rayfm.schema import EXAMPLE_ID, LOGGED_PREFIX, TRAFFIC, Schema
from rayfm.serving.labelling import teacher_columns

IN_FLIGHT = 2
"""Requests that are kept at the teacher, so that preparing the next and scoring overlap."""


@dataclasses.dataclass(frozen=True)
class ScoringTeacher:
    """One version of a teacher, and how to ask it.

    Args:
        name: what its supervision is called.
        version: the snapshot.
        trained_through: the last period that the snapshot was trained on.
        example_schema: the examples that it reads.
        features: what it reads of them; None: all.
        tasks: its predictions to keep.
        handle: answers ``handle.score.remote(table, version).result()`` with (version, predictions): a teacher
            service's handle, or a `rayfm.serving.teacher.TeacherHere`.
    """

    name: str
    version: str
    trained_through: str | None
    example_schema: Schema
    features: tuple[str, ...] | None
    tasks: tuple[str, ...]
    handle: Any


@dataclasses.dataclass(frozen=True)
class Window:
    """Examples of one period, scored."""

    shared: pa.Table
    """The example store's columns, ``logged/<teacher>/<task>`` (float32) and ``version/<teacher>``; as `with_clusters`
    sorts them."""

    rejected: pa.Table
    """Rows that no example store would take, as they came, with a reason."""

    unwanted: int
    """Rows that no student wants: they were not scored."""


def label_window(
    examples: pa.Table,
    teacher: ScoringTeacher,
    period: Period,
    students: Mapping[str, ViewConfig],
    rows_per_request: int = 8192,
) -> Window:
    """Score what became complete, each example once however many students want it.

    Args:
        examples: labelled examples, e.g. a file of the feedback join; a table without ``kind`` holds impressions.
        teacher: who scores.
        period: the period of all of them.
        students: the views that share the teacher; the views of other teachers are passed over.
        rows_per_request: rows of one call to the teacher.

    Raises:
        LabelError: a leak: the teacher was trained on the period; or the teacher answers with another version, with
            other tasks or other rows.
        DataError: the examples lack a column, or no view is of this teacher.
    """
    # A day's name is the beginning of its hours': a teacher trained through a day has seen all of them.
    name = period.name if teacher.trained_through is None else period.name[: len(teacher.trained_through)]
    check_leak(teacher.name, teacher.version, teacher.trained_through, name)
    views = [view for view in students.values() if view.teacher == teacher.name]
    if not views:
        raise DataError(f"no student takes teacher {teacher.name!r}: nothing to score; name it in a view")
    good, rejected = to_examples(examples, teacher.example_schema, period)
    wanted = functools.reduce(pc.or_, [chosen(good, view) for view in views])
    rows = with_clusters(good.filter(wanted))
    predictions = _score(rows, teacher, rows_per_request)
    for task in teacher.tasks:
        rows = rows.append_column(f"{LOGGED_PREFIX}{teacher.name}/{task}", predictions[task])
    versions = pa.repeat(teacher.version, rows.num_rows)
    return Window(rows.append_column(VERSION_PREFIX + teacher.name, versions), rejected, good.num_rows - rows.num_rows)


def to_examples(table: pa.Table, schema: Schema, period: Period) -> tuple[pa.Table, pa.Table]:
    """Rows in the example store's columns and types, and those that it would reject, with a reason.

    Labels of tasks that the rows know nothing of are null; rows without a ``traffic`` are of the schema's only one.

    Raises:
        DataError: a column is missing or of a type that never fits.
    """
    rows = table.num_rows
    if KIND_COLUMN not in table.column_names:
        table = table.append_column(KIND_COLUMN, pa.repeat("impression", rows))
    if TRAFFIC not in table.column_names and len(schema.traffics) == 1:
        table = table.append_column(TRAFFIC, pa.repeat(schema.traffics[0], rows))
    for task in schema.tasks:
        if task.name not in table.column_names:
            table = table.append_column(task.name, pa.nulls(rows, pa.float32()))
    good, rejected = split_rejects(table, schema, [period])
    first = first_of(good[EXAMPLE_ID].to_numpy())
    if first.all():
        return good, rejected
    again = good.filter(pa.array(~first))
    again = again.append_column(REASON, pa.array([DUPLICATE] * again.num_rows, pa.string()))
    return good.filter(pa.array(first)), pa.concat_tables([rejected, again], promote_options="permissive")


def _score(rows: pa.Table, teacher: ScoringTeacher, rows_per_request: int) -> pa.Table:
    """The teacher's predictions in the rows' order: a float32 column for each of its tasks."""
    columns = teacher_columns(teacher.example_schema, teacher.features)
    requests = rows.select(columns)
    empty = pa.table({task: pa.array([], pa.float32()) for task in teacher.tasks})
    parts, waiting = [empty], deque[tuple[int, Any]]()
    where = f"{teacher.name}@{teacher.version}"

    def collect() -> None:
        count, response = waiting.popleft()
        answered, predictions = response.result()
        if answered != teacher.version:
            raise LabelError(f"asked {where}, the service answered with {answered}")
        if predictions.num_rows != count:
            raise LabelError(f"{where}: {count} rows were asked and {predictions.num_rows} answered; fix the service")
        for task in teacher.tasks:
            check_task(task, predictions.column_names, where)
        parts.append(predictions.select(list(teacher.tasks)).cast(empty.schema))

    for start in range(0, rows.num_rows, rows_per_request):
        request = requests.slice(start, rows_per_request)
        waiting.append((request.num_rows, teacher.handle.score.remote(request, teacher.version)))
        if len(waiting) >= IN_FLIGHT:
            collect()
    while waiting:
        collect()
    return pa.concat_tables(parts).combine_chunks()
