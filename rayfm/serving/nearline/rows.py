"""What is posted: read, checked row by row, and split into rows that a teacher can label and rejects with a reason."""

from __future__ import annotations

import dataclasses
import datetime
import threading
import time
from collections import OrderedDict
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rayfm.config import DataError, LabelError, SnapshotError, nearest
from rayfm.data.sources.base import KIND_COLUMN, Period
from rayfm.data.store import period_name
from rayfm.data.validate import REASON, split_rejects
from rayfm.labels.columns import check_leak
from rayfm.schema import EXAMPLE_ID, TIME, Schema, Task
from rayfm.serving.nearline.spool import ROW
from rayfm.snapshots.current import read_current
from rayfm.snapshots.load import SnapshotStore
from rayfm.snapshots.metadata import MetadataStore, StoreUnavailable

PeriodLength = Literal["day", "hour"]

_UTC = datetime.UTC
_EVER = (
    Period(
        name="ever",
        start=datetime.datetime(1970, 1, 1, tzinfo=_UTC),
        end=datetime.datetime(9999, 1, 1, tzinfo=_UTC),
    ),
)
_CURRENT_S = 2.0
"""How old the knowledge of the newest version may be."""

_KEPT = 4


@dataclasses.dataclass(frozen=True)
class TeacherVersion:
    """A published snapshot, as far as its rows' form goes: nothing of the model is loaded."""

    version: str
    trained_through: str | None
    schema: Schema
    """Only the features that the model reads, and no tasks: what a post must have."""

    tasks: tuple[Task, ...]
    """What it predicts."""

    @property
    def columns(self) -> list[str]:
        """Columns of a post, in the example store's names."""
        return list(self.schema.arrow_schema().names)


class Versions:
    """Versions of a model that may label.

    Args:
        store: the published snapshots.
        model: the model's key there.
        fixed: the version that labels; None: the one that is `current`.
        metadata: where `current` stands; None: the newest that is published is current.
    """

    def __init__(
        self,
        store: SnapshotStore,
        model: str,
        fixed: str | None = None,
        metadata: MetadataStore | None = None,
    ) -> None:
        self._store, self._model, self._fixed, self._metadata = store, model, fixed, metadata
        self._known: OrderedDict[str, TeacherVersion] = OrderedDict()
        self._newest: tuple[float, str] | None = None
        self._lock = threading.Lock()

    def current(self) -> TeacherVersion:
        """The version that labels what is posted now.

        Raises:
            SnapshotError: nothing is published yet, or the metadata store does not answer from the start.
        """
        if self._fixed is not None:
            return self.get(self._fixed)
        now = time.monotonic()
        known = self._newest
        if known is None or now - known[0] > _CURRENT_S:
            try:
                version = self._look()
            except StoreUnavailable:
                if known is None:
                    raise
                version = known[1]  # what was current a moment ago labels as well
            if version is None:
                raise SnapshotError(f"no snapshot of {self._model!r} is published yet; train the teacher first")
            known = self._newest = (now, version)
        return self.get(known[1])

    def _look(self) -> str | None:
        current = None if self._metadata is None else read_current(self._metadata, self._model)
        return self._store.newest(self._model) if current is None else current.version

    def get(self, version: str) -> TeacherVersion:
        """A version by its name. Raises SnapshotError where it is not published, or gone."""
        with self._lock:
            found = self._known.get(version)
            if found is None:
                found = self._known[version] = self._read(version)
                while len(self._known) > _KEPT:
                    self._known.popitem(last=False)
            return found

    def _read(self, version: str) -> TeacherVersion:
        manifest = self._store.manifest(self._model, version)
        schema = Schema.model_validate(manifest.example_schema)
        names = manifest.config.get("features")
        features = tuple(feature for feature in schema.features if names is None or feature.name in names)
        wanted = schema.model_copy(update={"features": features, "tasks": ()})
        return TeacherVersion(
            version, manifest.trained_through, wanted, tuple(schema.task(name) for name in manifest.tasks)
        )


@dataclasses.dataclass(frozen=True)
class Post:
    """A post, checked."""

    good: pa.Table
    """Rows that can be labelled: the columns as posted, and `ROW`."""

    rejects: pa.Table
    """The others, as posted, with `ROW` and ``reason``."""


