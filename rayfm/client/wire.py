"""What goes over the wire, for servers and clients alike: names of headers and types, and how tables become bytes.

A teacher's request is one Arrow IPC stream of rows. A student's is two, back to back: the user's features (one row),
then the candidates' (a row each), so that what all candidates share is sent once. A reply is one stream: a float32
column per task, a row per candidate, in their order. As JSON, a table is an object of columns::

    {"user": {"user": 7, "age": 31.0}, "candidates": {"ad": ["a", "b"]}}          to a student
    {"rows": {"user": [7, 7], "age": [31.0, 31.0], "ad": ["a", "b"]}}             to a teacher
    {"version": "2024-01-01-1f0c9a3e", "predictions": {"click": [0.02, 0.11]}}    from both
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import pyarrow as pa

ARROW = "application/vnd.apache.arrow.stream"
JSON = "application/json"
PROBLEM = "application/problem+json"

VERSION_HEADER = "x-rayfm-version"
"""The version that made a reply, also in the metadata of its Arrow schema and in JSON's ``version``."""

TIMEOUT_HEADER = "x-rayfm-timeout-ms"
"""Milliseconds from the request's arrival in which the caller still wants an answer."""

Columns: TypeAlias = pa.Table | Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Scored:
    """A reply.

    Attributes:
        version: the version that made every one of its predictions.
        predictions: a float32 column per task, in the order of the candidates or rows; a teacher's may also hold its
            ``representation``.
    """

    version: str
    predictions: pa.Table


def to_table(columns: Columns) -> pa.Table:
    """A table of columns, ``[N]`` values each."""
    return columns if isinstance(columns, pa.Table) else pa.table(dict(columns))


def to_row(values: Columns) -> pa.Table:
    """A table of one row: of a mapping feature -> value (a list for a feature that is one)."""
    return values if isinstance(values, pa.Table) else pa.table({name: [value] for name, value in values.items()})


def write_stream(table: pa.Table, version: str | None = None) -> bytes:
    """An Arrow IPC stream of a table."""
    schema = table.schema
    if version is not None:
        schema = schema.with_metadata({VERSION_HEADER: version})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def write_streams(tables: Sequence[pa.Table]) -> bytes:
    """Streams back to back."""
    return b"".join(write_stream(table) for table in tables)
