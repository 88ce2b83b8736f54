"""The shared data set on disk: one file for each file of labelled examples, scored once.

::

    <root>/shared/<teacher>/period=<p>/batch-<n>.parquet
    <root>/rejects/shared/<teacher>/period=<p>/batch-<n>.parquet

A plain Parquet source reads a teacher's folder as logs; its students learn ``teacher: logged/<teacher>``.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayfm.augment.journal import EXAMPLES
from rayfm.augment.views import ViewConfig, view, with_clusters
from rayfm.augment.window import ScoringTeacher, label_window
from rayfm.config import DataError
from rayfm.config.durable import write_durably
from rayfm.data.sources.base import Period
from rayfm.data.sources.files import parquet_errors
from rayfm.schema import Schema


class SharedDataset:
    """What one teacher scored below a join's root.

    Args:
        root: the join's.
        teacher: the teacher's name.
    """

    def __init__(self, root: str | Path, teacher: str) -> None:
        self.root, self.teacher = Path(root).expanduser().absolute(), teacher
        self.folder = self.root / "shared" / teacher

    def periods(self) -> list[str]:
        """Periods with scored examples, in time order."""
        return sorted(path.name.removeprefix("period=") for path in self.folder.glob("period=*"))

    def waiting(self) -> list[tuple[str, str]]:
        """(period, file) of labelled examples that the teacher has not scored, in time order."""

        def files(folder: Path) -> set[tuple[str, str]]:
            # Both sides listed, not looked for one by one: a shared file system answers once a folder.
            found = folder.glob("period=*/batch-*.parquet")
            return {(path.parent.name.removeprefix("period="), path.name) for path in found}

        return sorted(files(self.root / EXAMPLES) - files(self.folder))

    def label(
        self,
        period: Period,
        file: str,
        teacher: ScoringTeacher,
        students: Mapping[str, ViewConfig],
        rows_per_request: int = 8192,
    ) -> dict[str, Any]:
        """Score one file of labelled examples, unless that is done. Hold `lock` meanwhile.

        Args:
            period, file: the file's period and name, as `waiting` says.
            teacher, students, rows_per_request: as `label_window`'s.

        Returns:
            teacher, version, period, file, and rows: scored, unwanted, rejected.

        Raises:
            LabelError, DataError: as `label_window`; the file cannot be read.
            CapacityError: the disk is full, or the folder cannot be written.
        """
        place = f"period={period.name}/{file}"
        path = self.root / EXAMPLES / place
        with parquet_errors(str(path)):
            examples = pq.read_table(path, partitioning=None)
        try:
            window = label_window(examples, teacher, period, students, rows_per_request)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        if window.rejected.num_rows:
            _write(self.root / "rejects" / "shared" / self.teacher / place, window.rejected)
        _write(self.folder / place, window.shared)
        return {
            "teacher": teacher.name,
            "version": teacher.version,
            "period": period.name,
            "file": file,
            "scored": window.shared.num_rows,
            "unwanted": window.unwanted,
            "rejected": window.rejected.num_rows,
        }

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from scoring for this teacher.

        Raises:
            DataError: another process does.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(
                    f"{self.folder}: another process scores for teacher {self.teacher!r}; wait until it is done"
                ) from None
            yield  # closing the file lets the lock go

    def table(self, period: str) -> pa.Table:
        """The scored examples of a period, as `with_clusters` sorts them: what the students' views are slices of.

        Raises:
            DataError: nothing is scored, or a file cannot be read.
        """
        files = sorted((self.folder / f"period={period}").glob("batch-*.parquet"))
        if not files:
            raise DataError(f"{self.folder}: nothing of period {period} is scored; run `rayfm augment`")
        tables = []
        for path in files:
            with parquet_errors(str(path)):
                tables.append(pq.read_table(path, partitioning=None))
        return with_clusters(pa.concat_tables(tables))

    def view(self, shared: pa.Table, student: str, config: ViewConfig, schema: Schema) -> pa.Table:
        """A student's part of `table`, without a copy: as `rayfm.augment.views.view`.

        Args:
            shared: what `table` gave; read it once for all students.
            student, config: whose part.
            schema: the teacher's examples: what is a feature, what a label.
        """
        features = [feature.name for feature in schema.features]
        return view(shared, student, config, features, [task.name for task in schema.tasks])


def _write(path: Path, table: pa.Table) -> None:
    rows = table.combine_chunks()
    write_durably(path, lambda file: pq.write_table(rows, file, compression="zstd"), only_writer=True)
