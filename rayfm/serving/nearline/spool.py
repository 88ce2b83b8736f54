"""The spool: accepted rows on disk, from before their ticket is given until their labels are committed.

Below ``<root>/nearline/spool/<teacher>/``; where a ticket's rows lie is its state, and every move is one rename:

===============  =======================================================================================
``queued/``      ``<ticket>.arrow``: the rows as they were posted (an Arrow IPC file), synced before the 202
``journal/``     ``<ticket>.jsonl``: what happened to a queued ticket: deliveries, scorings, failures, ends
``dead/``        ``<ticket>.arrow`` as it was queued, and ``<ticket>.json`` with the reason and the journal
``done/``        ``<ticket>.json``: the committed ticket's status, kept until it expires
``rejects/``     ``<ticket>-<rows>.arrow``: rows of a post that were refused, with a ``reason`` column, for a while
===============  =======================================================================================

The queue in Redis only carries tickets: a message that is lost costs time, never rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from rayfm.config import DataError
from rayfm.config.durable import TEMPORARY, sync_dir, write_durably
from rayfm.labels.columns import check_part
from rayfm.serving.nearline.tickets import Backlog, TicketStatus, check_ticket, new_ticket, ticket_time

log = logging.getLogger(__name__)

ROW = "nearline/row"
"""Column of the spooled rows: each one's position in the post."""

_HEADER = b"rayfm"
_UNKNOWN = "unknown"
"""The version of a ticket whose file is damaged."""

_OPTIONS = pa.ipc.IpcWriteOptions(compression="zstd")
_STALE_S = 3600.0
"""Age of an unfinished file that nobody is writing any more."""


@dataclasses.dataclass(frozen=True)
class Spooled:
    """A ticket's accepted rows."""

    ticket: str
    version: str
    rejected: int
    table: pa.Table
    """The posted columns, and `ROW`."""

    delivery: str = ""
    """Id of the delivery that handed them out; empty where they were only read."""


@dataclasses.dataclass(frozen=True)
class History:
    """What a ticket's journal says."""

    deliveries: int = 0
    failures: int = 0
    """Tries that ended with an error."""

    lasting: int = 0
    """Of these, with an error that another try will not cure."""

    scored: bool = False
    reason: str | None = None
    """The last failure's."""

    unfinished: frozenset[str] = frozenset()
    """Processes that took the ticket and did not note an end: each died, or is still at it."""

    def crashes(self, process: str) -> int:
        """Processes but this one that took the ticket and never came to an end. One that dies with several deliveries
        of a ticket died once. One that lives is counted too, but while it lives nobody else is rung for the ticket."""
        return len(self.unfinished - {process})


@dataclasses.dataclass(frozen=True)
class DeadLetter:
    """A ticket that was given up."""

    ticket: str
    reason: str
    buried: float
    """Seconds since 1970."""

    journal: tuple[dict[str, Any], ...] = ()


