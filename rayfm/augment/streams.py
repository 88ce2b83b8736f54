"""The streams as Parquet files: which rows come next, and where each stream stands."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from rayfm.augment.arrivals import check_columns
from rayfm.augment.config import IMPRESSIONS, JoinConfig
from rayfm.augment.state import NEVER
from rayfm.config import DataError
from rayfm.data.sources.files import list_files, open_parquet, parquet_errors


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Rows of one file, and what to remember once they are taken in."""

    stream: str
    path: str
    table: pa.Table
    offsets: dict[str, Any]


def read_rows(file: pq.ParquetFile, start: int, stop: int) -> pa.Table:
    """Rows ``[start, stop)`` of a Parquet file; row groups without any of them are not read."""
    first, groups, skipped = 0, [], 0
    for group in range(file.metadata.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if first + rows <= start:
            skipped = first + rows
        elif first < stop:
            groups.append(group)
        first += rows
    return file.read_row_groups(groups, use_threads=False).slice(start - skipped, stop - start)


class FileStreams:
    """The files of a join's streams that have rows to read.

    Args:
        config: the join's.
        offsets: what is taken in already: ``<stream>/<path>`` -> [rows taken, bytes of the file, rows of the file]. A
            file whose rows are all taken is not opened. Earlier offsets lack the last number, and name no files without
            rows: what is found of such files stands in the next chunk's offsets.

    Raises:
        DataError: a stream has no files, its newest one lacks a column, or a file that was read has changed since.
    """

    def __init__(self, config: JoinConfig, offsets: Mapping[str, Any]) -> None:
        self._config = config
        self._files: dict[str, tuple[pafs.FileSystem, list[str]]] = {}
        self._taken: dict[str, int] = {}
        self._bytes: dict[str, int] = {}
        self._found: dict[str, list[int]] = {}
        for stream, part in {IMPRESSIONS: config.impressions, **config.feedback}.items():
            filesystem, paths = list_files(part.path)
            finished = set()
            for info in filesystem.get_file_info(paths):
                key = f"{stream}/{info.path}"
                self._bytes[key] = info.size
                if key not in offsets:
                    continue
                taken, size, *rows = offsets[key]
                if size != info.size:
                    raise DataError(
                        f"{info.path}: has {info.size} bytes, and had {size} when its rows were read; a log's files "
                        "must not change: put new rows into new files"
                    )
                self._taken[key] = taken
                if rows == [taken]:
                    finished.add(info.path)
            self._files[stream] = (filesystem, [path for path in paths if path not in finished])
            names = open_parquet(filesystem, paths[-1]).schema_arrow.names
            check_columns(paths[-1], config, None if stream == IMPRESSIONS else stream, names)

    def next(self, seen: Mapping[str, int]) -> Chunk | None:
        """The next rows of the stream that is furthest behind in event time, None where every stream is read.

        The furthest behind is the one that holds the watermark back: reading it first keeps the state small.
        """
        for stream in sorted(self._files, key=lambda name: seen.get(name, NEVER)):
            chunk = self._next(stream)
            if chunk is not None:
                return chunk
        return None

    def _next(self, stream: str) -> Chunk | None:
        filesystem, paths = self._files[stream]
        while paths:
            path = paths[0]
            key = f"{stream}/{path}"
            start = self._taken.get(key, 0)
            file = open_parquet(filesystem, path)
            rows = file.metadata.num_rows
            stop = min(start + self._config.batch_rows, rows)
            if start >= rows:
                self._found[key] = [rows, self._bytes[key], rows]
                paths.pop(0)
                continue
            with parquet_errors(path):
                table = read_rows(file, start, stop)
            self._taken[key] = stop
            offsets = {**self._found, key: [stop, self._bytes[key], rows]}
            self._found = {}
            if stop == rows:
                paths.pop(0)
            return Chunk(stream, path, table, offsets)
        return None
