"""The external merge sort behind prepare: sorted fragments on disk, merged in time order with bounded memory.

A map task sorts its rows by time and writes one fragment a period: an Arrow file of small record batches. A reduce task
sweeps over the batches of its period in the order of their first times; rows earlier than the first time of the next
batch are final. So it holds one window of rows, and of each fragment that overlaps the sweep at most one batch.
"""

from __future__ import annotations

import contextlib
import errno
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayfm.config import CapacityError, Config
from rayfm.data.sources.base import Period
from rayfm.data.validate import REASON, period_index, split_rejects
from rayfm.schema import EXAMPLE_ID, TIME, Schema, mix64

BATCH_ROWS = 1024
"""Rows of a fragment's record batch: the unit that a merge reads."""

WINDOW_ROWS = 65_536
"""Rows that a merge gathers before it sorts and emits."""

IDS_A_PASS = 1 << 20
"""Example ids that the search for duplicates holds at a time (8 bytes each)."""

UNKNOWN_PERIOD = "unknown"
"""Where rejects go whose time belongs to no period."""

_OPEN_FILES = 200


class Fragment(Config):
    """One sorted run of rows of one period in the staging folder."""

    period: str
    path: str
    rows: int
    first_times: tuple[int, ...] = ()
    """Time of the first row of each record batch; empty for rejects, which are not sorted."""
    rejected: dict[str, int] = {}
    """Reason -> rows; empty for good rows."""


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk into the error that says so."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise CapacityError(f"{path}: the disk is full; free space or choose another example store root") from None
        raise


def _write(path: Path, table: pa.Table, batch_rows: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(path):
        # Batches are small: handing their buffers to Arrow's threads costs more than what they do.
        options = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema, options=options) as writer:
            writer.write_table(table, max_chunksize=batch_rows)


def stage_rows(
    table: pa.Table,
    schema: Schema,
    periods: Sequence[Period],
    wanted: frozenset[str],
    folder: Path,
    batch_rows: int = BATCH_ROWS,
) -> list[Fragment]:
    """Validate a block of raw rows and write it as fragments; rows of periods that are not ``wanted`` are left out.

    Raises:
        DataError: a column is missing or of a type that never fits.
        CapacityError: the disk is full.
    """
    if not table.num_rows:
        return []
    good, rejects = split_rejects(table, schema, periods)
    fragments = []
    if good.num_rows:
        order = time_order(good)
        good = (good if order is None else good.take(pa.array(order))).combine_chunks()
        times = good[TIME].to_numpy()
        index = period_index(times, periods)
        cuts = np.flatnonzero(np.diff(index, prepend=-2))
        for start, stop in zip(cuts, np.append(cuts[1:], len(index)), strict=True):
            name = periods[index[start]].name
            if name in wanted:
                path = folder / f"period={name}" / f"{uuid.uuid4().hex}.arrow"
                _write(path, good.slice(start, stop - start), batch_rows)
                first = tuple(times[start:stop:batch_rows].tolist())
                fragments.append(Fragment(period=name, path=str(path), rows=int(stop - start), first_times=first))
    if rejects.num_rows:
        fragments += stage_rejects(rejects, periods, wanted, folder)
    return fragments


def time_order(table: pa.Table) -> npt.NDArray[np.int64] | None:
    """The rows of ``table`` by (time, example_id) ``[N]``; None where they stand in that order, as logs often do."""
    times, ids = table[TIME].to_numpy(), table[EXAMPLE_ID].to_numpy()
    later = times[1:] > times[:-1]
    if np.all(later | ((times[1:] == times[:-1]) & (ids[1:] >= ids[:-1]))):
        return None
    return np.lexsort((ids, times))


def stage_rejects(rejects: pa.Table, periods: Sequence[Period], wanted: frozenset[str], folder: Path) -> list[Fragment]:
    """Write bad rows (with their ``reason``) by period; rows whose time fits nowhere go to the unknown one."""
    try:
        times = rejects[TIME].combine_chunks().cast(pa.int64(), safe=False).fill_null(-1).to_numpy()
        index = period_index(times, periods)
    except pa.ArrowInvalid:
        index = np.full(rejects.num_rows, -1, np.int64)
    fragments = []
    for position in np.unique(index):
        name = UNKNOWN_PERIOD if position < 0 else periods[position].name
        if position >= 0 and name not in wanted:
            continue
        part = rejects.filter(pa.array(index == position))
        counts = part[REASON].value_counts()
        reasons = dict(zip(counts.field(0).to_pylist(), counts.field(1).to_pylist(), strict=True))
        path = folder / "rejects" / f"period={name}" / f"{uuid.uuid4().hex}.arrow"
        _write(path, part, 65_536)
        fragments.append(Fragment(period=name, path=str(path), rows=part.num_rows, rejected=reasons))
    return fragments


