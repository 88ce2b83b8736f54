"""Logs of any size by user: one pass deals the rows to buckets on disk, then a task holds one bucket at a time.

::

    part of a log --deal--> run 0, run 1, ...      each a file of B record batches: the rows of bucket 0, 1, ... B - 1
    bucket b      <--read_bucket-- batch b of every run

So each byte of a log is read once, a task's memory is that of a run or of a bucket, and the rows of a bucket stand in
the order of the logs, whatever the number of tasks.
"""

from __future__ import annotations

import abc
import functools
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayfm.config import Config
from rayfm.data.capacity import check_disk
from rayfm.data.sources.base import Period, Source, task_numbers
from rayfm.data.staging import disk_errors
from rayfm.schema import EXAMPLE_ID, mix64, string_ids

if TYPE_CHECKING:
    import ray.data

RUN_BYTES = 64 << 20
"""Arrow bytes of the rows that a task gathers before it sorts them by bucket and writes them."""

FILE_SHIFT = 40
"""``example_id`` is the position of the file in its log, shifted by this, and the row in the file."""

_ROW = "row"


class Part(Protocol):
    """A part of a log that one task reads."""

    @property
    def log(self) -> str:
        """The log's name."""

    @property
    def file(self) -> int:
        """Position of the file in its log."""

    @property
    def key(self) -> str:
        """The user's column: int64 or string."""

    @property
    def size(self) -> int:
        """Bytes on disk, about."""

    @property
    def schema(self) -> pa.Schema:
        """Of the tables."""

    def tables(self) -> Iterator[pa.Table]:
        """The rows, in the file's order."""


class Run(Config):
    """Rows of a part on disk, sorted by bucket."""

    log: str
    file: int
    part: int
    number: int
    """Of the part's runs, in order."""
    path: str
    rows: int


class Build(Protocol):
    """What makes examples of a bucket. It is sent to tasks, so it holds no more than configuration and paths."""

    def __call__(self, bucket: int) -> Iterator[pa.Table]:
        """The bucket's examples in the columns that `Source.dataset` wants."""


def bucket_of(users: pa.ChunkedArray, buckets: int) -> npt.NDArray[np.int64]:
    """Bucket of each user ``[N]``, int64 or string; missing users share one."""
    if pa.types.is_string(users.type):
        ids = string_ids(users.fill_null("").combine_chunks())
    else:
        ids = users.fill_null(-1).to_numpy()
    bucket: npt.NDArray[np.int64] = (mix64(ids) % np.uint64(buckets)).astype(np.int64)
    return bucket


def deal(part: Part, number: int, buckets: int, folder: Path) -> list[Run]:
    """Write a part's rows to runs in ``folder``; at least one.

    Args:
        part: what to read.
        number: its position among all parts.
        buckets: B, the record batches of a run.
        folder: where to write.

    Raises:
        DataError: the part cannot be read.
        CapacityError: the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    runs: list[Run] = []
    held: list[pa.Table] = []
    size = row = 0

    def write() -> None:
        table = pa.concat_tables(held or [part.schema.append(pa.field(_ROW, pa.int64())).empty_table()])
        path = folder / f"{uuid.uuid4().hex}.arrow"
        with disk_errors(folder):
            _write_run(table, bucket_of(table[part.key], buckets), buckets, path)
        runs.append(
            Run(log=part.log, file=part.file, part=number, number=len(runs), path=str(path), rows=table.num_rows)
        )

    for table in part.tables():
        rows = np.arange(row, row + table.num_rows)
        row += table.num_rows
        held.append(table.append_column(_ROW, pa.array(rows)))
        size += held[-1].nbytes
        if size >= RUN_BYTES:
            write()
            held, size = [], 0
    if held or not runs:
        write()
    return runs


def _write_run(table: pa.Table, bucket: npt.NDArray[np.int64], buckets: int, path: Path) -> None:
    order = np.argsort(bucket, kind="stable")
    table = table.take(pa.array(order)).combine_chunks()
    edges = np.searchsorted(bucket[order], np.arange(buckets + 1))
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.ipc.new_file(str(path), table.schema, options=options) as writer:
        for first, last in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            piece = table.slice(first, last - first).to_batches()
            writer.write_batch(piece[0] if piece else pa.RecordBatch.from_pylist([], schema=table.schema))


def read_bucket(runs: Sequence[Run], log: str, bucket: int) -> pa.Table:
    """A bucket's rows of a log, in the log's order, with ``example_id`` (file and row)."""
    own = sorted((run for run in runs if run.log == log), key=lambda run: (run.file, run.part, run.number))
    pieces = []
    passed: dict[int, int] = {}  # rows of the file's parts before the run's
    part_start: dict[int, int] = {}
    for run in own:
        start = part_start.setdefault(run.part, passed.get(run.file, 0))
        passed[run.file] = passed.get(run.file, 0) + run.rows
        with pa.OSFile(run.path) as file:
            table = pa.Table.from_batches([pa.ipc.open_file(file).get_batch(bucket)])
        ids = table[_ROW].to_numpy() + ((run.file << FILE_SHIFT) + start)
        pieces.append(table.drop_columns(_ROW).append_column(EXAMPLE_ID, pa.array(ids, pa.int64())))
    return pa.concat_tables(pieces).combine_chunks()


class BucketedSource(Source, abc.ABC):
    """A source whose examples need all rows of their user, in logs too large for that to be one task's memory."""

    @abc.abstractmethod
    def parts(self) -> list[Part]:
        """Everything to deal. Raises DataError where a file is missing, unreadable or lacks a column."""

    @abc.abstractmethod
    def buckets(self) -> int:
        """Groups of users, so many that a task holds one with ease."""

    @abc.abstractmethod
    def builder(self, periods: list[Period], runs: list[Run], folder: Path) -> Build:
        """What makes the examples of ``periods``; ``folder`` is one that all tasks see."""

    def dataset(self, periods: list[Period]) -> ray.data.Dataset:
        parts, buckets = self.parts(), self.buckets()
        folder = self.scratch or Path(tempfile.mkdtemp(prefix="rayfm-"))
        check_disk(folder, sum(part.size for part in parts))
        dealt = task_numbers(len(parts)).map_batches(
            functools.partial(_deal_parts, parts=parts, buckets=buckets, folder=folder),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=self.cpus_per_task,
        )
        runs = [Run.model_validate_json(row["run"]) for row in dealt.take_all()]
        return task_numbers(buckets).map_batches(
            functools.partial(_build_buckets, build=self.builder(periods, runs, folder)),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=self.cpus_per_task,
        )


def _deal_parts(batch: pa.Table, parts: list[Part], buckets: int, folder: Path) -> Iterator[pa.Table]:
    # A generator, since Ray Data keeps the type of an error that a generator raises (and of a function's it does not).
    runs = [run for number in batch["id"].to_pylist() for run in deal(parts[number], number, buckets, folder)]
    yield pa.table({"run": [run.model_dump_json() for run in runs]})


def _build_buckets(batch: pa.Table, build: Build) -> Iterator[pa.Table]:
    for bucket in batch["id"].to_pylist():
        yield from build(bucket)
