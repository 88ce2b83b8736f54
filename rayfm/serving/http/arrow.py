"""Reading Arrow IPC that strangers sent: nothing is decoded before its size is known, nothing used before it is valid.

Arrow's C++ reader checks the framing; `RecordBatch.validate(full=True)` checks what the buffers say (offsets, indices,
UTF-8). What is left is amplification: few bytes that stand for many. So compressed buffers are refused (the
uncompressed length is the sender's claim), rows and list values are counted first (a column of nulls takes no bytes at
all), and types that no feature has are refused, among them extension types, whose readers run code.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from rayfm.config import DataError
from rayfm.serving.http.config import LimitsConfig
from rayfm.serving.http.problems import Problem

# Slots in the tables of Arrow's Message.fbs.
_MESSAGE_HEADER = 2
_BATCH_LENGTH, _BATCH_COMPRESSION = 0, 3
_DICTIONARY_BATCH = 1

MAX_COLUMNS = 10_000
"""Columns of a table, in whatever form."""
_FIXED = frozenset(
    type_.id
    for type_ in (
        *(pa.null(), pa.bool_(), pa.decimal128(1)),
        *(pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()),
        *(pa.float16(), pa.float32(), pa.float64()),
    )
)
"""Types whose values have one size each: no list, and no text."""


def repeated(names: Sequence[str]) -> str | None:
    """The first name that stands twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def read_streams(body: bytes, count: int, max_rows: int, limits: LimitsConfig) -> list[pa.Table]:
    """The tables of ``count`` Arrow IPC streams back to back.

    Raises:
        DataError: there are more or fewer, one is malformed or cut off, or a column has a type that no feature has.
        Problem: too many rows or list values (413).
    """
    source = pa.BufferReader(body)
    tables: list[pa.Table] = []
    try:
        for _ in range(count):
            start = source.tell()
            if start == len(body):
                raise DataError(f"the body holds {len(tables)} of {count} Arrow IPC streams; send them back to back")
            _inspect(source, max_rows)
            source.seek(start)
            tables.append(_decode(source, limits))
    except (pa.ArrowException, OSError, struct.error, IndexError, ValueError, UnicodeError) as error:
        reason = (str(error).splitlines() or ["unreadable"])[0][:200]
        raise DataError(f"the body is no Arrow IPC stream: {reason}") from None
    if source.tell() != len(body):
        raise DataError(f"{len(body) - source.tell()} bytes follow the last Arrow IPC stream; send none")
    return tables


def _inspect(source: pa.BufferReader, max_rows: int) -> None:
    """Go over a stream's messages without decoding any."""
    messages = pa.ipc.MessageReader.open_stream(source)
    rows = 0
    while True:
        before = source.tell()
        try:
            message = messages.read_next_message()
        except StopIteration:
            # Arrow takes the end of the file for the end of a stream: only the marker tells a whole one from a cut one.
            if source.tell() == before:
                raise DataError("the Arrow IPC stream is cut off: its end marker is missing; send it again") from None
            return
        if message.type == "schema":
            continue
        if message.type not in ("record batch", "dictionary"):
            raise DataError(f"the Arrow IPC stream holds a {message.type} message; send tables alone")
        metadata = message.metadata.to_pybytes()
        batch = _table_field(metadata, _root(metadata), _MESSAGE_HEADER)
        if message.type == "dictionary":
            batch = _table_field(metadata, batch, _DICTIONARY_BATCH)
        if _field(metadata, batch, _BATCH_COMPRESSION) is not None:
            raise DataError("the Arrow IPC stream is compressed; send it without compression")
        length = _field(metadata, batch, _BATCH_LENGTH)
        if message.type == "record batch" and length is not None:
            rows += struct.unpack_from("<q", metadata, length)[0]
        if rows > max_rows:
            raise Problem(413, f"the request has more than {max_rows} rows; send fewer at a time")


def _decode(source: pa.BufferReader, limits: LimitsConfig) -> pa.Table:
    reader = pa.ipc.open_stream(source)
    names = reader.schema.names
    if len(names) > MAX_COLUMNS:
        raise DataError(f"a table has {len(names)} columns")
    twice = repeated(names)
    if twice is not None:
        raise DataError(f"column {twice!r} stands twice; send it once")
    for field in reader.schema:
        if field.type.id not in _FIXED and not _is_allowed(field.type):
            raise DataError(f"column {field.name!r} has type {field.type}, which no feature has")
    batches = []
    for batch in reader:
        batch.validate(full=True)
        batches.append(batch)
    table = pa.Table.from_batches(batches, reader.schema)
    for name in names:
        check_values(name, table[name], limits)
    return table


def check_values(name: str, column: pa.ChunkedArray, limits: LimitsConfig) -> None:
    """Refuse lists of more values, and ids that are longer, than the limits allow.

    Raises:
        Problem: 413, naming the column.
    """
    if column.type.id in _FIXED:
        return
    values = 0
    for chunk in column.chunks:
        flat = chunk
        if _is_list(chunk.type):
            flat = chunk.flatten()
            values += len(flat)
            if values > limits.max_list_values:
                raise Problem(413, f"column {name!r} holds more than {limits.max_list_values} values in its lists")
        words = flat.dictionary if pa.types.is_dictionary(flat.type) else flat
        if len(words) and _is_text(words.type):
            longest = pc.max(pc.binary_length(words)).as_py() or 0
            if longest > limits.max_id_bytes:
                raise Problem(413, f"column {name!r} holds a text of {longest} bytes; at most {limits.max_id_bytes}")


def _is_text(type_: pa.DataType) -> bool:
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_))


def _is_list(type_: pa.DataType) -> bool:
    return bool(pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_))


def _is_scalar(type_: pa.DataType) -> bool:
    return type_.id in _FIXED or _is_text(type_)


def _is_allowed(type_: pa.DataType) -> bool:
    if isinstance(type_, pa.BaseExtensionType):
        return False
    if pa.types.is_dictionary(type_):
        return _is_text(type_.value_type)
    return _is_scalar(type_.value_type) if _is_list(type_) else _is_scalar(type_)


def _root(data: bytes) -> int:
    position: int = struct.unpack_from("<I", data, 0)[0]
    return position


def _field(data: bytes, table: int, slot: int) -> int | None:
    """Where a flatbuffer table's field lies; None where it is left out. struct.error beyond the data."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    if vtable < 0:
        raise IndexError("the message's header is damaged")
    entry = 4 + 2 * slot
    if entry + 2 > struct.unpack_from("<H", data, vtable)[0]:
        return None
    offset: int = struct.unpack_from("<H", data, vtable + entry)[0]
    return table + offset if offset else None


def _table_field(data: bytes, table: int, slot: int) -> int:
    """Where the table lies that a field points to."""
    position = _field(data, table, slot)
    if position is None:
        raise IndexError("the message's header is damaged")
    target: int = position + struct.unpack_from("<I", data, position)[0]
    return target
