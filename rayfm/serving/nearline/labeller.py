"""From tickets to committed labels: one forward and one commit for the rows of several tickets.

Safe to do twice: a ticket whose rows the label table has already is only finished. So a message may be delivered as
often as it likes, to as many consumers as it likes.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import time
import uuid
from collections.abc import Callable, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from rayfm.config import CapacityError, DataError, LabelError, RayfmError, SnapshotError
from rayfm.labels.columns import EXAMPLE_ID, PERIOD, ROW, VERSION, check_leak, task_column
from rayfm.schema import TIME, Task
from rayfm.serving.nearline.config import NearLineConfig
from rayfm.serving.nearline.labels import TICKET, NearLineLabels
from rayfm.serving.nearline.rows import TeacherVersion, Versions, fitted, period_of
from rayfm.serving.nearline.spool import ROW as POSTED_ROW
from rayfm.serving.nearline.spool import Spool, Spooled

_PROCESS = uuid.uuid4().hex

Score = Callable[[pa.Table, str], tuple[str, pa.Table]]
"""(rows in the example store's columns, version) -> (the version that answered, a column of predictions per task)."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a ticket was not labelled."""

    why: str
    lasting: bool
    """Whether another try will fail as well."""


class Labeller:
    """Labels tickets.

    Args:
        config: the teacher's.
        spool, labels, versions: where rows come from, where labels go to, what snapshots say of themselves.
        score: asks the teacher.
    """

    def __init__(
        self, config: NearLineConfig, spool: Spool, labels: NearLineLabels, versions: Versions, score: Score
    ) -> None:
        self._config, self._spool, self._labels, self._versions, self._score = config, spool, labels, versions, score

    def label(self, batch: Sequence[Spooled]) -> dict[str, Failure | None]:
        """Label tickets in one batch; where that fails, each by itself, so that one bad ticket spoils no other.

        A teacher that is slow takes a forward's time for each try. No try is begun that could outlast the time after
        which a consumer is taken for dead: what is left is to be tried again.

        Returns:
            For each ticket None, or why it is not labelled.
        """
        outcome: dict[str, Failure | None] = {}
        consumer = self._config.consumer
        last_start = time.monotonic() + 2 * consumer.stall_s - consumer.score_timeout_s
        for version in dict.fromkeys(entry.version for entry in batch):
            part = [entry for entry in batch if entry.version == version]
            failure = self._try(part, last_start)
            if failure is None or len(part) == 1 or not failure.lasting:
                outcome |= {entry.ticket: failure for entry in part}
            else:
                outcome |= {entry.ticket: self._try([entry], last_start) for entry in part}
        for ticket, failure in outcome.items():
            if failure is not None:
                self._spool.note(ticket, "failed", why=failure.why, lasting=failure.lasting)
        return outcome

    def _try(self, batch: Sequence[Spooled], last_start: float) -> Failure | None:
        if time.monotonic() > last_start:
            return Failure("the teacher took too long over others of the batch", lasting=False)
        try:
            self._label(batch)
        except Exception as error:  # whatever it is, it must not end the consumer: the journal has it
            return failure_of(error)
        return None

    def _label(self, batch: Sequence[Spooled]) -> None:
        by_ticket = {entry.ticket: entry for entry in batch}
        table = self._labels.open()
        held = frozenset[str]()
        if table is not None:
            held = self._labels.held(table, self._config.teacher, frozenset(by_ticket))
        if table is not None and held:  # labelled by a consumer that died before it could say so, or could sync it
            self._labels.sync(table)
            self._finish([by_ticket[ticket] for ticket in held], table.version())
        rest = [entry for entry in batch if entry.ticket not in held]
        if not rest:
            return
        version = self._versions.get(rest[0].version)
        rows = self._scored(rest, version)
        for entry in rest:
            self._spool.note(entry.ticket, "scored", version=version.version)
        committed = self._labels.append(self._config.teacher, rows)
        self._finish(rest, committed.table_version)

    def _scored(self, batch: Sequence[Spooled], version: TeacherVersion) -> pa.Table:
        parts = [fitted(entry.table, version) for entry in batch]
        asked = pa.concat_tables(parts)
        answered, predictions = self._score(asked, version.version)
        if answered != version.version:
            raise LabelError(f"asked {version.version}, the service answered with {answered}")
        if predictions.num_rows != asked.num_rows:
            raise LabelError(f"asked {asked.num_rows} rows, the service answered {predictions.num_rows}")
        periods = period_of(asked[TIME].to_numpy(), self._config.period)
        for period in sorted(set(periods)):
            check_leak(self._config.teacher, version.version, version.trained_through, str(period))
        tickets = [pa.repeat(entry.ticket, entry.table.num_rows) for entry in batch]
        columns = {
            PERIOD: pa.array(periods, pa.string()),
            VERSION: pa.repeat(version.version, asked.num_rows),
            TICKET: pa.chunked_array(tickets, pa.string()),
            ROW: pa.chunked_array([chunk for entry in batch for chunk in entry.table[POSTED_ROW].chunks], pa.int64()),
            EXAMPLE_ID: asked[EXAMPLE_ID],
        }
        for task in version.tasks:
            columns[task_column(task.name)] = _checked(predictions, task, columns[TICKET], columns[ROW])
        return pa.table(columns)

    def _finish(self, batch: Sequence[Spooled], table_version: int) -> None:
        for entry in batch:
            self._spool.finish(
                entry.ticket,
                entry.version,
                entry.table.num_rows,
                entry.rejected,
                table_version,
                self._config.ticket_ttl_s,
            )


def take(spool: Spool, ticket: str, config: NearLineConfig) -> Spooled | None:
    """What a delivered ticket asks for; None where nothing is left to do.

    The delivery is noted; `Spool.end` is to be told of its end. A ticket that too many processes took without an end
    becomes a dead letter here, as does one whose rows are damaged.
    """
    crashes = spool.history(ticket).crashes(process_name())
    if crashes >= config.consumer.crashes:
        spool.bury(ticket, f"{crashes} consumers took it and came to no end: they died with it")
        return None
    try:
        entry = spool.read(ticket)
    except DataError as error:
        spool.bury(ticket, str(error))
        return None
    return None if entry is None else spool.begin(entry, process_name())


def settle(spool: Spool, ticket: str, failure: Failure, config: NearLineConfig) -> bool:
    """Decide after a failure: True where the ticket became a dead letter, False where it is to be tried again."""
    if failure.lasting and spool.history(ticket).lasting > config.consumer.retries:
        return spool.bury(ticket, failure.why)
    return False


def process_name() -> str:
    """What no other process is called, also not one in another machine or container, or after this one's death."""
    return f"{socket.gethostname()}/{os.getpid()}/{_PROCESS}"


def failure_of(error: BaseException) -> Failure:
    """What an error says of a try."""
    return Failure(_text(error), is_lasting(error))


def is_lasting(error: BaseException) -> bool:
    """Whether an error comes from the rows, the snapshot or the code, so that another try will fail as well.

    What comes from a machine does not last: a replica that died, a service that is not there or too busy, a time-out, a
    full disk.
    """
    from ray.exceptions import RayError, RayTaskError
    from ray.serve.exceptions import RayServeException

    if isinstance(error, (DataError, SnapshotError, LabelError)):
        return True
    if isinstance(error, (CapacityError, OSError, TimeoutError, MemoryError, RayServeException)):
        return False
    return isinstance(error, RayTaskError) or not isinstance(error, RayError)


def _text(error: BaseException) -> str:
    """One line that says what happened; what a replica raised comes wrapped in Ray's own."""
    own = getattr(error, "cause", None) or error
    words = (str(own).strip() or type(own).__name__).splitlines()
    return words[-1] if isinstance(own, RayfmError) else f"{type(own).__name__}: {words[-1]}"


def _checked(predictions: pa.Table, task: Task, ticket: pa.ChunkedArray, row: pa.ChunkedArray) -> pa.ChunkedArray:
    """A task's predictions as float32. Raises LabelError for one that is no number, or no probability."""
    column = predictions[task.name].cast(pa.float32())
    good = pc.is_finite(column)
    if task.kind == "binary":
        good = pc.and_(good, pc.and_(pc.greater_equal(column, 0.0), pc.less_equal(column, 1.0)))
    bad = pc.invert(pc.fill_null(good, False))
    if pc.any(bad, min_count=0).as_py():
        first = pc.index(bad, True).as_py()
        raise LabelError(
            f"row {row[first]} of {ticket[first]}, task {task.name!r}: the teacher predicts {column[first]}; "
            "fix the teacher or the row, then replay"
        )
    return column
