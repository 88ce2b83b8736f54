"""The label store: a Delta table of teachers' predictions, written exactly once and read at pinned versions."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Field, Transaction
from deltalake import Schema as DeltaSchema
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.schema import PrimitiveType
from deltalake.transaction import AddAction

from rayfm.config import LabelError
from rayfm.labels import pins
from rayfm.labels.columns import (
    PARTITIONS,
    PERIOD,
    TASK_PREFIX,
    TEACHER,
    VERSION,
    check_leak,
    check_part,
    check_table,
    check_task,
    table_schema,
    task_column,
)
from rayfm.labels.index import LabelFile, LabelGroup, groups, label_files
from rayfm.labels.lane_file import LaneRecord, write_lane_file
from rayfm.labels.pins import Pin
from rayfm.schema import Kind, Task
from rayfm.snapshots.metadata.base import MetadataStore

RETRIES = 100

_CONFIGURATION = {
    # Old table versions stay readable for as long as they are pinned, whatever their age.
    "delta.enableExpiredLogCleanup": "false",
    "delta.dataSkippingNumIndexedCols": "-1",
}


@dataclasses.dataclass(frozen=True)
class Committed:
    """What a commit did."""

    table_version: int
    """A version of the table that holds all the records' lanes."""

    added: int
    """Lanes that became visible with this commit."""

    skipped: int
    """Lanes that had been committed before; their new files are never seen."""


