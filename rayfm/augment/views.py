"""Each student's own part of the shared data set: which rows, which columns (ExFM section 3.2: "each VM picks its own
datasets from the shared dataset").
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator, model_validator

from rayfm.config import Config, DataError, nearest
from rayfm.data.sources.base import KIND_COLUMN
from rayfm.schema import EXAMPLE_ID, LOGGED_PREFIX, TIME, TRAFFIC, WEIGHTS_SUFFIX, Kind
from rayfm.snapshots.metadata.url import check_metadata_url

STAGE = "stage_reached"
VERSION_PREFIX = "version/"
"""``version/<teacher>``: the snapshot that made the row's supervision."""

CLUSTERS = (KIND_COLUMN, TRAFFIC, STAGE)
"""A shared data set keeps rows that agree in these together, each such run by time: a choice among them is a few slices
of the data, without a copy."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class ViewConfig(Config):
    """What a student takes of the shared data set."""

    teacher: str
    """The teacher whose supervision it learns."""

    traffics: tuple[str, ...] | None = Field(None, min_length=1)
    """Only rows of these; by default all."""

    stages: tuple[str, ...] | None = Field(None, min_length=1)
    """Only rows whose ``stage_reached`` is one of these; by default all."""

    kinds: tuple[Kind, ...] = Field(("impression",), min_length=1)

    features: tuple[str, ...] | None = None
    """Only these of the examples' features; by default all of the schema."""

    tasks: tuple[str, ...] | None = None
    """Only these labels and this supervision; by default all."""


class ScoringTeacherConfig(Config):
    """A published teacher that scores."""

    model: str
    """Its key in the snapshot store."""

    version: str | None = None
    """By default the newest that was not trained on the period."""

    tasks: tuple[str, ...] | None = Field(None, min_length=1)
    """What of its predictions is kept; by default all."""


class LabellingConfig(Config):
    """Teachers that score what the join wrote, and the students that share them."""

    snapshots: str
    """The folder that holds ``snapshots/``: a run's."""

    metadata: str | None = None
    """URL of the snapshots' metadata store, where the versions that score are held. By default the run's own:
    metadata.sqlite in the same folder."""

    teachers: dict[Name, ScoringTeacherConfig] = Field(min_length=1)
    students: dict[Name, ViewConfig] = Field(min_length=1)
    rows_per_request: int = Field(8192, gt=0)

    @field_validator("metadata")
    @classmethod
    def _metadata(cls, url: str | None) -> str | None:
        return None if url is None else check_metadata_url(url)

    @model_validator(mode="after")
    def _consistent(self) -> LabellingConfig:
        for name, view in self.students.items():
            if view.teacher not in self.teachers:
                raise ValueError(
                    f"students.{name}: unknown teacher {view.teacher!r}{nearest(view.teacher, list(self.teachers))}"
                )
            offered = self.teachers[view.teacher].tasks
            for task in view.tasks or ():
                if offered is not None and task not in offered:
                    raise ValueError(
                        f"students.{name}: teacher {view.teacher!r} gives no task {task!r}"
                        f"{nearest(task, list(offered))}"
                    )
        return self


def with_clusters(table: pa.Table) -> pa.Table:
    """The rows sorted by kind, traffic, stage, time and id; a table without kinds is one of impressions."""
    if KIND_COLUMN not in table.column_names:
        table = table.append_column(KIND_COLUMN, pa.repeat("impression", table.num_rows))
    keys = [name for name in CLUSTERS if name in table.column_names]
    return table.sort_by([(name, "ascending") for name in (*keys, TIME, EXAMPLE_ID)]).combine_chunks()


def chosen(table: pa.Table, view: ViewConfig) -> pa.Array:
    """Which rows the view takes: boolean ``[N]``.

    Raises:
        DataError: the view chooses by a column that is not there.
    """
    masks = []
    for column, wanted in ((KIND_COLUMN, view.kinds), (TRAFFIC, view.traffics), (STAGE, view.stages)):
        if wanted is None:
            continue
        if column not in table.column_names:
            raise DataError(f"a view chooses by {column!r}, which the examples lack; leave that choice out")
        masks.append(pc.is_in(table[column].combine_chunks(), value_set=pa.array(wanted, pa.string())))
    return functools.reduce(pc.and_, masks)


def view(shared: pa.Table, name: str, config: ViewConfig, features: Iterable[str], tasks: Iterable[str]) -> pa.Table:
    """A student's rows and columns of a shared data set, without a copy: slices of its memory.

    Rows stand as in the shared data set, that is by time within each kind, traffic and stage.

    Args:
        shared: rows of the shared data set, as `with_clusters` leaves them.
        name: the student's.
        config: what it takes.
        features: the examples' features.
        tasks: their labels.

    Returns:
        ``example_id``, ``time``, traffic, kind and stage where there are any, the view's features (with their weights)
        and labels, ``logged/<teacher>/<task>`` and ``version/<teacher>``.

    Raises:
        DataError: a feature, task, traffic column or teacher is not in the shared data set.
    """
    features, tasks = list(features), list(tasks)
    own_features = features if config.features is None else list(config.features)
    for feature in own_features:
        if feature not in features or feature not in shared.column_names:
            raise DataError(f"student {name!r}: the examples have no feature {feature!r}{nearest(feature, features)}")
    prefix = f"{LOGGED_PREFIX}{config.teacher}/"
    supervised = [column for column in shared.column_names if column.startswith(prefix)]
    if not supervised:
        raise DataError(f"student {name!r}: the examples have no supervision of teacher {config.teacher!r}; score them")
    own_tasks = tasks if config.tasks is None else list(config.tasks)
    for task in config.tasks or ():
        if task not in tasks or prefix + task not in supervised:
            raise DataError(f"student {name!r}: no label and supervision of task {task!r}{nearest(task, tasks)}")
    if config.tasks is not None:
        supervised = [prefix + task for task in own_tasks]
    weights = [feature + WEIGHTS_SUFFIX for feature in own_features]
    wanted = [EXAMPLE_ID, TIME, *CLUSTERS, *own_features, *weights, *own_tasks, *supervised]
    wanted.append(VERSION_PREFIX + config.teacher)
    columns = [column for column in dict.fromkeys(wanted) if column in shared.column_names]
    return take_runs(shared.select(columns), chosen(shared, config))


def take_runs(table: pa.Table, mask: Any) -> pa.Table:
    """The rows that ``mask`` marks as slices of ``table``: no value is copied."""
    marked = np.concatenate([[False], pc.fill_null(mask, False).to_numpy(zero_copy_only=False), [False]])
    edges = np.flatnonzero(marked[1:] != marked[:-1])
    runs = [table.slice(int(start), int(stop - start)) for start, stop in zip(edges[::2], edges[1::2], strict=True)]
    return pa.concat_tables([table.slice(0, 0), *runs])
