"""The label table in Delta Lake's terms: opening a version, and commits that take turns.

Every change of the table is decided on one version of it and committed as the next one. If another writer was faster,
nothing is written; the newest version is loaded and the decision made anew. So no two changes can be decided on the
same state, whatever they do: lanes added, versions expired, files compacted.
"""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Field, Transaction
from deltalake import Schema as DeltaSchema
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.schema import PrimitiveType
from deltalake.transaction import AddAction, RemoveAction

from rayfm.config import LabelError
from rayfm.labels.columns import PARTITIONS, PERIOD, TASK_PREFIX, TEACHER, check_table, table_schema, task_column
from rayfm.labels.files import one_line
from rayfm.labels.index import LabelFile
from rayfm.labels.storage import Storage

RETRIES = 100
EXPIRED = "rayfm.expired"
"""What a commit took out, in the log's commit information: a list of [teacher, period, version]."""

_CONFIGURATION = {
    # Old table versions stay readable for as long as they are pinned, whatever their age.
    "delta.enableExpiredLogCleanup": "false",
    "delta.dataSkippingNumIndexedCols": "-1",
}

ResultT = TypeVar("ResultT")


class NewFile(Protocol):
    """A data file that no commit has named yet."""

    @property
    def teacher(self) -> str: ...
    @property
    def period(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def bytes(self) -> int: ...
    @property
    def modified_ms(self) -> int: ...
    @property
    def stats(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class Change:
    """What one commit does to the table."""

    add: Sequence[NewFile] = ()
    remove: Sequence[LabelFile] = ()
    same_rows: bool = False
    """Whether the table holds the same rows before and after (a compaction)."""
    transactions: Sequence[Transaction] = ()
    expired: Sequence[tuple[str, str, str]] = ()
    """(teacher, period, version) that go."""


def open_table(storage: Storage, table_version: int | None = None) -> DeltaTable | None:
    """The Delta table at a version (None: the newest), checked; None where nothing was ever labelled.

    Raises:
        LabelError: the folder holds another table (naming the column that differs), or no such version.
    """
    try:
        table = DeltaTable(storage.table, version=table_version, storage_options=storage.delta_options())
    except TableNotFoundError:
        return None
    except (DeltaError, OSError) as error:
        if table_version is not None:
            newest = open_table(storage)
            if newest is None:
                return None
            raise LabelError(
                f"{storage.table}: the table has no version {table_version}, its newest is {newest.version()} "
                f"({one_line(error)}); pin that one, or label again"
            ) from None
        what = "check bucket, endpoint and keys" if not storage.local else "see `rayfm labels list`"
        raise LabelError(f"{storage.table}: cannot open the table ({one_line(error)}); {what}") from None
    check_table(storage.table, pa.schema(table.schema().to_arrow()), table.metadata().partition_columns)
    return table


def create_table(storage: Storage, tasks: Iterable[str]) -> DeltaTable:
    """An empty table with a column for each task, or the one that another process made first."""
    try:
        DeltaTable.create(
            storage.table,
            DeltaSchema.from_arrow(table_schema(sorted(tasks))),
            mode="ignore",
            partition_by=list(PARTITIONS),
            configuration=_CONFIGURATION,
            storage_options=storage.delta_options(),
        )
    except DeltaError:
        table = open_table(storage)
        if table is None:
            raise
        return table
    table = open_table(storage)
    assert table is not None
    return table


def add_tasks(table: DeltaTable, tasks: Iterable[str]) -> None:
    """Columns for more tasks. Raises CommitFailedError if another writer was faster."""
    table.alter.add_columns(
        [Field(task_column(task), PrimitiveType("float")) for task in tasks],
        commit_properties=CommitProperties(max_commit_retries=0),
    )
    table.update_incremental()


def table_tasks(table: DeltaTable) -> tuple[str, ...]:
    """Tasks that the table has columns of."""
    names = (field.name for field in table.schema().fields)
    return tuple(name.removeprefix(TASK_PREFIX) for name in names if name.startswith(TASK_PREFIX))


def apply(table: DeltaTable, change: Change) -> int:
    """Commit ``change`` as the version that follows ``table``'s, and bring ``table`` there.

    Each commit moves the application transaction ``lanes/<teacher>`` on: of two commits on one state, both of the
    same teacher, Delta Lake refuses one even where it would merge them.

    Raises:
        CommitFailedError: another writer was faster; nothing was changed.
    """
    teachers = sorted({file.teacher for file in change.add} | {file.teacher for file in change.remove})
    guards = [f"lanes/{teacher}" for teacher in teachers] or ["lanes"]
    turns = [Transaction(guard, (table.transaction_version(guard) or 0) + 1) for guard in guards]
    now = int(time.time() * 1000)
    removed = [
        RemoveAction(file.path, not change.same_rows, now, file.bytes, {TEACHER: file.teacher, PERIOD: file.period})
        for file in change.remove
    ]
    information = {EXPIRED: json.dumps([list(what) for what in change.expired])} if change.expired else None
    table.create_write_transaction(
        [*removed, *(_add_action(file, change.same_rows) for file in change.add)],
        "append",
        table.schema(),
        list(PARTITIONS),
        commit_properties=CommitProperties(
            custom_metadata=information, max_commit_retries=0, app_transactions=[*change.transactions, *turns]
        ),
    )
    table.update_incremental()
    return int(table.version())


def taking_turns(storage: Storage, attempt: Callable[[], ResultT], what: str, retries: int = RETRIES) -> ResultT:
    """Do ``attempt``, which loads the table and commits to it, until no other writer is faster.

    Raises:
        LabelError: others were faster ``retries + 1`` times, or the storage refuses.
    """
    for number in range(retries + 1):
        try:
            return attempt()
        except CommitFailedError as error:
            if number == retries:
                raise LabelError(
                    f"{storage.table}: cannot {what}: gave way to {retries + 1} other commits ({one_line(error)}); "
                    "try again"
                ) from None
            time.sleep(random.uniform(0, min(0.5, 0.01 * 2 ** min(number, 6))))
        except (DeltaError, OSError) as error:
            hint = "free space or fix access" if storage.local else "check bucket, endpoint and keys"
            raise LabelError(f"{storage.table}: cannot {what} ({one_line(error)}); {hint}") from None
    raise AssertionError("unreachable")


def oldest_in_use(table: DeltaTable, cutoff_ms: int) -> int:
    """The oldest table version that was still the newest at a time, which a reader of that time may have open.

    Args:
        table: at its newest version.
        cutoff_ms: milliseconds since 1970.
    """
    limit = 16
    while True:
        commits: list[dict[str, Any]] = table.history(limit)
        old = [int(commit["version"]) for commit in commits if commit.get("timestamp", 0) <= cutoff_ms]
        if old:
            return max(old)
        if len(commits) < limit:
            return min(int(commit["version"]) for commit in commits)
        limit *= 4


def was_expired(table: DeltaTable, teacher: str, version: str) -> bool:
    """Whether labels of a teacher version were taken out, by the table's log. Reads all of it: for messages."""
    for commit in table.history():
        gone = json.loads(commit.get(EXPIRED, "[]"))
        if any((what[0], what[2]) == (teacher, version) for what in gone):
            return True
    return False


def _add_action(file: NewFile, same_rows: bool) -> AddAction:
    return AddAction(
        path=file.path,
        size=file.bytes,
        partition_values={TEACHER: file.teacher, PERIOD: file.period},
        modification_time=file.modified_ms,
        data_change=not same_rows,
        stats=file.stats,
    )