class _Readers:
    """Open fragment files, as many as the limit on open files allows."""

    def __init__(self, fragments: Sequence[Fragment]) -> None:
        self._fragments = fragments
        self._open: dict[int, pa.ipc.RecordBatchFileReader] = {}

    def batch(self, fragment: int, number: int) -> pa.Table:
        reader = self._open.pop(fragment, None)
        if reader is None:
            options = pa.ipc.IpcReadOptions(use_threads=False)
            reader = pa.ipc.open_file(pa.OSFile(self._fragments[fragment].path), options=options)
        if number < len(self._fragments[fragment].first_times) - 1:
            if len(self._open) >= _OPEN_FILES:
                self._open.pop(next(iter(self._open)))  # the least recently used
            self._open[fragment] = reader
        return pa.Table.from_batches([reader.get_batch(number)])


def merge_sorted(
    fragments: Sequence[Fragment], schema: pa.Schema, window_rows: int = WINDOW_ROWS
) -> Iterator[pa.Table]:
    """Every row of the fragments in the order of (time, example_id), in windows; rows of one time stay together.

    Args:
        fragments: of one period.
        schema: of the result; a fragment that lacks a column gets nulls.
        window_rows: rows to gather before emitting; the peak is this and one batch of each overlapping fragment.
    """
    order = sorted(
        (time, fragment, number)
        for fragment, entry in enumerate(fragments)
        for number, time in enumerate(entry.first_times)
    )
    readers = _Readers(fragments)
    pending: list[pa.Table] = []
    held, enough = 0, window_rows
    for position, (_, fragment, number) in enumerate(order):
        batch = readers.batch(fragment, number)
        pending.append(batch if batch.schema == schema else _with_columns(batch, schema))
        held += batch.num_rows
        last = position == len(order) - 1
        if held < enough and not last:
            continue
        table = pa.concat_tables(pending)
        times, rows = table[TIME].to_numpy(), time_order(table)
        in_order = times if rows is None else times[rows]
        final = len(times) if last else int(np.searchsorted(in_order, order[position + 1][0], "left"))
        if final:
            yield (table.slice(0, final) if rows is None else table.take(pa.array(rows[:final]))).combine_chunks()
        # Without the emitted batches, so that they are freed: a table in order is a row of batches, another one is
        # copied. Where much is left over, gather more before the next sort.
        rest = table.slice(final) if rows is None else table.take(pa.array(rows[final:]))
        pending, held = [rest], rest.num_rows
        enough = max(window_rows, 2 * held)


def _with_columns(table: pa.Table, schema: pa.Schema) -> pa.Table:
    known = set(table.column_names)
    columns = [
        table[field.name] if field.name in known else pa.nulls(table.num_rows, field.type).cast(field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def duplicated_ids(fragments: Sequence[Fragment], ids_a_pass: int = IDS_A_PASS) -> npt.NDArray[np.int64]:
    """Example ids that stand more than once in a period, rising ``[M]``.

    Holds about ``ids_a_pass`` ids at a time: each pass looks at the ids whose hash falls to it.
    """
    rows = sum(fragment.rows for fragment in fragments)
    passes = max(1, -(-rows // ids_a_pass))
    found = []
    for turn in range(passes):
        pieces = []
        for ids in _read_ids(fragments):
            pieces.append(ids if passes == 1 else ids[mix64(ids) % np.uint64(passes) == np.uint64(turn)])
        ids, counts = np.unique(np.concatenate(pieces or [np.zeros(0, np.int64)]), return_counts=True)
        found.append(ids[counts > 1])
    return np.sort(np.concatenate(found))


def _read_ids(fragments: Iterable[Fragment]) -> Iterator[npt.NDArray[np.int64]]:
    for fragment in fragments:
        with pa.OSFile(fragment.path) as file:
            position = pa.ipc.open_file(file).schema.get_field_index(EXAMPLE_ID)
            reader = pa.ipc.open_file(
                file, options=pa.ipc.IpcReadOptions(use_threads=False, included_fields=[position])
            )
            yield reader.read_all().column(0).to_numpy()


def fragment_columns(fragments: Sequence[Fragment]) -> set[str]:
    """Every column that any of the fragments has (blocks of a source may differ in optional ones)."""
    names: set[str] = set()
    for fragment in fragments:
        with pa.OSFile(fragment.path) as file:
            names.update(pa.ipc.open_file(file).schema.names)
    return names
