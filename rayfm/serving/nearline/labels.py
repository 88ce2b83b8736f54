"""The near-line label table: a Delta table beside the label store's, one row per (ticket, row of its post).

Near-line rows lie in no lane of an example store, so they have no place in the label store's table, which is read by
place. They live in ``<root>/nearline/labels``:

==================  ===================================================================
``teacher``         partition
``period``          partition: the UTC day (or hour) of the row's ``time``
``version``         the snapshot that made the prediction
``ticket``, ``row`` the post, and the row's position in it; files are sorted by the two
``example_id``      what readers look up by
``task_<task>``     the prediction; null where that teacher does not predict the task
==================  ===================================================================

Exactly once: a commit is decided on one version of the table and fails where that is no longer the newest, and then
it is decided anew. To decide is to look whether the table has rows of a ticket already: the table itself is the record
of what was committed, so nothing can disagree with it. (One application transaction per ticket would do the same, but
Delta Lake keeps every application id for ever.) Tickets begin with their time, so a look at the files' lowest and
highest ticket leaves the few that were written at about the same time, and those are read.
"""

from __future__ import annotations

import dataclasses
import json
import random
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, Field, Transaction
from deltalake import Schema as DeltaSchema
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.schema import PrimitiveType
from deltalake.transaction import AddAction

from rayfm.config import CapacityError, LabelError
from rayfm.config.durable import sync_dir, sync_file, write_durably
from rayfm.labels.columns import (
    EXAMPLE_ID,
    PERIOD,
    ROW,
    TASK_PREFIX,
    TEACHER,
    VERSION,
    check_part,
    check_task,
    task_column,
)

TICKET = "ticket"
PARTITIONS = (TEACHER, PERIOD)
PLACE: dict[str, pa.DataType] = {
    VERSION: pa.string(),
    TICKET: pa.string(),
    ROW: pa.int64(),
    EXAMPLE_ID: pa.int64(),
}
RETRIES = 100

_WRITTEN_BACK_S = 600.0
"""Age at which a file is durable whoever wrote it: systems write back within a minute, and clocks may differ a bit."""

_CONFIGURATION = {
    # Old table versions stay readable, as the label store's do.
    "delta.enableExpiredLogCleanup": "false",
    "delta.dataSkippingNumIndexedCols": "-1",
}


@dataclasses.dataclass(frozen=True)
class Appended:
    """What `NearLineLabels.append` did."""

    table_version: int
    """A version of the table that holds all the tickets' rows."""

    added: frozenset[str]
    """Tickets whose rows this commit made visible."""

    held: frozenset[str]
    """Tickets whose rows were there already."""


@dataclasses.dataclass(frozen=True)
class NearLineRows:
    """Labels found for N example ids. Shape letters: N ids, S tasks."""

    values: npt.NDArray[np.float32]
    """``[N, S]``, 0 where there is none."""

    mask: npt.NDArray[np.bool_]
    """``[N, S]``."""


@dataclasses.dataclass(frozen=True)
class PeriodLabels:
    """What one snapshot said of a period's examples, of each once. Shape letters: M examples, N ids asked, S tasks."""

    example_id: npt.NDArray[np.int64]
    """``[M]``, rising."""

    values: npt.NDArray[np.float32]
    """``[M, S]``, 0 where there is none."""

    mask: npt.NDArray[np.bool_]
    """``[M, S]``."""

    def of(self, example_id: npt.NDArray[np.int64]) -> NearLineRows:
        """Labels of examples by their ids: ``[N] -> [N, S]``; masked where there is none."""
        if not len(self.example_id):
            shape = (len(example_id), self.values.shape[1])
            return NearLineRows(np.zeros(shape, np.float32), np.zeros(shape, np.bool_))
        place = np.minimum(np.searchsorted(self.example_id, example_id), len(self.example_id) - 1)
        mask = self.mask[place] & (self.example_id[place] == example_id)[:, None]
        return NearLineRows(np.where(mask, self.values[place], np.float32(0.0)), mask)