class LabelStore:
    """Labels below ``<root>/labels``, made on the first commit. Any number of processes may write and read.

    Args:
        root: a local or mounted folder that writers and readers see.
        metadata: where pins live; None for a store that only commits and reads.
    """

    def __init__(self, root: str | Path, metadata: MetadataStore | None = None) -> None:
        self.root, self.metadata = Path(root), metadata
        self.folder = self.root / "labels"

    def __repr__(self) -> str:
        return f"LabelStore({str(self.root)!r})"

    def open(self, table_version: int | None = None) -> DeltaTable | None:
        """The Delta table at a version (None: the newest), checked; None where nothing was ever labelled.

        Raises:
            LabelError: the folder holds another table (naming the column that differs), or no such version.
        """
        try:
            table = DeltaTable(str(self.folder), version=table_version)
        except TableNotFoundError:
            return None
        except (DeltaError, OSError) as error:
            what = "the table" if table_version is None else f"version {table_version} of the table"
            raise LabelError(f"{self.folder}: cannot open {what} ({error}); see `rayfm labels list`") from None
        check_table(str(self.folder), pa.schema(table.schema().to_arrow()), table.metadata().partition_columns)
        return table

    def commit(
        self,
        records: Sequence[LaneRecord],
        *,
        app_id: str | None = None,
        app_version: int | None = None,
        retries: int = RETRIES,
    ) -> Committed:
        """Make the lanes that workers wrote visible, all at once and exactly once.

        A lane that the same teacher version has labelled already is skipped, so a job that runs twice, or races with
        its twin, doubles nothing. Commits are optimistic: each is decided on one version of the table and fails if
        that is no longer the newest; then the newest is loaded and the decision made anew. Every commit moves the
        application transaction ``lanes/<teacher>`` on.

        Args:
            records: what `write_lane_file` returned, of one teacher.
            app_id: for a writer that counts its batches: its name. Use few.
            app_version: the batch's number; the whole batch is skipped if the table has reached it.
            retries: how many other commits to give way to.

        Raises:
            LabelError: a leak, two records of one lane, a data file that is gone, or a table of another schema.
        """
        self._check(records)
        transactions = [] if app_id is None or app_version is None else [Transaction(app_id, app_version)]
        for attempt in range(retries + 1):
            try:
                table = self._writable({task for record in records for task in record.tasks})
                reached = None if app_id is None else table.transaction_version(app_id)
                if app_version is not None and reached is not None and reached >= app_version:
                    return Committed(table.version(), 0, len(records))
                new = self._missing(table, records)
                if not new and not transactions:
                    return Committed(table.version(), 0, len(records))
                guard = f"lanes/{records[0].teacher}" if records else "lanes"
                sequence = (table.transaction_version(guard) or 0) + 1
                table.create_write_transaction(
                    [_add_action(record) for record in new],
                    "append",
                    table.schema(),
                    list(PARTITIONS),
                    commit_properties=CommitProperties(
                        max_commit_retries=0, app_transactions=[*transactions, Transaction(guard, sequence)]
                    ),
                )
                table.update_incremental()
                return Committed(table.version(), len(new), len(records) - len(new))
            except CommitFailedError as error:
                if attempt == retries:
                    raise LabelError(
                        f"{self.folder}: gave way to {retries + 1} other commits ({error}); run the job again"
                    ) from None
                time.sleep(random.uniform(0, min(0.5, 0.01 * 2 ** min(attempt, 6))))
            except (DeltaError, OSError) as error:
                raise LabelError(f"{self.folder}: cannot commit ({error}); free space or fix access") from None
        raise AssertionError("unreachable")

    def label(
        self,
        teacher: str,
        version: str,
        trained_through: str | None,
        period: str,
        lanes: Iterable[tuple[Kind, int, pa.Table]],
        tasks: Sequence[Task],
    ) -> Committed:
        """Write and commit lanes from one process: `write_lane_file` for each, then `commit`.

        Args:
            teacher, version, trained_through, period, tasks: as `write_lane_file`'s.
            lanes: kind, lane and labels (as `write_lane_file`'s) of each.
        """
        check_leak(teacher, version, trained_through, period)
        return self.commit(
            [
                write_lane_file(
                    self.root,
                    teacher=teacher,
                    version=version,
                    trained_through=trained_through,
                    period=period,
                    kind=kind,
                    lane=lane,
                    labels=labels,
                    tasks=tasks,
                )
                for kind, lane, labels in lanes
            ]
        )

    def _check(self, records: Sequence[LaneRecord]) -> None:
        if len({record.teacher for record in records}) > 1:
            raise LabelError("a commit is of one teacher's lanes; commit each teacher's apart")
        places = set()
        for record in records:
            check_leak(record.teacher, record.version, record.trained_through, record.period)
            place = (record.version, record.period, record.kind, record.lane)
            if place in places:
                raise LabelError(
                    f"{record.teacher}@{record.version}: two records of {record.period}/{record.kind}/lane "
                    f"{record.lane} in one commit; give each lane once"
                )
            places.add(place)
            path = self.folder / record.path
            if not path.exists() or path.stat().st_size != record.bytes:
                raise LabelError(f"{path}: not what a worker wrote; label the lane again")

    def _writable(self, tasks: set[str]) -> DeltaTable:
        """The newest table, made where there is none, with a column for each task."""
        table = self.open()
        if table is None:
            table = self._create(tasks)
        missing = sorted(tasks - set(_tasks(table)))
        if missing:
            table.alter.add_columns(
                [Field(task_column(task), PrimitiveType("float")) for task in missing],
                commit_properties=CommitProperties(max_commit_retries=0),
            )
            table.update_incremental()
        return table

    def _create(self, tasks: set[str]) -> DeltaTable:
        try:
            DeltaTable.create(
                str(self.folder),
                DeltaSchema.from_arrow(table_schema(sorted(tasks))),
                mode="ignore",
                partition_by=list(PARTITIONS),
                configuration=_CONFIGURATION,
            )
        except DeltaError:
            table = self.open()  # another process was faster
            if table is None:
                raise
            return table
        table = self.open()
        assert table is not None
        return table

    def _missing(self, table: DeltaTable, records: Sequence[LaneRecord]) -> Sequence[LaneRecord]:
        """Records of lanes that the table does not hold yet."""
        held = set()
        for period in {record.period for record in records}:
            wanted = {record.version for record in records if record.period == period}
            for file in label_files(table, records[0].teacher, period):
                if any(file.may_hold(version) for version in wanted):
                    held |= {(part.period, part.version, part.kind, part.lane) for part in self._groups(table, file)}
        return [item for item in records if (item.period, item.version, item.kind, item.lane) not in held]

    def _groups(self, table: DeltaTable, file: LabelFile, tasks: tuple[str, ...] | None = None) -> Iterator[LabelGroup]:
        return groups(self.folder, file, _tasks(table), tasks)

    def _of_version(
        self,
        table: DeltaTable,
        teacher: str,
        version: str,
        period: str | None = None,
        tasks: tuple[str, ...] | None = None,
    ) -> Iterator[LabelGroup]:
        """What a teacher version has labelled of a period (None: of any)."""
        for file in label_files(table, teacher, period):
            if file.may_hold(version):
                yield from (part for part in self._groups(table, file, tasks) if part.version == version)

    def labelled_lanes(self, teacher: str, version: str, period: str) -> set[tuple[str, int]]:
        """Kind and lane of what is committed, so that a job that runs again scores only the rest."""
        table = self.open()
        if table is None:
            return set()
        return {(part.kind, part.lane) for part in self._of_version(table, teacher, version, period)}

    def tasks(self) -> tuple[str, ...]:
        """Tasks that any teacher has labels of."""
        table = self.open()
        return _tasks(table) if table is not None else ()

    def list(self, teacher: str | None = None, period: str | None = None) -> Sequence[LabelGroup]:
        """What is stored, by teacher, period, version, kind and lane, in that order."""
        table = self.open()
        if table is None:
            return []
        found = [part for file in label_files(table, teacher, period) for part in self._groups(table, file)]
        return sorted(found, key=lambda part: (part.teacher, part.period, part.version, part.kind, part.lane))

    def versions(self, teacher: str, period: str | None = None) -> Sequence[str]:
        """Versions of a teacher that labelled a period (None: any), oldest first."""
        return sorted({part.version for part in self.list(teacher, period)})

    def coverage(
        self,
        teacher: str,
        version: str,
        period: str,
        totals: Mapping[Kind, int],
        tasks: Sequence[str] | None = None,
    ) -> dict[Kind, float]:
        """Labelled rows over all rows, by kind (1 where there are none to label).

        Args:
            teacher, version, period: whose labels of what.
            totals: rows of the period by kind, from its manifest.
            tasks: a row counts if it has a prediction for each of these; None: for any task.

        Raises:
            LabelError: a task that has no column.
        """
        table = self.open()
        labelled = dict.fromkeys(totals, 0)
        if table is not None:
            for task in tasks or ():
                check_task(task, _tasks(table), str(self.folder))
            wanted = None if tasks is None else tuple(tasks)
            for part in self._of_version(table, teacher, version, period, wanted):
                for kind in totals:
                    labelled[kind] += part.labelled if part.kind == kind else 0
        return {kind: labelled[kind] / total if total else 1.0 for kind, total in totals.items()}

    def pin(
        self, teacher: str, version: str, owner: str, ttl_s: float = 3600.0, table_version: int | None = None
    ) -> Pin:
        """Hold a table version, for a look-up; extend the pin while it is in use.

        Args:
            teacher, version: whose labels will be read.
            owner: who holds it, for people to read.
            ttl_s: seconds that it lasts.
            table_version: the version to pin, such as a checkpoint's; None: the newest.

        Raises:
            LabelError: nothing is labelled by that teacher version, or vacuum has passed the table version.
        """
        table = self.open(table_version)
        if table is None:
            raise LabelError(f"{self.folder}: no labels yet; run `rayfm label` first")
        number = table.version()
        lease = None
        if self.metadata is not None:
            lease = pins.take(self.metadata, number, teacher, version, owner, ttl_s)
        try:
            if not any(True for _ in self._of_version(table, teacher, version)):
                known = ", ".join(self.versions(teacher)[-3:]) or "none"
                raise LabelError(f"{self.folder}: no labels of {teacher}@{version}; its newest versions: {known}")
        except BaseException:
            if self.metadata is not None and lease is not None:
                self.metadata.release(lease)
            raise
        return Pin(str(self.root), number, teacher, version, lease)

    def extend(self, pin: Pin, ttl_s: float = 3600.0) -> Pin:
        """The pin, alive for ``ttl_s`` seconds from now. Raises LeaseLost where it expired before."""
        if self.metadata is None or pin.lease is None:
            return pin
        return dataclasses.replace(pin, lease=self.metadata.extend(pin.lease, ttl_s))

    def release(self, pin: Pin) -> None:
        """Give a pin back."""
        if self.metadata is not None and pin.lease is not None:
            self.metadata.release(pin.lease)

    def expire(self, teacher: str, version: str, period: str | None = None) -> int:
        """Take a version's labels (of one period, or all) out of the newest table. Pinned table versions keep them.

        Returns:
            Rows taken out.
        """
        predicate = f"{TEACHER} = '{check_part('teacher', teacher)}' AND {VERSION} = '{check_part('version', version)}'"
        if period is not None:
            predicate += f" AND {PERIOD} = '{check_part('period', period)}'"
        table = self.open()
        if table is None:
            return 0
        try:
            return int(table.delete(predicate)["num_deleted_rows"])
        except (DeltaError, OSError) as error:
            raise LabelError(f"{self.folder}: cannot expire {teacher}@{version} ({error}); try again") from None

    def vacuum(self, retention_hours: int = 24) -> Sequence[str]:
        """Delete files that no pinned table version, nor a newer one, has, once they are ``retention_hours`` old.

        The age also protects files that workers have written and no commit has named yet, so it must exceed the longest
        label job.

        Returns:
            The files deleted.

        Raises:
            LabelError: the store has no metadata, so pins cannot be known.
        """
        if self.metadata is None:
            raise LabelError(f"{self.folder}: vacuum needs the metadata store that holds the pins; open it with one")
        table = self.open()
        if table is None:
            return []
        newest = table.version()
        lowest = pins.settle_floor(self.metadata, newest)
        try:
            deleted = table.vacuum(
                retention_hours=retention_hours,
                dry_run=False,
                enforce_retention_duration=False,
                full=True,
                keep_versions=[*range(lowest, newest + 1)],
            )
        except (DeltaError, OSError) as error:
            raise LabelError(f"{self.folder}: cannot vacuum ({error}); try again") from None
        return sorted(deleted)


def _tasks(table: DeltaTable) -> tuple[str, ...]:
    names = (field.name for field in table.schema().fields)
    return tuple(name.removeprefix(TASK_PREFIX) for name in names if name.startswith(TASK_PREFIX))


def _add_action(record: LaneRecord) -> AddAction:
    return AddAction(
        path=record.path,
        size=record.bytes,
        partition_values={TEACHER: record.teacher, PERIOD: record.period},
        modification_time=record.modified_ms,
        data_change=True,
        stats=record.stats,
    )
