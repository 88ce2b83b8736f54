"""CSV and Parquet files of a log as typed columns: whole, or in parts that tasks read side by side."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.parquet as pq

from rayfm.config import DataError, nearest
from rayfm.data.sources.files import NULLS, first_line, parquet_errors, text_errors

PART_BYTES = 256 << 20
"""Bytes of a file that one task reads, about."""

BLOCK_BYTES = 8 << 20
BLOCK_ROWS = 131_072
LIST_SEPARATOR = "^"
"""Between the ids of a list that stands in one CSV field."""

SUFFIXES = (".parquet", ".csv", ".csv.gz")

Int64 = npt.NDArray[np.int64]


def find_table(folder: Path, stem: str, advice: str) -> Path:
    """The file called ``stem`` as Parquet or, failing that, as CSV, gzipped or not.

    Args:
        advice: where the file is to be had, for the message.

    Raises:
        DataError: the folder or the file is missing.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; {advice}")
    for suffix in SUFFIXES:
        if (folder / f"{stem}{suffix}").is_file():
            return folder / f"{stem}{suffix}"
    raise DataError(f"{folder}: {stem}.csv (or .csv.gz, .parquet) is missing; {advice}")


@dataclasses.dataclass(frozen=True)
class TablePart:
    """Part of a CSV or Parquet file: the lines that begin in some bytes of it, or some row groups.

    Fields are never quoted over several lines in the logs that this reads. A gzipped file is one part.
    """

    log: str
    """The log that the part belongs to."""
    path: str
    file: int
    """Position of the file among those of its log."""
    columns: tuple[tuple[str, pa.DataType], ...]
    """What to read: int64, float64, string, or a list of int64 (``1^2^3`` in CSV)."""
    key: str
    """Column whose rows of equal value belong together."""
    start: int
    stop: int
    """Bytes or row groups ``[start, stop)``."""
    size: int
    """Bytes on disk, about."""

    @property
    def schema(self) -> pa.Schema:
        """Of the tables."""
        return pa.schema(list(self.columns))

    def tables(self) -> Iterator[pa.Table]:
        """The rows in the file's order, a few MB at a time.

        Raises:
            DataError: the file is corrupt, or a value is not of its column's type.
        """
        raw = self._parquet() if self.path.endswith(".parquet") else self._csv()
        for table in raw:
            arrays = [_cast(self.path, name, table[name], type_) for name, type_ in self.columns]
            yield pa.Table.from_arrays(arrays, schema=self.schema)

    def select(self, *names: str) -> TablePart:
        """The same rows with fewer columns."""
        return dataclasses.replace(self, columns=tuple(field for field in self.columns if field[0] in names))

    def _parquet(self) -> Iterator[pa.Table]:
        with parquet_errors(self.path):
            file = pq.ParquetFile(self.path)
            # Names as they stand in the file, which may end with a space.
            raw_names = {name.strip(): name for name in file.schema_arrow.names}
            batches = file.iter_batches(
                BLOCK_ROWS,
                row_groups=list(range(self.start, self.stop)),
                columns=[raw_names[name] for name, _ in self.columns],
                use_threads=False,
            )
        while True:
            with parquet_errors(self.path):
                batch = next(batches, None)
            if batch is None:
                return
            table = pa.Table.from_batches([batch])
            yield table.rename_columns([name.strip() for name in table.column_names])

    def _csv(self) -> Iterator[pa.Table]:
        with text_errors(self.path), contextlib.ExitStack() as stack:
            if self.path.endswith(".gz"):
                names = header(self.path)
                stream: Any = stack.enter_context(pa.input_stream(self.path, compression="gzip"))
                skip = 1
            else:
                file = stack.enter_context(open(self.path, "rb"))
                names = header(self.path)
                file.readline()
                begin = file.tell()
                first, last = (line_start(file, edge, begin) for edge in (self.start, self.stop))
                if first >= last:
                    return
                stream, skip = Slice(file, first, last), 0
            types = {
                name: pa.string() if pa.types.is_list(type_) or pa.types.is_string(type_) else type_
                for name, type_ in self.columns
            }
            convert = pcsv.ConvertOptions(
                column_types=types, include_columns=list(types), null_values=NULLS, strings_can_be_null=True
            )
            read = pcsv.ReadOptions(block_size=BLOCK_BYTES, use_threads=False, column_names=names, skip_rows=skip)
            try:
                batches = iter(pcsv.open_csv(stream, read_options=read, convert_options=convert))
            except pa.ArrowInvalid as error:
                if "Empty CSV" in str(error):  # a gzipped file of a header alone
                    return
                raise
            for batch in batches:
                yield pa.Table.from_batches([batch])


class Slice(io.RawIOBase):
    """Bytes ``[first, last)`` of an open file, as a file of their own."""

    def __init__(self, file: IO[bytes], first: int, last: int) -> None:
        super().__init__()
        self._file, self._left = file, last - first
        file.seek(first)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        piece = self._file.read(min(len(view), self._left))
        view[: len(piece)] = piece
        self._left -= len(piece)
        return len(piece)


def line_start(file: IO[bytes], position: int, begin: int) -> int:
    """Where the first line that begins at or after ``position`` begins; no line counts before ``begin``."""
    if position <= begin:
        return begin
    file.seek(position - 1)
    file.readline()
    return file.tell()


def header(path: str) -> list[str]:
    """Column names of a CSV file, without the spaces around them (official headers have some).

    Raises:
        DataError: the file cannot be read.
    """
    opener: Any = gzip.open if path.endswith(".gz") else open
    with text_errors(path), opener(path, "rt", encoding="utf-8-sig", errors="replace") as file:
        return [name.strip().strip('"').strip() for name in file.readline().split(",")]