class NearLineLabels:
    """The table below ``<root>/nearline/labels``, made on the first commit. Any number of processes may use it.

    Args:
        root: a local or mounted folder that writers and readers see.
    """

    def __init__(self, root: str | Path) -> None:
        self.folder = Path(root) / "nearline" / "labels"
        self._synced = -1  # the table version up to which this object knows the log to be durable
        self._folders: set[Path] = set()  # those whose entries in the folders above are

    def open(self, table_version: int | None = None) -> DeltaTable | None:
        """The Delta table at a version (None: the newest); None where nothing was ever labelled.

        Raises:
            LabelError: the folder holds another table, or no such version.
        """
        try:
            table = DeltaTable(str(self.folder), version=table_version)
        except TableNotFoundError:
            return None
        except (DeltaError, OSError) as error:
            raise LabelError(f"{self.folder}: cannot open the near-line label table ({error})") from None
        names = {field.name for field in table.schema().fields}
        missing = [name for name in (*PARTITIONS, *PLACE) if name not in names]
        if missing:
            raise LabelError(
                f"{self.folder}: not a near-line label table: column {missing[0]!r} is missing; name another root"
            )
        return table

    def append(self, teacher: str, rows: pa.Table, retries: int = RETRIES) -> Appended:
        """Make rows visible, all at once; those of a ticket that the table has rows of already are left out.

        Args:
            teacher: whose predictions they are.
            rows: ``period`` (text), `PLACE`'s columns, and a float32 column per task, called ``task_<task>``. The
                rows of a ticket must all be there.
            retries: how many other commits to give way to.

        Raises:
            LabelError: a name with an odd character.
            CapacityError: the disk is full, or too many others commit; nothing was committed, try again.
        """
        check_part("teacher", teacher)
        wanted = frozenset(pc.unique(rows[TICKET]).to_pylist())
        tasks = [name for name in rows.column_names if name.startswith(TASK_PREFIX)]
        held: frozenset[str] = frozenset()
        actions: list[AddAction] | None = None
        for attempt in range(retries + 1):
            try:
                table = self._writable(tasks)
                now_held = self.held(table, teacher, wanted)
                if now_held != held:
                    held, actions = now_held, None
                if held == wanted:
                    self.sync(table)
                    return Appended(table.version(), frozenset(), held)
                if actions is None:
                    rest = rows.filter(pc.invert(pc.is_in(rows[TICKET], pa.array(sorted(held), pa.string()))))
                    actions = self._write(teacher, rest)
                guard = f"nearline/{teacher}"
                sequence = (table.transaction_version(guard) or 0) + 1
                table.create_write_transaction(
                    [*actions],
                    "append",
                    table.schema(),
                    list(PARTITIONS),
                    commit_properties=CommitProperties(
                        max_commit_retries=0, app_transactions=[Transaction(guard, sequence)]
                    ),
                )
                table.update_incremental()
                self.sync(table)
                return Appended(table.version(), wanted - held, held)
            except CommitFailedError:
                time.sleep(random.uniform(0, min(0.5, 0.01 * 2 ** min(attempt, 6))))
            except (DeltaError, OSError) as error:
                raise CapacityError(f"{self.folder}: cannot commit ({error}); free space or fix access") from None
        raise CapacityError(f"{self.folder}: gave way to {retries + 1} other commits; run fewer writers")

    def sync(self, table: DeltaTable) -> None:
        """Make a table's version durable, with all before it, whoever committed them: call it before spooled rows go.

        A commit stands in the system's cache alone until somebody syncs it, and its writer may be slower than the one
        who builds on it, or dead. Commits below a version that this object has synced, or that are older than ten
        minutes, are durable already.

        Raises:
            OSError: the disk does not take it.
        """
        log, newest = self.folder / "_delta_log", table.version()
        before = time.time() - _WRITTEN_BACK_S
        for version in range(newest, self._synced, -1):
            path = log / f"{version:020d}.json"
            sync_file(path)
            checkpoint = log / f"{version:020d}.checkpoint.parquet"
            for extra in (checkpoint, log / "_last_checkpoint") if checkpoint.exists() else ():
                sync_file(extra)
            if path.stat().st_mtime < before:
                break
        self._sync_folders(log)
        self._synced = max(self._synced, newest)

    def held(self, table: DeltaTable, teacher: str, tickets: frozenset[str]) -> frozenset[str]:
        """Those of ``tickets`` that a table has rows of."""
        if not tickets:
            return frozenset()
        actions = pa.table(table.get_add_actions(flatten=True))
        if not actions.num_rows:
            return frozenset()
        low, high = min(tickets), max(tickets)
        near = pc.and_(
            pc.equal(actions[f"partition.{TEACHER}"], teacher),
            pc.and_(
                pc.fill_null(pc.less_equal(actions[f"min.{TICKET}"], high), True),
                pc.fill_null(pc.greater_equal(actions[f"max.{TICKET}"], low), True),
            ),
        )
        found: set[str] = set()
        for path in actions.filter(near)["path"].to_pylist():
            found |= set(pc.unique(self._read(path, [TICKET])[TICKET]).to_pylist()) & tickets
        return frozenset(found)

    def lookup(
        self,
        teacher: str,
        version: str,
        period: str,
        example_id: npt.NDArray[np.int64],
        tasks: Sequence[str],
        table_version: int | None = None,
    ) -> NearLineRows:
        """Labels of examples by one snapshot, by their ids: ``[N] -> [N, S]``.

        An example that was posted several times has several labels by the same snapshot; the first ticket's is taken,
        so the answer for a table version never changes.

        Raises:
            LabelError: a task that has no column; no such table version.
        """
        table = self.open(table_version)
        if table is not None:
            for task in tasks:
                check_task(task, self.tasks(table), str(self.folder))
        return self.of_period(teacher, version, period, tasks, table_version).of(example_id)

    def of_period(
        self, teacher: str, version: str, period: str, tasks: Sequence[str], table_version: int | None = None
    ) -> PeriodLabels:
        """All labels of a period by one snapshot, for many look-ups; which of several is taken, as `lookup` says.

        Raises:
            LabelError: the snapshot's rows have no column for a task; no such table version.
        """
        found = self.rows(teacher, period, table_version)
        found = found.filter(pc.equal(found[VERSION], version)).sort_by([(TICKET, "ascending"), (ROW, "ascending")])
        ids, first = np.unique(found[EXAMPLE_ID].to_numpy(), return_index=True)
        values = np.zeros((len(ids), len(tasks)), np.float32)
        mask = np.zeros(values.shape, np.bool_)
        for column, task in enumerate(tasks if len(ids) else ()):
            known = [name.removeprefix(TASK_PREFIX) for name in found.column_names if name.startswith(TASK_PREFIX)]
            check_task(task, known, str(self.folder))
            stored = found[task_column(task)]
            mask[:, column] = stored.is_valid().to_numpy()[first]
            values[:, column] = pc.fill_null(stored, 0.0).to_numpy()[first]
        return PeriodLabels(ids, values, mask)

    def pin(self, teacher: str, period: str, table_version: int | None = None) -> int | None:
        """The table version that all readers of a period's labels are to read: old ones never change, nor go away.

        Args:
            teacher, period: what will be looked up.
            table_version: the one wanted; None: the newest now.

        Returns:
            It; None where nothing was ever labelled, and no version was asked for.

        Raises:
            LabelError: no such version; or the teacher's near-line periods are hours and ``period`` is a day, or the
                other way round, so that nothing would be found.
        """
        newest = self.open()
        if table_version is not None and (newest is None or table_version > newest.version()):
            there = "nothing was labelled near-line yet" if newest is None else f"the newest is {newest.version()}"
            raise LabelError(
                f"{self.folder}: has no version {table_version} of near-line labels ({there}); state one that is "
                "there, or none for the newest"
            )
        table = newest if table_version is None else self.open(table_version)
        if table is None:
            return None
        actions = pa.table(table.get_add_actions(flatten=True))
        ours = actions.filter(pc.equal(actions[f"partition.{TEACHER}"], teacher)) if actions.num_rows else actions
        periods = pc.unique(ours[f"partition.{PERIOD}"]).to_pylist() if ours.num_rows else []
        other = [name for name in periods if ("T" in name) != ("T" in period)]
        if other:
            raise LabelError(
                f"{self.folder}: labels of {teacher!r} are by periods like {min(other)}, not like {period}; set "
                f"'period: {'hour' if 'T' in period else 'day'}' where near-line labels are made"
            )
        return table.version()

    def rows(self, teacher: str, period: str | None = None, table_version: int | None = None) -> pa.Table:
        """All rows of a teacher (of one period), with ``period``, in no particular order."""
        table = self.open(table_version)
        tasks = [] if table is None else [task_column(task) for task in self.tasks(table)]
        fields = [(PERIOD, pa.string()), *PLACE.items(), *((name, pa.float32()) for name in tasks)]
        schema = pa.schema(fields)
        parts = [schema.empty_table()]
        if table is not None:
            for action in pa.table(table.get_add_actions(flatten=True)).to_pylist():  # one row a file
                where = action[f"partition.{PERIOD}"]
                if action[f"partition.{TEACHER}"] != teacher or period not in (None, where):
                    continue
                part = self._read(action["path"], [*PLACE, *tasks])
                columns = [pa.repeat(where, part.num_rows)]
                for field in list(schema)[1:]:
                    known = field.name in part.column_names
                    columns.append(part[field.name].cast(field.type) if known else pa.nulls(len(part), field.type))
                parts.append(pa.table(columns, schema=schema))
        return pa.concat_tables(parts)

    def tasks(self, table: DeltaTable) -> tuple[str, ...]:
        """Tasks that the table has a column for."""
        names = (field.name for field in table.schema().fields)
        return tuple(name.removeprefix(TASK_PREFIX) for name in names if name.startswith(TASK_PREFIX))

    def compact(self, teacher: str, period: str) -> int:
        """Join a period's small files; old table versions keep them. Returns how many files were replaced.

        Raises:
            CapacityError: the disk is full, or a file is gone.
        """
        table = self.open()
        if table is None:
            return 0
        filters = [(TEACHER, "=", check_part("teacher", teacher)), (PERIOD, "=", check_part("period", period))]
        try:
            before = _paths(table)
            replaced = int(table.optimize.compact(partition_filters=filters)["numFilesRemoved"])
            for path in _paths(table) - before:
                sync_file(self.folder / path)
            self.sync(table)
            return replaced
        except (DeltaError, OSError) as error:
            raise CapacityError(f"{self.folder}: cannot compact {teacher}/{period} ({error}); try again") from None

    def _writable(self, tasks: Sequence[str]) -> DeltaTable:
        table = self.open()
        if table is None:
            fields = [(name, pa.string()) for name in PARTITIONS] + [*PLACE.items()]
            schema = pa.schema([*fields, *((name, pa.float32()) for name in tasks)])
            DeltaTable.create(
                str(self.folder),
                DeltaSchema.from_arrow(schema),
                mode="ignore",
                partition_by=list(PARTITIONS),
                configuration=_CONFIGURATION,
            )
            table = self.open()
            assert table is not None
        known = {field.name for field in table.schema().fields}
        missing = sorted(set(tasks) - known)
        if missing:
            table.alter.add_columns(
                [Field(name, PrimitiveType("float")) for name in missing],
                commit_properties=CommitProperties(max_commit_retries=0),
            )
            table.update_incremental()
        return table

    def _write(self, teacher: str, rows: pa.Table) -> list[AddAction]:
        """A durable data file for each period of the rows; visible once committed."""
        actions = []
        for period in pc.unique(rows[PERIOD]).to_pylist():
            part = rows.filter(pc.equal(rows[PERIOD], period)).drop_columns([PERIOD])
            part = part.sort_by([(TICKET, "ascending"), (ROW, "ascending")])
            relative = f"{TEACHER}={teacher}/{PERIOD}={check_part('period', period)}/{uuid.uuid4().hex}.parquet"
            path = self.folder / relative
            size = write_durably(path, lambda file, part=part: pq.write_table(part, file, compression="zstd"))  # type: ignore[misc]
            self._sync_folders(path.parent)
            actions.append(
                AddAction(
                    path=relative,
                    size=size,
                    partition_values={TEACHER: teacher, PERIOD: period},
                    modification_time=int(path.stat().st_mtime * 1000),
                    data_change=True,
                    stats=json.dumps(_stats(part)),
                )
            )
        return actions

    def _sync_folders(self, folder: Path) -> None:
        """Make the way from the root to a folder durable, once."""
        way = []
        while folder != self.folder.parent.parent and folder not in self._folders:
            sync_dir(folder.parent)
            way.append(folder)
            folder = folder.parent
        self._folders.update(way)

    def _read(self, path: str, columns: list[str]) -> pa.Table:
        try:
            with pq.ParquetFile(self.folder / path) as file:
                names = set(file.schema_arrow.names)
                return file.read(columns=[name for name in columns if name in names], use_threads=False)
        except (OSError, pa.ArrowInvalid) as error:
            raise LabelError(f"{self.folder / path}: missing or corrupt label file ({error})") from None


def _paths(table: DeltaTable) -> set[str]:
    """Data files of a table's version."""
    actions = pa.table(table.get_add_actions(flatten=True))
    return set(actions["path"].to_pylist()) if actions.num_rows else set()


def _stats(data: pa.Table) -> dict[str, object]:
    """Row count, null counts, and the bounds of what look-ups prune by."""
    bounds = {name: pc.min_max(data[name]) for name in (VERSION, TICKET, ROW, EXAMPLE_ID)}
    return {
        "numRecords": data.num_rows,
        "nullCount": {name: data[name].null_count for name in data.column_names},
        "minValues": {name: bound["min"].as_py() for name, bound in bounds.items()},
        "maxValues": {name: bound["max"].as_py() for name, bound in bounds.items()},
    }