def check_post(
    table: pa.Table,
    teacher: str,
    version: TeacherVersion,
    period: PeriodLength = "day",
    periods: int | None = None,
    ahead_s: float | None = None,
) -> Post:
    """Split a post.

    Args:
        table: what was posted; columns that the teacher does not read are kept and not looked at.
        teacher: its name, for messages.
        version: what is to label the rows.
        period: how long the teacher's periods are, for the leak rule.
        periods: how many of them the good rows may be of; None: any number.
        ahead_s: seconds that a good row's time may lie in the future; None: any.

    Raises:
        DataError: a column is missing, stands twice, or has a type that can never fit: then no row can be good. Or the
            good rows are of too many periods.
    """
    for name in table.column_names:
        if table.column_names.count(name) > 1:
            raise DataError(f"the post has column {name!r} twice; send it once")
    for name in version.columns:
        if name not in table.column_names:
            raise DataError(f"the post lacks column {name!r}{nearest(name, table.column_names)}")
    if ROW in table.column_names:
        table = table.drop_columns([ROW])
    number = pa.array(np.arange(table.num_rows))
    asked = table.select(version.columns).append_column(KIND_COLUMN, pa.repeat("impression", table.num_rows))
    good, bad = split_rejects(asked.append_column(ROW, number), version.schema, _EVER)
    reasons: dict[int, str] = dict(zip(bad[ROW].to_pylist(), bad[REASON].to_pylist(), strict=True))
    rows = np.setdiff1d(np.arange(table.num_rows), np.fromiter(reasons, np.int64, len(reasons)))
    ids = good[EXAMPLE_ID].to_numpy()
    _, first = np.unique(ids, return_index=True)
    again = np.ones(len(ids), np.bool_)
    again[first] = False
    reasons |= dict.fromkeys(rows[again].tolist(), "example_id twice in the post")
    times = good[TIME].to_numpy()
    if ahead_s is not None:
        late = times > (time.time() + ahead_s) * 1e6
        reasons |= dict.fromkeys(rows[late].tolist(), f"time is more than {ahead_s:g} s in the future")
    names = period_of(times, period)
    for name in np.unique(names):
        try:
            check_leak(teacher, version.version, version.trained_through, str(name))
        except LabelError as error:
            reasons = dict.fromkeys(rows[names == name].tolist(), str(error)) | reasons
    keep = np.ones(table.num_rows, np.bool_)
    keep[list(reasons)] = False
    found = len(np.unique(names[keep[rows]]))
    if periods is not None and found > periods:
        raise DataError(f"the post's rows are of {found} {period}s; send those of at most {periods} at a time")
    numbered = table.append_column(ROW, number)
    refused = numbered.filter(pa.array(~keep))
    why = pa.array([reasons[row] for row in refused[ROW].to_pylist()], pa.string())
    if REASON in refused.column_names:
        refused = refused.drop_columns([REASON])
    return Post(numbered.filter(pa.array(keep)), refused.append_column(REASON, why))


def fitted(table: pa.Table, version: TeacherVersion) -> pa.Table:
    """Spooled rows in the example store's columns and types, as a version reads them.

    Raises:
        DataError: the version cannot read them (they were accepted for another one).
    """
    for name in version.columns:
        if name not in table.column_names:
            raise DataError(f"{version.version} reads column {name!r}, which the posted rows lack")
    asked = table.select(version.columns).append_column(KIND_COLUMN, pa.repeat("impression", table.num_rows))
    good, bad = split_rejects(asked, version.schema, _EVER)
    if bad.num_rows:
        raise DataError(f"{version.version} cannot read a row: {bad[REASON][0]} ({bad.num_rows} such rows)")
    return good.select(version.columns)


def period_of(time_us: npt.NDArray[np.int64], period: PeriodLength) -> npt.NDArray[np.str_]:
    """Names of the periods (UTC) of times in microseconds: ``[N] -> [N]``, ``2024-01-31`` or ``2024-01-31T13``."""
    length = datetime.timedelta(days=1) if period == "day" else datetime.timedelta(hours=1)
    units, place = np.unique(time_us // (length // datetime.timedelta(microseconds=1)), return_inverse=True)
    epoch = datetime.datetime(1970, 1, 1, tzinfo=_UTC)
    names = np.array([period_name(epoch + int(unit) * length, length) for unit in units], np.str_)
    return names[place] if len(units) else np.zeros(0, np.str_)


def first_reasons(rejects: pa.Table, limit: int = 100) -> list[dict[str, Any]]:
    """Position and reason of the first ``limit`` rejects, for the answer to a post."""
    part = rejects.slice(0, limit)
    pairs = zip(pc.cast(part[ROW], pa.int64()).to_pylist(), part[REASON].to_pylist(), strict=True)
    return [{"row": row, "reason": reason} for row, reason in pairs]
