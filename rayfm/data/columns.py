"""Columns of Arrow tables as arrays, put in an order where they are read anyway.

Shape letters: N rows.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

IntArray = npt.NDArray[np.int64]
ScalarT = TypeVar("ScalarT", bound=np.generic)


def one_array(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """The column as one array, itself where it is one (a column without rows has no chunk to begin with)."""
    if isinstance(column, pa.Array):
        return column
    if column.num_chunks == 1:
        return column.chunk(0)
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0) if array.num_chunks else pa.array([], column.type)
    return array


def list_parts(array: pa.Array) -> tuple[pa.Array, IntArray]:
    """Flat values and zero-based offsets ``[N + 1]`` of a list array of any flavour; a null list is an empty one."""
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    offsets = np.zeros(len(array) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return array.flatten(), offsets


def truncate(offsets: IntArray, max_len: int, newest: bool) -> tuple[IntArray, IntArray]:
    """Positions to keep, and the new offsets, when each list is cut to its last (or first) ``max_len`` items."""
    lengths = np.diff(offsets)
    kept = np.minimum(lengths, max_len)
    starts = offsets[1:] - kept if newest else offsets[:-1]
    new_offsets = np.zeros_like(offsets)
    np.cumsum(kept, out=new_offsets[1:])
    keep = np.arange(new_offsets[-1]) + np.repeat(starts - new_offsets[:-1], kept)
    return keep, new_offsets


def taken(column: pa.ChunkedArray | pa.Array, order: IntArray | None) -> pa.Array:
    """The column as one array, row i being its row ``order[i]``."""
    array = one_array(column)
    return array if order is None else array.take(pa.array(order))


def ordered(values: npt.NDArray[ScalarT], order: IntArray | None) -> npt.NDArray[ScalarT]:
    """The values, the i-th being the one at ``order[i]``; themselves without an order."""
    return values if order is None else values[order]


def put(values: npt.NDArray[ScalarT], order: IntArray | None, out: npt.NDArray[ScalarT]) -> None:
    """`ordered` into ``out``."""
    if order is None:
        out[:] = values
    else:
        np.take(values, order, out=out, mode="clip")  # numpy's default gathers beside ``out`` and copies


def whole_numbers(column: pa.Array) -> IntArray:
    """Whole numbers as int64, 0 for a null; a view where that is possible."""
    if column.null_count:
        column = pc.fill_null(column, 0)
    values: IntArray = column.to_numpy(zero_copy_only=False).astype(np.int64, copy=False)
    return values


def valid_rows(column: pa.Array) -> npt.NDArray[np.bool_]:
    """Where the column is not null, ``[N]``."""
    mask: npt.NDArray[np.bool_] = column.is_valid().to_numpy(zero_copy_only=False)
    return mask


def optional(
    table: pa.Table | pa.RecordBatch, name: str, default: npt.NDArray[ScalarT], order: IntArray | None
) -> npt.NDArray[ScalarT]:
    """A column in order, with ``default`` (in order) where it or its value is missing."""
    if table.schema.get_field_index(name) < 0:
        return default
    column = one_array(table[name])
    if column.null_count == len(column):
        return default
    found = column.fill_null(0).to_numpy(zero_copy_only=False).astype(default.dtype)
    values: npt.NDArray[ScalarT] = ordered(found, order)
    return values if not column.null_count else np.where(ordered(valid_rows(column), order), values, default)
