"""Files of one record a line, JSON or Python literals, gzipped or not, as Arrow tables."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import io
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.json as pjson

from rayfm.config import DataError, nearest
from rayfm.data.sources.files import text_errors
from rayfm.data.sources.tables import PART_BYTES, Slice, line_start

BLOCK_BYTES = 16 << 20
"""Bytes that are parsed at a time; no line may be longer."""

LITERAL_LINES = 16_384
SUFFIXES = (".json", ".json.gz")


def find_records(folder: Path, stems: tuple[str, ...], advice: str) -> Path:
    """The first of ``stems`` that is there as ``.json`` or ``.json.gz``.

    Args:
        advice: where the file is to be had, for the message.

    Raises:
        DataError: the folder or the file is missing.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; {advice}")
    for stem, suffix in itertools.product(stems, SUFFIXES):
        if (folder / f"{stem}{suffix}").is_file():
            return folder / f"{stem}{suffix}"
    raise DataError(f"{folder}: {' or '.join(f'{stem}.json' for stem in stems)} (or .json.gz) is missing; {advice}")


@dataclasses.dataclass(frozen=True)
class RecordPart:
    """Part of a file of records: the lines that begin in bytes ``[start, stop)``; a gzipped file is one part.

    JSON is parsed by Arrow. Python literals (``{'asin': ...}``, as some files of 2014 were published) have no such
    parser: they are read line by line, never evaluated.
    """

    log: str
    path: str
    file: int
    columns: tuple[tuple[str, pa.DataType], ...]
    """Keys to read; null where a record lacks one."""
    key: str
    """Column whose rows of equal value belong together."""
    literal: bool
    start: int
    stop: int
    size: int
    """Bytes on disk."""

    @property
    def schema(self) -> pa.Schema:
        """Of the tables."""
        return pa.schema(list(self.columns))

    def select(self, *names: str) -> RecordPart:
        """The same records with fewer columns."""
        return dataclasses.replace(self, columns=tuple(field for field in self.columns if field[0] in names))

    def tables(self) -> Iterator[pa.Table]:
        """The records in the file's order, a few MB at a time.

        Raises:
            DataError: the file is corrupt, a line is no record, or a value is not of its column's type.
        """
        with text_errors(self.path), contextlib.ExitStack() as stack:
            stream: Any
            if self.path.endswith(".gz"):
                stream = stack.enter_context(pa.input_stream(self.path, compression="gzip"))
            else:
                file = stack.enter_context(open(self.path, "rb"))
                first, last = (line_start(file, edge, begin=0) for edge in (self.start, self.stop))
                if first >= last:
                    return
                stream = Slice(file, first, last)
            yield from self._literals(stream) if self.literal else self._json(stream)

    def _json(self, stream: Any) -> Iterator[pa.Table]:
        parse = pjson.ParseOptions(explicit_schema=self.schema, unexpected_field_behavior="ignore")
        read = pjson.ReadOptions(block_size=BLOCK_BYTES, use_threads=False)
        for batch in pjson.open_json(stream, read_options=read, parse_options=parse):
            yield pa.Table.from_batches([batch]).select(self.schema.names)

    def _literals(self, stream: Any) -> Iterator[pa.Table]:
        # A line number counts from the part's start: only a gzipped file's is the file's own.
        lines = enumerate(io.TextIOWrapper(io.BufferedReader(stream), encoding="utf-8"), 1)
        names = self.schema.names
        while chunk := list(itertools.islice(lines, LITERAL_LINES)):
            records = [_literal(self.path, number, line) for number, line in chunk if line.strip()]
            try:
                arrays = [
                    pa.array([_loose(record.get(name), type_) for record in records], type_)
                    for name, type_ in self.columns
                ]
            except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                raise pa.ArrowInvalid(f"lines {chunk[0][0]} to {chunk[-1][0]}: {error}") from None
            yield pa.Table.from_arrays(arrays, names=names)


def _loose(value: Any, type_: pa.DataType) -> Any:
    """``5`` is a number like ``5.0``."""
    return float(value) if isinstance(value, int) and pa.types.is_floating(type_) else value


def _literal(path: str, number: int, line: str) -> dict[str, Any]:
    try:
        record = ast.literal_eval(line.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise DataError(f"{path}: line {number} is no Python dictionary; correct or replace the file")
    return record


def first_record(path: Path) -> tuple[dict[str, Any], bool]:
    """The file's first record, and whether it is a Python literal rather than JSON.

    Raises:
        DataError: the file cannot be read, is empty, or its first line is neither.
    """
    with text_errors(str(path)), contextlib.ExitStack() as stack:
        compression = "gzip" if path.suffix == ".gz" else None
        stream = stack.enter_context(pa.input_stream(str(path), compression=compression))
        line = next((text for text in io.TextIOWrapper(io.BufferedReader(stream), "utf-8") if text.strip()), "")
    if not line:
        raise DataError(f"{path}: the file is empty; download it again")
    with contextlib.suppress(ValueError):
        record = json.loads(line)
        if isinstance(record, dict):
            return record, False
    try:
        return _literal(str(path), 1, line), True
    except DataError:
        raise DataError(
            f"{path}: the first line is neither a JSON object nor a Python dictionary; correct or replace the file"
        ) from None


def split_records(
    log: str, path: Path, columns: Mapping[str, pa.DataType], key: str, optional: tuple[str, ...] = ()
) -> list[RecordPart]:
    """Parts of a file of records, in its order.

    Args:
        log: the log's name.
        path: ``.json`` or ``.json.gz``.
        columns: keys to read.
        key: the column whose rows of equal value belong together.
        optional: those of ``columns`` that the first record may lack.

    Raises:
        DataError: the file cannot be read, or its first record lacks a key.
    """
    record, literal = first_record(path)
    for name in columns:
        if name not in record and name not in optional:
            raise DataError(f"{path}: the first record has no key {name!r}{nearest(name, list(record))}")
    size = path.stat().st_size
    whole = RecordPart(log, str(path), 0, tuple(columns.items()), key, literal, 0, size, size)
    if path.suffix == ".gz":
        return [whole]
    return [
        dataclasses.replace(whole, start=edge, stop=min(edge + PART_BYTES, size), size=min(PART_BYTES, size - edge))
        for edge in range(0, size, PART_BYTES)
    ]
