"""Dealing a period's rows to lanes, and what the manifest says about them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from rayfm.data.columns import one_array
from rayfm.data.sources.base import TRUTH_PREFIX
from rayfm.data.store import ExampleStore, LaneFile, Marginal, file_sha256
from rayfm.schema import EXAMPLE_ID, LOGGED_PREFIX, TIME, TRAFFIC, Kind, Schema

ROW_GROUP = 16_384
"""Rows of a lane's row group: what a reader decodes at a time."""


class LaneWriter:
    """Deals the rows of one (period, kind), given in time order, to L lanes in turn, and writes them as Parquet.

    Row groups are always cut at the same rows, so the bytes depend on the rows alone, not on how they arrived.
    Columns ``truth/...`` go to the separate truth files, in the same order.

    Args:
        columns: the table's columns in the store's order, without ``kind``.
    """

    def __init__(
        self, store: ExampleStore, period: str, kind: Kind, lanes: int, schema: Schema, columns: pa.Schema
    ) -> None:
        self.kind, self._lanes = kind, lanes
        self.rows = 0
        truth = [name for name in columns.names if name.startswith(TRUTH_PREFIX)]
        self._truth = truth
        self._examples = [name for name in columns.names if name not in truth]
        self._example_paths = [store.lane_path(period, kind, lane) for lane in range(lanes)]
        truth_paths = [store.truth_path(period, kind, lane) for lane in range(lanes)] if truth else []
        self._example_files = [_open(path, columns, self._examples, schema) for path in self._example_paths]
        self._truth_files = [_open(path, columns, truth, schema) for path in truth_paths]
        self._buffers: list[list[pa.Table]] = [[] for _ in range(lanes)]
        self._buffered = [0] * lanes
        self._written = [0] * lanes
        own = {task.name for task in schema.tasks}
        means = [name for name in columns.names if name in own or name.startswith((LOGGED_PREFIX, TRUTH_PREFIX))]
        self._sums = [_Sums(schema.traffics, means) for _ in range(lanes)]

    def write(self, table: pa.Table) -> None:
        """Deal the next rows of the time order."""
        for lane in range(self._lanes):
            rows = np.arange((lane - self.rows) % self._lanes, table.num_rows, self._lanes)
            if not len(rows):
                continue
            self._buffers[lane].append(table.take(pa.array(rows)))
            self._buffered[lane] += len(rows)
            while self._buffered[lane] >= ROW_GROUP:
                self._flush(lane)
        self.rows += table.num_rows

    def _flush(self, lane: int) -> None:
        table = pa.concat_tables(self._buffers[lane]).combine_chunks()
        group, rest = table.slice(0, ROW_GROUP), table.slice(ROW_GROUP)
        self._buffers[lane], self._buffered[lane] = [rest] if rest.num_rows else [], rest.num_rows
        self._written[lane] += group.num_rows
        self._sums[lane].add(group)
        self._example_files[lane].write_table(group.select(self._examples), row_group_size=ROW_GROUP)
        if self._truth_files:
            self._truth_files[lane].write_table(group.select(self._truth), row_group_size=ROW_GROUP)

    def close(self) -> list[LaneFile]:
        """Write what is left; the manifest's entries of the lane files."""
        for lane in range(self._lanes):
            if self._buffered[lane]:
                self._flush(lane)
        for file in (*self._example_files, *self._truth_files):
            file.close()
        return [
            LaneFile(
                kind=self.kind,
                lane=lane,
                rows=self._written[lane],
                bytes=path.stat().st_size,
                sha256=file_sha256(path),
            )
            for lane, path in enumerate(self._example_paths)
        ]

    def marginals(self) -> list[Marginal]:
        """Means by traffic; summed lane by lane, so that they too depend on the rows alone."""
        rows = np.sum([sums.rows for sums in self._sums], axis=0)
        total = np.sum([sums.total for sums in self._sums], axis=0)
        known = np.sum([sums.known for sums in self._sums], axis=0)
        marginals = []
        for position, traffic in enumerate(self._sums[0].traffics):
            if rows[position]:
                means = {
                    name: float(total[column, position] / known[column, position])
                    for column, name in enumerate(self._sums[0].columns)
                    if known[column, position]
                }
                marginals.append(Marginal(kind=self.kind, traffic=traffic, rows=int(rows[position]), means=means))
        return marginals


def _open(path: Path, columns: pa.Schema, names: list[str], schema: Schema) -> pq.ParquetWriter:
    """LZ4, since a file is written once and decoded by every trainer of every run: beside Zstandard it is decoded
    in half the time and takes up to a quarter more of the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    binary = {task.name for task in schema.tasks if task.kind == "binary"}
    fields = [columns.field(name) for name in names]
    repeating = [
        f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name
        for field in fields
        if field.name in binary or not _mostly_distinct(field)
    ]
    # A dictionary of values that do not repeat makes a file larger and slower, at either end.
    return pq.ParquetWriter(path, pa.schema(fields), compression="lz4", use_dictionary=repeating or False)


def _mostly_distinct(field: pa.Field) -> bool:
    inner = field.type.value_type if pa.types.is_list(field.type) else field.type
    return bool(pa.types.is_floating(inner)) or field.name in (EXAMPLE_ID, TIME)


class _Sums:
    """Sums of C columns over known values, by traffic."""

    def __init__(self, traffics: tuple[str, ...], columns: list[str]) -> None:
        self.traffics, self.columns = traffics, columns
        self.rows: npt.NDArray[np.int64] = np.zeros(len(traffics), np.int64)
        self.total: npt.NDArray[np.float64] = np.zeros((len(columns), len(traffics)))
        self.known: npt.NDArray[np.int64] = np.zeros((len(columns), len(traffics)), np.int64)

    def add(self, table: pa.Table) -> None:
        words = one_array(table[TRAFFIC]).dictionary_encode()
        place = np.array([self.traffics.index(word) for word in words.dictionary.to_pylist()], np.int64)
        traffic = place[words.indices.to_numpy()]
        count = len(self.traffics)
        self.rows += np.bincount(traffic, minlength=count)
        for column, name in enumerate(self.columns):
            values = one_array(table[name]).to_numpy(zero_copy_only=False).astype(np.float64)
            known = ~np.isnan(values)
            self.total[column] += np.bincount(traffic[known], values[known], minlength=count)
            self.known[column] += np.bincount(traffic[known], minlength=count)
