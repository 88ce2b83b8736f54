"""The label store: a Delta table of teachers' predictions, written exactly once and read at pinned versions."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
from deltalake import DeltaTable, Transaction

from rayfm.config import LabelError, nearest
from rayfm.labels import pins
from rayfm.labels.columns import check_leak, check_task
from rayfm.labels.delta import (
    RETRIES,
    Change,
    NewFile,
    add_tasks,
    apply,
    create_table,
    oldest_in_use,
    open_table,
    table_tasks,
    taking_turns,
    was_expired,
)
from rayfm.labels.files import one_line
from rayfm.labels.index import LabelGroup, groups, label_files
from rayfm.labels.lane_file import LaneRecord, write_lane_file
from rayfm.labels.pins import Pin
from rayfm.labels.storage import Storage
from rayfm.schema import Kind, Task
from rayfm.snapshots.metadata.base import Lease, MetadataStore


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
        root: a local or mounted folder that writers and readers see, or ``s3://bucket/prefix``, or a `Storage`, which
            also says how to reach the bucket.
        metadata: where pins live; None for a store that only commits and reads.

    Raises:
        ConfigError: the root is neither.
    """

    def __init__(self, root: str | Path | Storage, metadata: MetadataStore | None = None) -> None:
        self.storage, self.metadata = Storage.of(root), metadata
        self.files = self.storage.files()

    def __repr__(self) -> str:
        return f"LabelStore({self.storage.root!r})"

    @property
    def root(self) -> str:
        """The folder or URL that it was opened with."""
        return self.storage.root

    def open(self, table_version: int | None = None) -> DeltaTable | None:
        """The Delta table at a version (None: the newest), checked; None where nothing was ever labelled.

        Raises:
            LabelError: the folder holds another table (naming the column that differs), or no such version.
        """
        return open_table(self.storage, table_version)

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
        its twin, doubles nothing. Commits take turns (`rayfm.labels.delta`): each is decided on the version of the
        table that it follows.

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

        def attempt() -> Committed:
            table = self._writable({task for record in records for task in record.tasks})
            reached = None if app_id is None else table.transaction_version(app_id)
            if app_version is not None and reached is not None and reached >= app_version:
                return Committed(table.version(), 0, len(records))
            new = self._missing(table, records)
            if not new and not transactions:
                return Committed(table.version(), 0, len(records))
            there = {file.path for file in self.written(new)}
            for record in new:
                if record.path not in there:
                    raise LabelError(
                        f"{self.storage.table}/{record.path}: not what a worker wrote; label the lane again"
                    )
            version = apply(table, Change(add=new, transactions=transactions))
            return Committed(version, len(new), len(records) - len(new))

        return taking_turns(self.storage, attempt, "commit", retries)

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
                    self.storage,
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

    def written(self, files: Sequence[NewFile]) -> Sequence[NewFile]:
        """Those of ``files`` that lie there as they were written: the last look before a commit names them.

        Raises:
            LabelError: the storage cannot be asked.
        """
        try:
            sizes = self.files.sizes([file.path for file in files])
        except OSError as error:
            raise LabelError(
                f"{self.storage.table}: cannot see the data files ({one_line(error)}); check access"
            ) from None
        return [file for file, size in zip(files, sizes, strict=True) if size == file.bytes]

    def _writable(self, tasks: set[str]) -> DeltaTable:
        """The newest table, made where there is none, with a column for each task."""
        table = self.open()
        if table is None:
            table = create_table(self.storage, tasks)
        missing = sorted(tasks - set(table_tasks(table)))
        if missing:
            add_tasks(table, missing)
        return table

    def _missing(self, table: DeltaTable, records: Sequence[LaneRecord]) -> Sequence[LaneRecord]:
        """Records of lanes that the table does not hold yet."""
        held = set()
        for period in {record.period for record in records}:
            wanted = {record.version for record in records if record.period == period}
            for file in label_files(table, records[0].teacher, period):
                if any(file.may_hold(version) for version in wanted):
                    found = groups(self.files, file, table_tasks(table))
                    held |= {(part.period, part.version, part.kind, part.lane) for part in found}
        return [item for item in records if (item.period, item.version, item.kind, item.lane) not in held]

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
                found = groups(self.files, file, table_tasks(table), tasks)
                yield from (part for part in found if part.version == version)

    def labelled_lanes(self, teacher: str, version: str, period: str) -> set[tuple[str, int]]:
        """Kind and lane of what is committed, so that a job that runs again scores only the rest."""
        table = self.open()
        if table is None:
            return set()
        return {(part.kind, part.lane) for part in self._of_version(table, teacher, version, period)}

    def tasks(self) -> tuple[str, ...]:
        """Tasks that any teacher has labels of."""
        table = self.open()
        return table_tasks(table) if table is not None else ()

    def list(self, teacher: str | None = None, period: str | None = None) -> Sequence[LabelGroup]:
        """What is stored, by teacher, period, version, kind and lane, in that order."""
        table = self.open()
        if table is None:
            return []
        return self._stored(table, teacher, period)

    def _stored(self, table: DeltaTable, teacher: str | None = None, period: str | None = None) -> Sequence[LabelGroup]:
        tasks, files = table_tasks(table), label_files(table, teacher, period)
        found = [part for file in files for part in groups(self.files, file, tasks)]
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
                check_task(task, table_tasks(table), self.storage.table)
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
        table, lease = self._held(teacher, version, owner, ttl_s, table_version)
        try:
            self.check_stored(table, teacher, version)
        except BaseException:
            if self.metadata is not None and lease is not None:
                self.metadata.release(lease)
            raise
        return Pin(self.storage, table.version(), teacher, version, lease)

    def _held(
        self, teacher: str, version: str, owner: str, ttl_s: float, table_version: int | None
    ) -> tuple[DeltaTable, Lease | None]:
        """A version of the table, and the lease on it."""
        while True:
            table = self.open(table_version)
            if table is None:
                raise LabelError(f"{self.storage.table}: no labels yet; run `rayfm label` first")
            if self.metadata is None:
                return table, None
            try:
                return table, pins.take(self.metadata, table.version(), teacher, version, owner, ttl_s)
            except LabelError:
                newest = self.open()
                if table_version is not None or newest is None or newest.version() == table.version():
                    raise
                # Others committed and vacuumed since the newest version was loaded: take the one that is newest now.

    def check_stored(self, table: DeltaTable, teacher: str, version: str, period: str | None = None) -> None:
        """Refuse a teacher version of which a version of the table has no labels (of a period).

        Raises:
            LabelError: saying what became of them, what there is, and what to do.
        """
        if any(True for _ in self._of_version(table, teacher, version, period)):
            return
        where = f"{self.storage.table}: no labels of {teacher}@{version}"
        stored = self._stored(table, teacher)
        periods = sorted({part.period for part in stored if part.version == version})
        if periods:
            raise LabelError(f"{where} for period {period}; it has labelled {_newest(periods)}")
        where += f" in version {table.version()} of the table"
        if not stored:
            teachers = sorted({file.teacher for file in label_files(table)})
            raise LabelError(f"{where}: unknown teacher{nearest(teacher, teachers)}")
        newest = self.open()
        if newest is not None and any(True for _ in self._of_version(newest, teacher, version)):
            raise LabelError(f"{where}: they came later; pin version {newest.version()}")
        gone = newest is not None and was_expired(newest, teacher, version)
        raise LabelError(
            f"{where}: {'they were expired' if gone else 'it never labelled'}; its newest versions: "
            f"{_newest(sorted({part.version for part in stored}))}; ask for one of them, or label with {version} again"
        )

    def extend(self, pin: Pin, ttl_s: float = 3600.0) -> Pin:
        """The pin, alive for ``ttl_s`` seconds from now. Raises LeaseLost where it expired before."""
        if self.metadata is None or pin.lease is None:
            return pin
        return dataclasses.replace(pin, lease=self.metadata.extend(pin.lease, ttl_s))

    def release(self, pin: Pin) -> None:
        """Give a pin back."""
        if self.metadata is not None and pin.lease is not None:
            self.metadata.release(pin.lease)

    def vacuum(self, retention_hours: int = 24) -> Sequence[str]:
        """Delete files that no pinned table version, nor a newer one, has, once they are ``retention_hours`` old.

        A file's age counts from the commit that took it out, so that a reader without a pin, or one that is about to
        take it, can still read what was the newest table ``retention_hours`` ago. The age also protects files that
        workers have written and no commit has named yet, so it must exceed the longest label job.

        Returns:
            The files deleted.

        Raises:
            LabelError: the store has no metadata, so pins cannot be known.
        """
        metadata = self.guarded("vacuum")
        table = self.open()
        if table is None:
            return []
        newest = table.version()
        young = oldest_in_use(table, int((time.time() - retention_hours * 3600) * 1000))
        lowest = pins.settle_floor(metadata, young)
        deleted = taking_turns(
            self.storage,
            lambda: table.vacuum(
                retention_hours=retention_hours,
                dry_run=False,
                enforce_retention_duration=False,
                full=True,
                keep_versions=[*range(lowest, newest + 1)],
            ),
            "vacuum",
            retries=0,
        )
        return sorted(deleted)

    def guarded(self, what: str) -> MetadataStore:
        """The metadata store, for work that must know the pins. Raises LabelError where there is none."""
        if self.metadata is None:
            raise LabelError(
                f"{self.storage.table}: {what} needs the metadata store that holds the pins; open the store with it "
                "(--metadata)"
            )
        return self.metadata


def _newest(names: Sequence[str]) -> str:
    """The last three of sorted names."""
    return ", ".join(names[-3:])