def column_names(path: str) -> list[str]:
    """Names of a file's columns, without the spaces around them.

    Raises:
        DataError: the file cannot be read.
    """
    if path.endswith(".parquet"):
        with parquet_errors(path):
            return [name.strip() for name in pq.read_schema(path).names]
    return header(path)


def split_file(log: str, path: Path, file: int, columns: Mapping[str, pa.DataType], key: str) -> list[TablePart]:
    """Parts of one file of a log, in its order.

    Args:
        log: the log's name.
        path: ``.csv``, ``.csv.gz`` or ``.parquet``.
        file: the file's position in its log.
        columns: what to read.
        key: the column whose rows of equal value belong together.

    Raises:
        DataError: the file cannot be read or lacks a column.
    """
    text = str(path)
    known = column_names(text)
    for name in columns:
        if name not in known:
            raise DataError(f"{path}: column {name!r} is missing{nearest(name, known)}")
    size = path.stat().st_size
    part = TablePart(log, text, file, tuple(columns.items()), key, 0, size, size)
    if text.endswith(".gz"):
        return [part]
    if text.endswith(".parquet"):
        with parquet_errors(text):
            metadata = pq.read_metadata(text)
        groups = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
        return _group(part, groups)
    edges = range(0, max(size, 1), PART_BYTES)
    return [
        dataclasses.replace(part, start=edge, stop=min(edge + PART_BYTES, size), size=min(PART_BYTES, size - edge))
        for edge in edges
    ]


def _group(part: TablePart, group_bytes: list[int]) -> list[TablePart]:
    """Row groups in turn, as many to a part as make up PART_BYTES."""
    parts, start, total = [], 0, 0
    for group, size in enumerate(group_bytes):
        total += size
        if total >= PART_BYTES or group == len(group_bytes) - 1:
            parts.append(dataclasses.replace(part, start=start, stop=group + 1, size=total))
            start, total = group + 1, 0
    return parts or [dataclasses.replace(part, start=0, stop=0, size=0)]


def guess_rows(path: Path, row_bytes: int) -> int:
    """Rows of a file: exact for Parquet, from its size for CSV (gzipped: at a fourth of ``row_bytes``)."""
    if path.suffix == ".parquet":
        with parquet_errors(str(path)):
            return int(pq.read_metadata(path).num_rows)
    return path.stat().st_size * (4 if path.suffix == ".gz" else 1) // row_bytes


@dataclasses.dataclass(frozen=True)
class Side:
    """A feature file in memory, by key."""

    keys: Int64
    """Rising ``[K]``."""
    table: pa.Table

    def find(self, keys: pa.ChunkedArray) -> pa.Array:
        """Row of each key ``[N]``, null where the file has none; the first of several."""
        if not len(self.keys):
            return pa.nulls(len(keys), pa.int64())
        wanted = keys.fill_null(-1).to_numpy()
        found = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        missing = (self.keys[found] != wanted) | keys.is_null().to_numpy()
        return pa.array(found, mask=missing)


def read_side(path: Path, key: str, columns: Mapping[str, pa.DataType]) -> Side:
    """A feature file, by an int64 ``key``: whole numbers may be written ``3.0``, missing ones are null.

    Raises:
        DataError: the file is corrupt, lacks a column, or a value is not of its column's type.
    """
    wanted = {key: pa.int64(), **columns}
    loose = {name: pa.float64() if pa.types.is_integer(type_) else type_ for name, type_ in wanted.items()}
    if path.suffix == ".parquet":
        loose = wanted
    tables = [table for part in split_file("", path, 0, loose, key) for table in part.tables()]
    whole = pa.concat_tables(tables) if tables else pa.schema(list(loose.items())).empty_table()
    arrays = {name: _cast(str(path), name, _finite(whole[name]), type_) for name, type_ in wanted.items()}
    table = pa.table(arrays).filter(pc.is_valid(arrays[key])).combine_chunks()
    keys = table[key].to_numpy()
    order = np.argsort(keys, kind="stable")
    return Side(keys[order], table.take(pa.array(order)).combine_chunks())


def _finite(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if not pa.types.is_floating(column.type):
        return column
    return pc.if_else(pc.is_finite(column), column, pa.scalar(None, column.type))


def _cast(path: str, name: str, column: pa.ChunkedArray, target: pa.DataType) -> pa.ChunkedArray:
    if column.type == target and not pa.types.is_string(target):
        return column
    try:
        if pa.types.is_string(target):
            text = column.cast(target)  # a Parquet file may spell a missing value as CSV does
            return pc.if_else(pc.is_in(text, pa.array(NULLS)), pa.scalar(None, target), text)
        if pa.types.is_list(target):
            return _split_lists(column).cast(target)
        if pa.types.is_string(column.type):
            raise pa.ArrowInvalid("text where numbers are wanted")
        return column.cast(target)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(
            f"{path}: column {name!r} is {column.type}, {target} is wanted ({first_line(error)}); correct or replace "
            "the file"
        ) from None


def _split_lists(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """``1^2^3`` to lists of int64, an empty or missing field to an empty list."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        lists = array
    else:
        text = pc.fill_null(array.cast(pa.string()), "")
        text = pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)
        lists = pc.split_pattern(text, LIST_SEPARATOR)
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    values = pc.list_flatten(lists).cast(pa.int64())
    return pa.chunked_array([pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)])
