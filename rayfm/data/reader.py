"""Readers: the steps of a period as batches, for one rank. Both readers give the same batches.

The cursor of a reader is (period, step); a reader starts at any of them.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayfm.config import DataError
from rayfm.config.nodes import NodeLabels
from rayfm.data.batch import Batch
from rayfm.data.encode import EncodedChunk, Encoder
from rayfm.data.lanes import ROW_GROUP
from rayfm.data.span import ReadSpan, rank_lanes
from rayfm.data.steps import (
    KIND,
    REPRESENTATION,
    REPRESENTATION_MASK,
    STEP,
    SUPERVISION,
    SUPERVISION_MASK,
    LaneCache,
    ReadPlan,
    StepRows,
    count_steps,
    read_steps,
)
from rayfm.data.store import PeriodManifest
from rayfm.data.task_errors import raise_error

if TYPE_CHECKING:
    import ray.data

ReaderKind = Literal["arrow", "ray_data"]
ItemT = TypeVar("ItemT")

CHUNK_ROWS = 32_768
"""Rows (of impressions, over all ranks) that are read and encoded together."""

DECODED_CHUNKS = 4
"""Chunks that are decoded ahead of the one that is encoded. They share row groups, all decoded for the first of them;
with fewer, the decoding thread would wait with the next row groups until most of these chunks are encoded."""

SPAN_BYTES = 48 << 20
"""Most bytes of Parquet files that a task of `RayDataReader` reads: its block, and those in flight, are in memory."""


class Reader(Protocol):
    """What the training loop reads from."""

    def steps(self, period: str) -> int:
        """Steps of the period: the same number on every rank."""
        ...

    def batches(self, period: str, start: int = 0) -> Iterator[Batch]:
        """This rank's batches of steps ``start``, ``start + 1``, ...; empty ones where its lanes end early."""
        ...


