"""Looking labels up by place: what a reader asks for each run of rows of a lane.

A lane's labels are sorted by position, so rows ``[start, stop)`` of the lane are one slice of them. The ids must agree;
where they do not (the period was prepared anew in between), the rows are joined by id within the lane. A row without a
label is masked, never guessed.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable

from rayfm.config import LabelError
from rayfm.data.columns import one_array
from rayfm.labels.columns import EXAMPLE_ID, KIND, LANE, REPRESENTATION, ROW, TASK_PREFIX, VERSION, task_column
from rayfm.labels.delta import open_table
from rayfm.labels.files import Files
from rayfm.labels.index import LabelFile, RowGroup, label_files, open_file, row_groups, unreadable
from rayfm.labels.pins import Pin
from rayfm.labels.storage import Storage
from rayfm.schema import Kind

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

KEPT_GROUPS = 2
"""Row groups of a lane that stay in memory: runs of rows are asked for in order, and one may straddle two groups."""


@dataclasses.dataclass(frozen=True)
class LabelRows:
    """Labels in the order of their positions. Shape letters: N labels, S tasks, R width of the representation."""

    row: Int64
    example_id: Int64
    values: Float32
    """``[N, S]``, 0 where there is none."""

    mask: Bool
    """``[N, S]``."""

    vectors: Float32
    """``[N, R]``, 0 where there is none; R is 0 where none is asked for."""

    vector_mask: Bool
    """``[N]``."""

    @classmethod
    def empty(cls, tasks: int, width: int, rows: int = 0) -> LabelRows:
        """Rows without anything."""
        return cls(
            np.zeros(rows, np.int64),
            np.zeros(rows, np.int64),
            np.zeros((rows, tasks), np.float32),
            np.zeros((rows, tasks), np.bool_),
            np.zeros((rows, width), np.float32),
            np.zeros(rows, np.bool_),
        )

    def take(self, rows: slice | Int64 | Bool) -> LabelRows:
        """Some of the rows; a slice makes views."""
        return LabelRows(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))

    def put(self, rows: Int64, others: LabelRows) -> None:
        """Write what ``others`` say to ``rows``."""
        for name in ("values", "mask", "vectors", "vector_mask"):
            getattr(self, name)[rows] = getattr(others, name)


class LaneLabels:
    """One lane's labels by one teacher version.

    Args:
        data: the table's files.
        paths: those that may hold them.
        version, kind, lane: which rows of the files are meant.
        tasks: the columns of the answers.
        name: for messages.
        width: R, the width of the representations to read; 0 reads none.
        known: path -> row groups of files whose footers were read, shared by lanes; added to.
    """

    def __init__(
        self,
        data: Files,
        paths: Sequence[str],
        version: str,
        kind: Kind,
        lane: int,
        tasks: tuple[str, ...],
        name: str,
        width: int = 0,
        known: dict[str, list[RowGroup]] | None = None,
    ) -> None:
        self._known = {} if known is None else known
        self.version, self.kind, self.lane, self.tasks, self.name = version, kind, lane, tasks, name
        self.width, self._data = width, data
        self._groups = sorted((group for path in paths for group in self._row_groups(path)), key=_positions)
        bounds = np.array([_positions(group) for group in self._groups], np.int64).reshape(-1, 2)
        self._low, self._high = bounds[:, 0], bounds[:, 1]
        self._reach = np.maximum.accumulate(self._high)
        self._kept: OrderedDict[tuple[str, int], LabelRows] = OrderedDict()
        self._by_id: tuple[Int64, LabelRows] | None = None

    def rows(self, start: int, stop: int, example_ids: Int64) -> tuple[Float32, Bool]:
        """Labels of rows ``[start, stop)`` of the lane, whose ids are ``example_ids`` ``[n]``.

        Returns:
            Values float32 ``[n, S]`` (0 where there is none) and mask ``[n, S]``, for n = stop - start. Not to be
            written to.

        Raises:
            LabelError: a data file is missing, corrupt, or says two things about one row.
        """
        found = self._of(start, stop, example_ids)
        return found.values, found.mask

    def vectors(self, start: int, stop: int, example_ids: Int64) -> tuple[Float32, Bool]:
        """Representations ``[n, R]`` (0 where there is none) and mask ``[n]``, as `rows`.

        Raises:
            LabelError: as `rows`; or representations are not stored, or of another width.
        """
        found = self._of(start, stop, example_ids)
        return found.vectors, found.vector_mask

    def _of(self, start: int, stop: int, example_ids: Int64) -> LabelRows:
        """What is known of rows ``[start, stop)``, in that order: views where the positions agree."""
        if len(example_ids) != stop - start:
            raise ValueError(f"{len(example_ids)} ids for rows [{start}, {stop})")
        found = self._between(start, stop)
        if len(found.row) == stop - start and np.array_equal(found.example_id, example_ids):
            return found
        answer = LabelRows.empty(len(self.tasks), self.width, stop - start)
        placed = np.zeros(stop - start, np.bool_)
        place = found.row - start
        agree = found.example_id == example_ids[place]
        answer.put(place[agree], found.take(agree))
        placed[place[agree]] = True
        rest = np.flatnonzero(~placed)
        order, lane = self._joined()
        if len(rest) and len(order):
            sorted_ids = lane.example_id[order]
            at = np.minimum(np.searchsorted(sorted_ids, example_ids[rest]), len(order) - 1)
            hit = sorted_ids[at] == example_ids[rest]
            answer.put(rest[hit], lane.take(order[at[hit]]))
        return answer

    def _row_groups(self, path: str) -> list[RowGroup]:
        """The row groups of a file that may hold rows of the lane."""
        file = open_file(self._data, path)
        names = file.schema_arrow.names
        for task in self.tasks:
            if task_column(task) not in names:
                known = ", ".join(name.removeprefix(TASK_PREFIX) for name in names if name.startswith(TASK_PREFIX))
                raise LabelError(f"{self.name}: no predictions of task {task!r}; there are: {known}")
        if self.width and REPRESENTATION not in names:
            raise self._no_representation()
        if path not in self._known:
            self._known[path] = row_groups(file, path)
        return [group for group in self._known[path] if group.may_hold(self.version, self.kind, self.lane)]

    def _between(self, start: int, stop: int) -> LabelRows:
        """Labels at positions ``[start, stop)``."""
        parts = [self._read(self._groups[index]) for index in self._holding(start, stop)]
        for group in list(self._kept)[: max(0, len(self._kept) - max(KEPT_GROUPS, len(parts)))]:
            del self._kept[group]
        cut = []
        for part in parts:
            low, high = np.searchsorted(part.row, (start, stop))
            cut.append(part.take(slice(low, high)))
        return self._merged(cut)

    def _holding(self, start: int, stop: int) -> list[int]:
        """Places of the row groups that may hold positions ``[start, stop)``.

        Two searches, as a lane is read in as many slices as it has groups. Groups may overlap, and are in the order of
        their first positions: those before ``first`` end before ``start``, as ``reach`` is the furthest so far.
        """
        first, last = np.searchsorted(self._reach, start), np.searchsorted(self._low, stop)
        return [index for index in range(int(first), int(last)) if self._high[index] >= start]

    def _joined(self) -> tuple[Int64, LabelRows]:
        """The whole lane, and the order of its ids. Kept, as a lane that needs it once needs it again."""
        if self._by_id is None:
            lane = self._merged([self._load(group) for group in self._groups])
            self._by_id = np.argsort(lane.example_id, kind="stable"), lane
        return self._by_id

    def _merged(self, parts: Sequence[LabelRows]) -> LabelRows:
        if not parts:
            return LabelRows.empty(len(self.tasks), self.width)
        merged = parts[0]
        if len(parts) > 1:
            fields = [field.name for field in dataclasses.fields(LabelRows)]
            merged = LabelRows(*(np.concatenate([getattr(part, name) for part in parts]) for name in fields))
        if (np.diff(merged.row) > 0).all():
            return merged
        order = np.argsort(merged.row, kind="stable")
        merged = merged.take(order)
        twice = np.flatnonzero(np.diff(merged.row) == 0)
        if len(twice):
            raise LabelError(
                f"{self.name}: row {merged.row[twice[0]]} is labelled twice; expire the version, label again"
            )
        return merged

    def _read(self, group: RowGroup) -> LabelRows:
        key = (group.path, group.index)
        if key not in self._kept:
            self._kept[key] = self._load(group)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _load(self, group: RowGroup) -> LabelRows:
        mixed = group.place is None
        columns = [ROW, EXAMPLE_ID, *map(task_column, self.tasks), *((VERSION, KIND, LANE) if mixed else ())]
        columns += [REPRESENTATION] if self.width else []
        file = open_file(self._data, group.path)
        try:
            table = file.read_row_group(group.index, columns=columns, use_threads=False)
        except (OSError, pa.ArrowInvalid) as error:
            raise unreadable(group.path, error) from None
        if mixed:
            ours = pc.and_(
                pc.and_(pc.equal(table[VERSION], self.version), pc.equal(table[KIND], self.kind)),
                pc.equal(table[LANE], self.lane),
            )
            table = table.filter(ours)
        empty = LabelRows.empty(len(self.tasks), self.width, table.num_rows)
        values, mask, vectors, vector_mask = empty.values, empty.mask, empty.vectors, empty.vector_mask
        if self.tasks:
            columns_of_tasks = [table[task_column(task)] for task in self.tasks]
            values = np.stack([pc.fill_null(column, 0.0).to_numpy() for column in columns_of_tasks], 1)
            mask = np.stack([column.is_valid().to_numpy() for column in columns_of_tasks], 1)
        if self.width:
            vectors, vector_mask = self._representations(one_array(table[REPRESENTATION]))
        for array in (values, mask, vectors, vector_mask):
            array.setflags(write=False)  # answers are views of them
        rows, ids = table[ROW].to_numpy(), table[EXAMPLE_ID].to_numpy()
        return self._merged([LabelRows(rows, ids, values, mask, vectors, vector_mask)])

    def _representations(self, column: pa.Array) -> tuple[Float32, Bool]:
        """``[N, R]`` and mask ``[N]``: without a copy where every row has one."""
        known: Bool = column.is_valid().to_numpy(zero_copy_only=False)
        flat: Float32 = column.flatten().to_numpy(zero_copy_only=False)  # leaves out what stands behind a null
        if len(known) and not known.any():
            raise self._no_representation()
        # A compacted file has lists of any length in place of fixed-size ones.
        lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)[known]
        if (lengths != self.width).any():
            raise LabelError(
                f"{self.name}: its representations have width {int(lengths[lengths != self.width][0])}, not "
                f"{self.width}; give the objective the teacher's own width"
            )
        stored = flat.reshape(-1, self.width)
        if known.all():
            return stored, known
        vectors = np.zeros((len(known), self.width), np.float32)
        vectors[known] = stored
        return vectors, known

    def _no_representation(self) -> LabelError:
        return LabelError(
            f"{self.name}: no representations are stored; set the teacher's 'store_representation: true', and label "
            "the period with a newer version, or again once this one's labels are expired"
        )


class LabelLookup:
    """A teacher version's labels in one version of the table, by lane: the supervision that a reader is given.

    Pickles without what it has read, so it can travel to reading tasks. One prefetching thread may use it beside the
    training thread.

    Args:
        source: a pin; or the store's root (as `LabelStore`'s) and a table version (None: the newest now).
        teacher, version: whose labels.
        tasks: which predictions.
        width: R, to look up representations too; 0 for none.

    Attributes:
        columns: ``<teacher>/<task>`` for each task.
        name: the teacher's, by which a batch knows its representation.

    Raises:
        LabelError: no such table version, or a pin of another teacher or version.
    """

    def __init__(
        self,
        source: Pin | tuple[str | Path | Storage, int | None],
        teacher: str,
        version: str,
        tasks: Sequence[str],
        width: int = 0,
    ) -> None:
        if isinstance(source, Pin):
            if (source.teacher, source.version) != (teacher, version):
                raise LabelError(
                    f"the pin is of {source.teacher}@{source.version}, not of {teacher}@{version}; pin what is read"
                )
            source = source.storage, source.table_version
        storage, number = Storage.of(source[0]), source[1]
        if not tasks and not width:
            raise LabelError(f"no tasks of {teacher}@{version} to look up; name some")
        table = open_table(storage, number)
        if table is None:
            raise LabelError(f"{storage.table}: no labels yet; run `rayfm label` first")
        self.storage, self.teacher, self.version, self.tasks = storage, teacher, version, tuple(tasks)
        self.table_version: int = table.version()
        self.columns = tuple(f"{teacher}/{task}" for task in tasks)
        self.name, self.width = teacher, width
        self._files = self._by_period(table)
        self._lanes: dict[tuple[str, Kind, int], LaneLabels] = {}
        self._row_groups: dict[str, list[RowGroup]] = {}
        self._lock, self._data = threading.Lock(), storage.files()

    def _by_period(self, table: DeltaTable) -> dict[str, list[LabelFile]]:
        files: dict[str, list[LabelFile]] = {}
        for file in label_files(table, self.teacher):
            if file.may_hold(self.version):
                files.setdefault(file.period, []).append(file)
        return files

    def __getstate__(self) -> dict[str, Any]:
        left = ("_lock", "_data")
        return {name: value for name, value in self.__dict__.items() if name not in left} | {
            "_lanes": {},
            "_row_groups": {},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock, self._data = threading.Lock(), self.storage.files()

    def lane(self, period: str, kind: Kind, lane: int) -> LaneLabels:
        """The labels of one lane; empty where there are none."""
        paths = [file.path for file in self._files.get(period, []) if file.may_hold(self.version, kind, lane)]
        name = f"labels of {self.teacher}@{self.version} for {period}/{kind}/lane {lane}"
        return LaneLabels(self._data, paths, self.version, kind, lane, self.tasks, name, self.width, self._row_groups)

    def rows(self, period: str, kind: Kind, lane: int, start: int, stop: int, ids: Int64) -> tuple[Float32, Bool]:
        """Values ``[n, S]`` and mask ``[n, S]`` of rows ``[start, stop)`` of a lane whose example ids are ``ids``.

        Lanes stay open until another period is asked for: reads go through the periods in order.
        """
        with self._lock:
            return self._lane(period, kind, lane).rows(start, stop, ids)

    def vectors(self, period: str, kind: Kind, lane: int, start: int, stop: int, ids: Int64) -> tuple[Float32, Bool]:
        """Representations ``[n, R]`` and mask ``[n]``, as `rows`; views of what was read, where that is possible."""
        with self._lock:
            return self._lane(period, kind, lane).vectors(start, stop, ids)

    def _lane(self, period: str, kind: Kind, lane: int) -> LaneLabels:
        key = (period, kind, lane)
        if key not in self._lanes:
            if any(known != period for known, _, _ in self._lanes):
                self._lanes.clear()
                self._row_groups.clear()
            self._lanes[key] = self.lane(period, kind, lane)
        return self._lanes[key]


def _positions(group: RowGroup) -> tuple[int, int]:
    """The first and last position that a row group may hold."""
    low, high = group.row.low, group.row.high
    return (0, np.iinfo(np.int64).max) if low is None or high is None else (low, high)
