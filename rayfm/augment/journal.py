"""A join's folder: what makes a batch happen exactly once, whenever the process is killed.

::

    journal.sqlite                  the newest batch, its commit; what the ones before it leave behind
    staging/<batch>/                what the batch writes, before its commit
    state/impressions-<batch>.arrow, state/feedback-<batch>.arrow
    examples/period=<p>/batch-<batch>.parquet       moved here after the commit; so are corrections/ and rejects/
    complete/period=<p>.json        the period gets no further example
    counts.jsonl                    one line per batch, from the table `counts`

A batch writes its files to ``staging`` and ``state``, then commits the new offsets, watermark, counts and the files'
names in one SQLite transaction, then moves the files to their places. Killed before the commit, it leaves nothing that
is ever looked at; killed after, the next start moves what is left. A reader of ``examples`` sees whole files of
committed batches, nothing else.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayfm.config import Config, DataError, RayfmError
from rayfm.config.durable import sync_dir, sync_open, write_durably
from rayfm.data.staging import disk_errors
from rayfm.data.store import file_sha256

_TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS batches (batch INTEGER PRIMARY KEY, record TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS counts (batch INTEGER PRIMARY KEY, line TEXT NOT NULL, stop INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS offsets (source TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS files (
    path TEXT PRIMARY KEY, batch INTEGER NOT NULL, dataset TEXT NOT NULL, period TEXT NOT NULL, rows INTEGER NOT NULL,
    sha256 TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS files_by_period ON files (dataset, period);
CREATE TABLE IF NOT EXISTS periods (
    dataset TEXT NOT NULL, period TEXT NOT NULL, start_us INTEGER NOT NULL, complete INTEGER,
    PRIMARY KEY (dataset, period));
"""

EXAMPLES, COUNTS = "examples", "counts.jsonl"


class BatchCommitted(RayfmError):
    """A batch happened, and then its files could not be moved to their places: the next start moves them. Its rows must
    not be given again."""


class Output(Config):
    """A file of a batch."""

    path: str
    """Below the root."""

    rows: int
    sha256: str
    dataset: str = ""
    """The data set of labelled examples that it belongs to; empty for other files."""

    period: str = ""
    start_us: int = 0


class Record(Config):
    """What a batch committed."""

    batch: int
    watermark: int
    seen: dict[str, int]
    files: tuple[Output, ...]
    impressions: tuple[int, ...]
    """Segments of the state."""

    feedback: tuple[int, ...]
    complete: tuple[tuple[str, str], ...]
    """(data set, period) that are complete with this batch."""

    counts: dict[str, Any]