def chunk_steps(plan: ReadPlan) -> int:
    """Steps in a chunk."""
    return max(1, CHUNK_ROWS // plan.batch_size)


def span_steps(plan: ReadPlan, manifest: PeriodManifest) -> int:
    """Steps of a task's span: whole chunks, about a row group of each lane, so that tasks decode few row groups twice;
    fewer where that would be more than `SPAN_BYTES` of Parquet files."""
    chunk = chunk_steps(plan)
    rows = plan.rows_per_lane(manifest.lanes) * chunk
    size = sum(file.bytes for file in manifest.files) / max(1, count_steps(plan, manifest))
    return chunk * max(1, min(ROW_GROUP // rows, int(SPAN_BYTES / max(1.0, size * chunk))))


def cut(encoder: Encoder, chunk: EncodedChunk, step: npt.NDArray[np.int64], first: int, last: int) -> Iterator[Batch]:
    """The batches of steps ``[first, last)`` of an encoded chunk whose rows are in step order."""
    bounds = np.searchsorted(step, np.arange(first, last + 1), "left")
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        yield encoder.batch(chunk, start, stop)


class ArrowReader:
    """Reads lane files with pyarrow in this process: a thread encodes the next chunk, another decodes those after it.

    Args:
        plan: what to read.
        encoder: how to turn it into tensors.
        rank, world: which lanes are ours.
    """

    def __init__(self, plan: ReadPlan, encoder: Encoder, rank: int = 0, world: int = 1) -> None:
        self.plan, self.encoder, self.rank, self.world = plan, encoder, rank, world
        self._cache = LaneCache(plan)

    def steps(self, period: str) -> int:
        return count_steps(self.plan, self._cache.manifest(period))

    def batches(self, period: str, start: int = 0) -> Iterator[Batch]:
        total, size = self.steps(period), chunk_steps(self.plan)
        lanes = rank_lanes(self._cache.manifest(period).lanes, self.rank, self.world)

        def rows(first: int) -> tuple[StepRows, int, int]:
            last = min(total, first + size)
            return read_steps(self.plan, self._cache, period, lanes, first, last), first, last

        starts = range(start, total, size)
        read: Iterator[tuple[StepRows, int, int]] = map(rows, starts)
        if len(starts) > 1:  # a thread decodes Parquet, the next encodes
            read = ahead(read, DECODED_CHUNKS)
        chunks = ((self.encoder.encode_steps(found), found.step, first, last) for found, first, last in read)
        for chunk, step, first, last in ahead(chunks) if len(starts) > 1 else chunks:
            yield from cut(self.encoder, chunk, step, first, last)


class RayDataReader:
    """Reads through one Ray Data pipeline over the known periods; they must be asked for in order.

    Each task reads and joins the rows of a run of steps for one rank and hands back one Arrow block; the pipeline
    preserves order, so blocks come back as planned and ``tasks`` of them are in flight while the trainer works. More
    would start a process each, which costs seconds, also where one decodes faster than the trainer trains. What a task
    refuses (a corrupt file, labels that are gone) is raised here when its steps are asked for, as the same error that
    `ArrowReader` raises.

    Args:
        plan: what to read. Its look-ups travel to the tasks.
        encoder: how to turn blocks into tensors, in this process.
        periods: the periods to read, in order.
        start: the cursor (step of the first period) to start at.
        tasks: reading tasks that run at once.
        cpus: CPUs of a reading task.
        nodes: labels of the nodes that reading tasks run on.
    """

    def __init__(
        self,
        plan: ReadPlan,
        encoder: Encoder,
        periods: Sequence[str],
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        tasks: int = 2,
        cpus: float = 0.25,
        nodes: NodeLabels | None = None,
    ) -> None:
        self.plan, self.encoder, self.tasks, self.cpus, self.nodes = plan, encoder, tasks, cpus, nodes
        self._cache = LaneCache(plan)
        self.periods = list(periods)
        self._spans: list[tuple[str, int, int]] = []
        for position, period in enumerate(self.periods):
            total, size = self.steps(period), span_steps(plan, self._cache.manifest(period))
            first = start if position == 0 else 0
            bounds = [first, *range(first - first % size + size, total, size), total] if first < total else []
            self._spans += [(period, a, b) for a, b in itertools.pairwise(bounds)]
        self._blocks = self._run(rank, world)

    def steps(self, period: str) -> int:
        return count_steps(self.plan, self._cache.manifest(period))

    def _run(self, rank: int, world: int) -> Iterator[tuple[tuple[str, int, int], pa.Table]]:
        import ray.data

        spans = self._spans
        read = ReadSpan(self.plan, spans, [self._cache.manifest(period).lanes for period, _, _ in spans], rank, world)
        with quiet_ray_data(ordered=True, nodes=self.nodes):
            # from_items, not from_arrow: that one runs a task of a whole CPU, which a small machine may not have free.
            dataset: ray.data.Dataset = ray.data.from_items(
                [{"span": position} for position in range(len(spans))], override_num_blocks=len(spans)
            ).map_batches(
                read.__call__,
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=self.cpus,
                concurrency=min(self.tasks, max(1, len(spans))),
            )
            blocks = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2))
        for span in spans:
            block = next(blocks, None)
            if block is None:
                raise DataError(f"Ray Data gave no block for steps {span[1]}..{span[2]} of period {span[0]}")
            raise_error(block)
            yield span, block

    def batches(self, period: str, start: int = 0) -> Iterator[Batch]:
        total = self.steps(period)
        while start < total:
            (found, first, last), table = next(self._blocks)
            if (found, first) != (period, start):
                raise DataError(
                    f"periods must be read in order: step {start} of {period} was asked for, step {first} of "
                    f"{found} is next; start a reader at the period wanted"
                )
            yield from self._encoded(table, first, last)
            start = last
        if period == self.periods[-1]:
            for _ in self._blocks:  # lets the pipeline finish instead of being torn down at exit
                raise DataError(f"Ray Data gave a block beyond the last step of period {period}")

    def _encoded(self, table: pa.Table, first: int, last: int) -> Iterator[Batch]:
        """The batches of a block, which has steps ``[first, last)``, encoded a chunk at a time."""
        plan, size = self.plan, chunk_steps(self.plan)
        widths = [width for _, width in plan.representations]
        step = _column(table, STEP)
        if len(step) and not first <= step[0] <= step[-1] < last:
            raise DataError(f"Ray Data gave steps {step[0]}..{step[-1]} where {first}..{last - 1} are due")
        for start in range(first, last, size):
            stop = min(last, start + size)
            rows = slice(*np.searchsorted(step, [start, stop]).tolist())
            part = table.slice(rows.start, rows.stop - rows.start)
            representation = representation_mask = None
            if plan.representations:
                representation = _matrix(part, REPRESENTATION, sum(widths))
                representation_mask = _matrix(part, REPRESENTATION_MASK, len(widths)).astype(np.bool_)
            chunk = self.encoder.encode(
                part,
                _column(part, KIND),
                _matrix(part, SUPERVISION, len(plan.supervision)),
                _matrix(part, SUPERVISION_MASK, len(plan.supervision)).astype(np.bool_),
                representation,
                representation_mask,
            )
            yield from cut(self.encoder, chunk, step[rows], start, stop)


def _matrix(table: pa.Table, name: str, width: int) -> npt.NDArray[Any]:
    """A column of fixed-size lists: ``[N, width]``."""
    return _column(table, name).reshape(table.num_rows, width)


def _column(table: pa.Table, name: str) -> npt.NDArray[Any]:
    column = table[name].combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0)
    if pa.types.is_null(column.type):
        return np.zeros(0, np.float32)
    flat = column.flatten() if pa.types.is_fixed_size_list(column.type) else column
    values: npt.NDArray[Any] = flat.to_numpy(zero_copy_only=False)
    return values.copy() if not values.flags.writeable else values


@contextmanager
def quiet_ray_data(ordered: bool = False, nodes: NodeLabels | None = None) -> Iterator[None]:
    """Ray Data without progress bars; ``ordered``: blocks come back in the order they were planned; ``nodes``: labels
    of those that tasks run on.

    A dataset made inside keeps these settings for its life.
    """
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # importing it has just set its own level
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = ordered
    context.execution_options.label_selector = nodes or None
    if ordered:
        context.target_max_block_size = None  # what a task gives is one block, however large
    with ray.data.DataContext.current(context):
        yield


def ahead(items: Iterator[ItemT], count: int = 1) -> Iterator[ItemT]:
    """``items``, made in a thread that keeps up to ``count`` for the taker. An error there is raised here; leaving
    early ends the thread."""
    results: queue.Queue[tuple[ItemT | None, BaseException | None]] = queue.Queue(maxsize=count)
    stopped = threading.Event()

    def put(item: tuple[ItemT | None, BaseException | None]) -> bool:
        while not stopped.is_set():
            try:
                results.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((None, StopIteration()))
        except BaseException as error:
            put((None, error))
        finally:
            if isinstance(items, Generator):
                items.close()  # in this thread, which is the one that runs it

    thread = threading.Thread(target=work, name="rayfm-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = results.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        stopped.set()
        thread.join()