class Spool:
    """One teacher's spool. Any number of processes may use it; all must see the folder.

    Args:
        root: folder that holds ``snapshots/``; local, or mounted with working renames and ``fsync``.
        teacher: name of the teacher in the label store.
    """

    def __init__(self, root: str | Path, teacher: str) -> None:
        self.teacher = check_part("teacher", teacher)
        self.folder = Path(root) / "nearline" / "spool" / teacher
        self._queued, self._journal, self._dead, self._done, self.rejects = (
            self.folder / name for name in ("queued", "journal", "dead", "done", "rejects")
        )
        for folder in (self._queued, self._journal, self._dead, self._done, self.rejects):
            folder.mkdir(parents=True, exist_ok=True)
        # What is synced in a folder is lost with a folder that is not; another process may have made it just now.
        for folder in (self.folder, *self.folder.parents[:3]):
            sync_dir(folder)
        self._named: dict[str, str] = {}

    def accept(self, table: pa.Table, version: str, rejects: pa.Table | None = None) -> str:
        """Store rows durably and give their ticket: from here on they will be labelled, or be a dead letter.

        Args:
            table: the good rows in the columns as posted, and `ROW`.
            version: the snapshot that is to label them.
            rejects: the bad rows, with a ``reason`` column.

        Raises:
            CapacityError: the disk is full; nothing was accepted.
        """
        ticket = new_ticket()
        rejected = 0 if rejects is None else rejects.num_rows
        if rejects is not None and rejected:
            self._write(self.rejects / f"{ticket}-{rejected}.arrow", rejects)
        self._write(self._path(ticket), _labelled(table, ticket, version, rejected))
        return ticket

    def read(self, ticket: str) -> Spooled | None:
        """The rows of a queued ticket, None where it is not queued (any more).

        Raises:
            DataError: the file is damaged.
        """
        return self._read(self._path(ticket))

    def waiting(self) -> Iterator[tuple[str, float]]:
        """Queued tickets, and when each was last rung for or worked on (seconds since 1970), oldest ticket first."""
        for ticket in self._tickets(self._queued, ".arrow"):
            with contextlib.suppress(FileNotFoundError):
                seen = self._path(ticket).stat().st_mtime
                with contextlib.suppress(FileNotFoundError):
                    seen = max(seen, self._journal_path(ticket).stat().st_mtime)
                yield ticket, seen

    def versions(self) -> set[str]:
        """Snapshots that queued tickets name. A ticket's file is opened once by this object."""
        tickets = self._tickets(self._queued, ".arrow")
        known = {ticket: self._named[ticket] for ticket in tickets if ticket in self._named}
        for ticket in tickets:
            if ticket not in known:
                header = self._header(self._path(ticket))
                if header is not None:
                    known[ticket] = header["version"]
        self._named = known
        return set(known.values()) - {_UNKNOWN}

    def queued(self) -> tuple[int, int]:
        """Tickets that wait, and the bytes of their rows on disk."""
        return _counted(self._queued)

    def backlog(self, now_s: float | None = None) -> Backlog:
        """What waits, what died, and what was rejected."""
        waiting = self._tickets(self._queued, ".arrow")
        now = time.time() if now_s is None else now_s
        return Backlog(
            waiting=len(waiting),
            oldest_s=round(max(0.0, now - ticket_time(waiting[0])), 3) if waiting else 0.0,
            dead_letters=len(self._tickets(self._dead, ".arrow")),
            rejected_rows=self.rejected_rows(),
        )

    def touch(self, ticket: str) -> None:
        """Note that the ticket's message was sent just now, or that it is being worked on."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self._path(ticket))

    def note(self, ticket: str, event: str, **details: Any) -> None:
        """Add a line to the ticket's journal. One write: processes do not mix their lines."""
        line = json.dumps({"event": event, "at": round(time.time(), 3), **details}) + "\n"
        descriptor = os.open(self._journal_path(ticket), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def history(self, ticket: str) -> History:
        """What happened to a queued ticket so far."""
        deliveries = failures = lasting = 0
        scored, reason = False, None
        begun: dict[str, str] = {}  # delivery -> process
        for line in self._lines(ticket):
            if line["event"] == "delivered":
                deliveries, scored = deliveries + 1, False
                if "delivery" in line:
                    begun[line["delivery"]] = line["process"]
            elif line["event"] == "ended":
                begun.pop(line["delivery"], None)
            elif line["event"] == "scored":
                scored = True
            elif line["event"] == "failed":
                failures, lasting, scored = failures + 1, lasting + bool(line["lasting"]), False
                reason = line["why"]
        return History(deliveries, failures, lasting, scored, reason, frozenset(begun.values()))

    def begin(self, entry: Spooled, process: str) -> Spooled:
        """Note that a process takes a ticket; the entry comes back with the delivery's id, for `end`."""
        entry = dataclasses.replace(entry, delivery=uuid.uuid4().hex)
        self.note(entry.ticket, "delivered", delivery=entry.delivery, process=process)
        return entry

    def end(self, entry: Spooled) -> None:
        """Note that the process which took a ticket lives and is done with it, whatever came of it."""
        if self._path(entry.ticket).exists():  # else its journal is gone, and must not come back
            self.note(entry.ticket, "ended", delivery=entry.delivery)

    def finish(self, ticket: str, version: str, rows: int, rejected: int, table_version: int, ttl_s: float) -> None:
        """The rows' labels are committed: remember so for ``ttl_s`` seconds and drop the rows."""
        status = TicketStatus(
            ticket=ticket,
            state="committed",
            teacher=self.teacher,
            version=version,
            rows=rows,
            rejected=rejected,
            table_version=table_version,
            expires=time.time() + ttl_s,
        )
        text = status.model_dump_json().encode()
        # Dated by its end, so that no record has to be read to find those that expired.
        write_durably(self._done / f"{ticket}.json", lambda file: file.write(text), modified=status.expires)
        # Another delivery may have buried it meanwhile: it is committed all the same.
        for path in (self._path(ticket), *self._dead_paths(ticket), self._journal_path(ticket)):
            path.unlink(missing_ok=True)

    def bury(self, ticket: str, reason: str) -> bool:
        """Give a queued ticket up: its rows become a dead letter. False where it was not queued (any more)."""
        rows, words = self._dead_paths(ticket)
        if not self._path(ticket).exists():
            return False
        letter = {"reason": reason, "buried": time.time(), "journal": self._lines(ticket)}
        write_durably(words, lambda file: file.write(json.dumps(letter).encode()))
        try:
            os.rename(self._path(ticket), rows)
        except FileNotFoundError:  # another consumer was faster, with its commit or with the same
            if not rows.exists():
                words.unlink(missing_ok=True)
            return False
        sync_dir(self._dead)
        sync_dir(self._queued)
        self._journal_path(ticket).unlink(missing_ok=True)
        return True

    def dead_letters(self) -> Sequence[DeadLetter]:
        """Tickets that were given up, oldest first."""
        return [self._dead_letter(ticket) for ticket in self._tickets(self._dead, ".arrow")]

    def dead_rows(self, ticket: str) -> Spooled:
        """The original rows of a dead letter. Raises DataError where there is none."""
        found = self._read(self._dead_paths(check_ticket(ticket))[0])
        if found is None:
            raise DataError(
                f"{ticket} is no dead letter of teacher {self.teacher!r}; see `rayfm nearline dead-letters`"
            )
        return found

    def export(self, ticket: str, path: Path) -> None:
        """Copy a dead letter's rows to a file of their own. Raises DataError where there is none, CapacityError where
        the file cannot be written."""
        source = self._dead_paths(check_ticket(ticket))[0]
        try:
            data = source.read_bytes()
        except FileNotFoundError:
            raise _no_letter(ticket, self.teacher) from None
        write_durably(path, lambda file: file.write(data))

    def replay(self, ticket: str, version: str | None = None) -> None:
        """Queue a dead letter anew, with a clean journal.

        Args:
            ticket: the dead letter's.
            version: another snapshot to label it with; None: the one it was accepted for.

        Raises:
            DataError: there is no such dead letter.
        """
        rows, words = self._dead_paths(check_ticket(ticket))
        self._journal_path(ticket).unlink(missing_ok=True)
        if version is None:
            try:
                os.rename(rows, self._path(ticket))
            except FileNotFoundError:
                self.dead_rows(ticket)
        else:
            letter = self.dead_rows(ticket)
            self._write(self._path(ticket), _labelled(letter.table, ticket, version, letter.rejected))
            rows.unlink(missing_ok=True)
        self.touch(ticket)
        sync_dir(self._queued)
        sync_dir(self._dead)
        words.unlink(missing_ok=True)

    def discard(self, ticket: str) -> None:
        """Delete a dead letter with its rows. Raises DataError where there is none."""
        rows, words = self._dead_paths(check_ticket(ticket))
        try:
            rows.unlink()
        except FileNotFoundError:
            self.dead_rows(ticket)
        words.unlink(missing_ok=True)

    def status(self, ticket: str) -> TicketStatus | None:
        """Where a ticket stands; None for one that was never given, or that expired."""
        check_ticket(ticket)
        for _ in range(3):  # a ticket that moves while we look is found on the next round
            with contextlib.suppress(FileNotFoundError):
                return TicketStatus.model_validate_json((self._done / f"{ticket}.json").read_text())
            queued = self._header(self._path(ticket))
            if queued is not None:
                history = self.history(ticket)
                return self._status(ticket, "scored" if history.scored else "queued", queued, history)
            dead = self._header(self._dead_paths(ticket)[0])
            if dead is not None:
                letter = self._dead_letter(ticket)
                failures = sum(line["event"] == "failed" for line in letter.journal)
                return self._status(ticket, "dead", dead, History(failures=failures, reason=letter.reason))
        return None

    def rejected_rows(self) -> int:
        """Rows in ``rejects/``."""
        return sum(int(name.rpartition("-")[2]) for name in self._tickets(self.rejects, ".arrow"))

    def rejected_bytes(self) -> int:
        """Bytes of the files in ``rejects/``."""
        return _counted(self.rejects)[1]

    def sweep(self, now_s: float | None = None, rejects_ttl_s: float | None = None) -> int:
        """Drop tickets that expired, refused rows that were kept for ``rejects_ttl_s`` (None: all are kept), and what
        killed writers left; how many files. The log says how many refused rows went."""
        now = time.time() if now_s is None else now_s
        dropped = 0 if rejects_ttl_s is None else self._drop_rejects(now - rejects_ttl_s, rejects_ttl_s)
        for path in self._done.glob("*.json"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < now:
                    path.unlink()
                    dropped += 1
        # A journal without rows: of a ticket that another consumer finished while one still wrote to it.
        left = [path for path in self._journal.glob("*.jsonl") if not self._path(path.stem).exists()]
        for path in [*left, *self.folder.glob(f"*/{TEMPORARY}*")]:
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < now - _STALE_S:
                    path.unlink()
                    dropped += 1
        return dropped

    def _drop_rejects(self, before: float, ttl_s: float) -> int:
        dropped = rows = 0
        for name in self._tickets(self.rejects, ".arrow"):
            if ticket_time(name) >= before:
                break  # their names begin with their time
            with contextlib.suppress(FileNotFoundError):  # another consumer was faster, and counts them
                (self.rejects / f"{name}.arrow").unlink()
                dropped, rows = dropped + 1, rows + int(name.rpartition("-")[2])
        if dropped:
            log.warning(
                "teacher %s: %d refused rows of %d posts are dropped, %g s after they were refused",
                self.teacher, rows, dropped, ttl_s,
            )  # fmt: skip
        return dropped

    def _path(self, ticket: str) -> Path:
        return self._queued / f"{ticket}.arrow"

    def _journal_path(self, ticket: str) -> Path:
        return self._journal / f"{ticket}.jsonl"

    def _dead_paths(self, ticket: str) -> tuple[Path, Path]:
        return self._dead / f"{ticket}.arrow", self._dead / f"{ticket}.json"

    def _tickets(self, folder: Path, suffix: str) -> list[str]:
        with os.scandir(folder) as found:
            return sorted(
                entry.name.removesuffix(suffix)
                for entry in found
                if entry.name.endswith(suffix) and not entry.name.startswith(TEMPORARY)
            )

    def _lines(self, ticket: str) -> list[dict[str, Any]]:
        try:
            text = self._journal_path(ticket).read_text()
        except FileNotFoundError:
            return []
        lines = []
        for line in text.splitlines():
            with contextlib.suppress(ValueError):  # a power cut may have left a part of a line
                lines.append(json.loads(line))
        return lines

    def _dead_letter(self, ticket: str) -> DeadLetter:
        try:
            words = json.loads(self._dead_paths(ticket)[1].read_text())
        except (FileNotFoundError, ValueError):
            return DeadLetter(ticket, "unknown: its record is gone", 0.0)
        return DeadLetter(ticket, words["reason"], words["buried"], tuple(words["journal"]))

    def _status(self, ticket: str, state: Any, header: dict[str, Any], history: History) -> TicketStatus:
        return TicketStatus(
            ticket=ticket,
            state=state,
            teacher=self.teacher,
            version=header["version"],
            rows=header["rows"],
            rejected=header["rejected"],
            failures=history.failures,
            reason=history.reason,
        )

    def _header(self, path: Path) -> dict[str, Any] | None:
        try:
            with pa.OSFile(str(path)) as file:
                header: dict[str, Any] = json.loads(pa.ipc.open_file(file).schema.metadata[_HEADER])
                return header
        except FileNotFoundError:
            return None
        except (pa.ArrowInvalid, OSError, KeyError, TypeError, ValueError):
            return {"version": _UNKNOWN, "rows": 0, "rejected": 0}

    def _read(self, path: Path) -> Spooled | None:
        try:
            with pa.OSFile(str(path)) as file:
                table = pa.ipc.open_file(file).read_all()
            header = json.loads(table.schema.metadata[_HEADER])
        except FileNotFoundError:
            return None
        except (pa.ArrowInvalid, OSError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: the spooled rows are damaged ({error}); post them again") from None
        return Spooled(header["ticket"], header["version"], header["rejected"], table)

    def _write(self, path: Path, table: pa.Table) -> None:
        def write(file: Any) -> None:
            with pa.ipc.new_file(file, table.schema, options=_OPTIONS) as writer:
                writer.write_table(table)

        write_durably(path, write)


def _counted(folder: Path) -> tuple[int, int]:
    """Whole files in a folder, and the bytes of all."""
    files = size = 0
    with os.scandir(folder) as found:
        for entry in found:
            with contextlib.suppress(FileNotFoundError):
                files, size = files + entry.name.endswith(".arrow"), size + entry.stat().st_size
    return files, size


def _no_letter(ticket: str, teacher: str) -> DataError:
    return DataError(f"{ticket} is no dead letter of teacher {teacher!r}; see `rayfm nearline dead-letters`")


def _labelled(table: pa.Table, ticket: str, version: str, rejected: int) -> pa.Table:
    header = {"ticket": ticket, "version": version, "rows": table.num_rows, "rejected": rejected}
    return table.replace_schema_metadata({_HEADER: json.dumps(header).encode()})