class Journal:
    """The folder of one join, held by one process at a time.

    Args:
        root: the folder; made where there is none.
        identity: what of the config shapes the state. A folder with another one is refused.

    Raises:
        DataError: another process holds it, it belongs to another config, or it cannot be read or written.
        CapacityError: the disk is full.
    """

    def __init__(self, root: str | Path, identity: Mapping[str, Any]) -> None:
        self.root = Path(root).expanduser().absolute()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self.root / "journal.sqlite", timeout=0, isolation_level=None)
            # The lock is the operating system's: it goes with the process, however that ends.
            self._database.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._database.execute("PRAGMA synchronous = FULL")
            self._database.execute("BEGIN EXCLUSIVE")
            for statement in _TABLES.split(";"):
                self._database.execute(statement)
            self._check_identity(identity)
            self._database.execute("COMMIT")
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise DataError(f"{self.root}: another process runs this join; wait, or name another root") from None
            raise DataError(f"{self.root}: the journal cannot be opened ({error}); fix access, or free space") from None
        except sqlite3.DatabaseError as error:
            raise DataError(
                f"{self.root}/journal.sqlite: is damaged ({error}); remove the folder and join anew"
            ) from None
        except OSError as error:
            raise DataError(f"{self.root}: cannot be written ({error.strerror}); name another root") from None
        self._closed = False
        try:
            self._upgrade()
            self._recover()
        except BaseException as error:
            self.close()
            if not isinstance(error, (OSError, sqlite3.Error)):
                raise
            where = getattr(error, "filename", None) or self.root
            raise DataError(
                f"{where}: cannot be written ({getattr(error, 'strerror', error)}); fix access, or free space"
            ) from None

    def close(self) -> None:
        """Let go of the folder."""
        self._closed = True
        self._database.close()

    def check_open(self) -> None:
        """Refuse what would write to the folder after `close`: it may be another process's by now.

        Raises:
            DataError: it is closed.
        """
        if self._closed:
            raise DataError(f"{self.root}: the join is closed; open it again")

    def _check_identity(self, identity: Mapping[str, Any]) -> None:
        text = json.dumps(identity, sort_keys=True)
        stored = self.meta("identity")
        if stored is None:
            self.set_meta("identity", text)
        elif stored != text:
            self._database.execute("ROLLBACK")
            self._database.close()
            key = _first_difference(json.loads(stored), json.loads(text))
            raise DataError(
                f"{self.root}: was joined with another {key!r}, which its state depends on; set it back, or name "
                "another root"
            )

    def _upgrade(self) -> None:
        """Bring a journal that kept the record of every batch, with the counts in it, to what this class writes."""
        run = self._database.execute
        if run("SELECT 1 FROM counts").fetchone() is not None or self.last() is None:
            return
        (self.root / COUNTS).unlink(missing_ok=True)  # which nobody synced: it is written anew
        run("BEGIN")
        for batch, text in run("SELECT batch, record FROM batches ORDER BY batch"):
            self._add_counts(batch, json.loads(text)["counts"])
        run("DELETE FROM batches WHERE batch < (SELECT max(batch) FROM batches)")
        run("COMMIT")

    def _add_counts(self, batch: int, counts: Mapping[str, Any]) -> None:
        """A batch's line, and where it ends in the file, in bytes."""
        line = json.dumps(counts) + "\n"
        last = self._database.execute("SELECT stop FROM counts ORDER BY batch DESC LIMIT 1").fetchone()
        stop = len(line.encode()) + (0 if last is None else last[0])
        self._database.execute("INSERT INTO counts VALUES (?, ?, ?)", (batch, line, stop))

    def meta(self, key: str) -> str | None:
        """A value that stays."""
        row = self._database.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def set_meta(self, key: str, value: str) -> None:
        """Within a transaction: with it; else at once."""
        self._database.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def last(self) -> Record | None:
        """The newest batch.

        Raises:
            DataError: its record is of another form.
        """
        row = self._database.execute("SELECT record FROM batches ORDER BY batch DESC LIMIT 1").fetchone()
        try:
            return None if row is None else Record.model_validate_json(row[0])
        except ValueError:
            raise DataError(
                f"{self.root}/journal.sqlite: the newest batch's record cannot be read; remove the folder and join anew"
            ) from None

    def offsets(self) -> dict[str, Any]:
        """Where each source stands, as the newest batches said."""
        return {source: json.loads(value) for source, value in self._database.execute("SELECT * FROM offsets")}

    def open_periods(self) -> list[tuple[str, str, int]]:
        """(data set, period, its start) that are not complete."""
        return list(
            self._database.execute("SELECT dataset, period, start_us FROM periods WHERE complete IS NULL ORDER BY 1, 3")
        )

    def segment(self, kind: str, batch: int) -> pa.Table:
        """A segment of the state, mapped into memory.

        Raises:
            DataError: it is missing or damaged.
        """
        path = self._segment_path(kind, batch)
        try:
            with pa.memory_map(str(path)) as file:
                return pa.ipc.open_file(file).read_all()
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{path}: is missing or damaged ({error}); remove {self.root} and join anew") from None

    def _segment_path(self, kind: str, batch: int) -> Path:
        return self.root / "state" / f"{kind}-{batch:08d}.arrow"

    def write_segment(self, kind: str, batch: int, table: pa.Table) -> pa.Table:
        """Write a segment of a batch that is not committed yet; the same rows, mapped into memory."""
        path = self._segment_path(kind, batch)
        path.parent.mkdir(exist_ok=True)
        with disk_errors(path), path.open("wb") as file:
            with pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
            sync_open(file)
        return self.segment(kind, batch)

    def stage(
        self, batch: int, path: str, table: pa.Table, dataset: str = "", period: str = "", start_us: int = 0
    ) -> Output:
        """Write an output file of a batch that is not committed yet.

        Args:
            batch: its number.
            path: where it will stand, below the root.
            table: its rows.
            dataset, period, start_us: what of the labelled examples it is.
        """
        staged = self._staged(batch, path)
        staged.parent.mkdir(parents=True, exist_ok=True)
        with disk_errors(staged), staged.open("wb") as file:
            pq.write_table(table.combine_chunks(), file, compression="zstd")
            sync_open(file)
        return Output(
            path=path,
            rows=table.num_rows,
            sha256=file_sha256(staged),
            dataset=dataset,
            period=period,
            start_us=start_us,
        )

    def _staged(self, batch: int, path: str) -> Path:
        return self.root / "staging" / f"{batch:08d}" / path.replace("/", "%2F")

    def commit(self, record: Record, offsets: Mapping[str, Any], meta: Mapping[str, str]) -> None:
        """Make a batch happen, then move its files to their places. The journal is closed where the moving fails: what
        the caller knows is then older than what is committed.

        Args:
            record: what it did.
            offsets: where its sources stand now; sources that are not named stand where they stood.
            meta: values that stay.

        Raises:
            DataError: the journal cannot be written: the batch has not happened.
            BatchCommitted: the batch has happened, and its files cannot be moved.
        """
        for folder in {self._staged(record.batch, file.path).parent for file in record.files} | {self.root / "state"}:
            if folder.exists():
                sync_dir(folder)
        run = self._database.execute
        try:
            run("BEGIN")
            for file in record.files:
                if file.dataset:
                    run(
                        "INSERT INTO files VALUES (?, ?, ?, ?, ?, ?)",
                        (file.path, record.batch, file.dataset, file.period, file.rows, file.sha256),
                    )
                    run(
                        "INSERT OR IGNORE INTO periods VALUES (?, ?, ?, NULL)",
                        (file.dataset, file.period, file.start_us),
                    )
            for dataset, period in record.complete:
                run("UPDATE periods SET complete = ? WHERE dataset = ? AND period = ?", (record.batch, dataset, period))
            for source, value in offsets.items():
                run("INSERT OR REPLACE INTO offsets VALUES (?, ?)", (source, json.dumps(value)))
            for key, text in meta.items():
                self.set_meta(key, text)
            run("INSERT INTO batches VALUES (?, ?)", (record.batch, record.model_dump_json()))
            run("DELETE FROM batches WHERE batch < ?", (record.batch,))
            self._add_counts(record.batch, record.counts)
            run("COMMIT")
        except sqlite3.DatabaseError as error:
            if self._database.in_transaction:
                run("ROLLBACK")
            raise DataError(
                f"{self.root}: cannot commit batch {record.batch} ({error}); free space, run again"
            ) from None
        try:
            self._publish(record)
            self._write_counts()
        except BaseException as error:
            self.close()
            if not isinstance(error, Exception):
                raise
            raise BatchCommitted(
                f"{self.root}: batch {record.batch} is committed; open the join again, which moves its files to their "
                f"places, and do not give its rows again ({error})"
            ) from error

    def _publish(self, record: Record) -> None:
        """Move a committed batch's files to their places; those that stand there already are left."""
        folders = set()
        for file in record.files:
            staged, target = self._staged(record.batch, file.path), self.root / file.path
            if staged.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(staged, target)
                folders.add(target.parent)
        for dataset, period in record.complete:
            files = self._database.execute(
                "SELECT path, rows, sha256 FROM files WHERE dataset = ? AND period = ? ORDER BY path", (dataset, period)
            ).fetchall()
            marker = {
                "period": period,
                "rows": sum(rows for _, rows, _ in files),
                "files": [{"path": path, "rows": rows, "sha256": sha256} for path, rows, sha256 in files],
            }
            target = self.root / f"complete{dataset.removeprefix(EXAMPLES)}" / f"period={period}.json"
            self._write(target, json.dumps(marker, indent=1))
        for folder in folders:
            sync_dir(folder)
        shutil.rmtree(self.root / "staging", ignore_errors=True)
        self._drop_segments(record)

    def _drop_segments(self, record: Record | None) -> None:
        """Remove segments that the newest batch has no use for: outlived ones, and those of a batch that was not."""
        live = set()
        if record is not None:
            live = {self._segment_path("impressions", batch) for batch in record.impressions}
            live |= {self._segment_path("feedback", batch) for batch in record.feedback}
        for path in (self.root / "state").glob("*.arrow"):
            if path not in live:
                path.unlink()

    def _recover(self) -> None:
        record = self.last()
        if record is not None:
            self._publish(record)
        else:
            shutil.rmtree(self.root / "staging", ignore_errors=True)
            self._drop_segments(None)
        self._write_counts()

    def _write_counts(self) -> None:
        """Write the lines that the file lacks. The newest is written in any case: the others were synced before it was
        committed, so after a power cut it alone may stand there in part."""
        path = self.root / COUNTS
        with disk_errors(path), path.open("ab") as file:
            batch, stop = self._database.execute(
                "SELECT batch, stop FROM counts WHERE stop <= ? AND batch < (SELECT max(batch) FROM counts) "
                "ORDER BY batch DESC LIMIT 1",
                (file.tell(),),
            ).fetchone() or (0, 0)
            file.truncate(stop)
            for (line,) in self._database.execute("SELECT line FROM counts WHERE batch > ? ORDER BY batch", (batch,)):
                file.write(line.encode())
            sync_open(file)

    def _write(self, path: Path, text: str) -> None:
        write_durably(path, lambda file: file.write(text.encode()), only_writer=True)


def _first_difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> str:
    for key in [*old, *(key for key in new if key not in old)]:
        one, other = old.get(key), new.get(key)
        if one != other:
            if isinstance(one, dict) and isinstance(other, dict):
                return _first_difference(one, other, f"{prefix}{key}.")
            return prefix + key
    return prefix.rstrip(".")
