"""From a source's Arrow types to the example store's: which columns there are, and what cannot be represented.

A type that can never fit (text where the schema wants a number) is an error of the whole job; a value that does not
fit (an id beyond int64) makes its row a reject.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rayfm.config import DataError, nearest
from rayfm.data.columns import list_parts, one_array
from rayfm.data.sources.base import KIND_COLUMN, TRUTH_PREFIX
from rayfm.schema import LOGGED_PREFIX, RESERVED_COLUMNS, Schema

Bool = npt.NDArray[np.bool_]
INT64_MAX, INT64_MIN = 2**63 - 1, -(2**63)


def store_schema(schema: Schema, names: Iterable[str]) -> pa.Schema:
    """The columns that prepare keeps of a source's columns ``names``, in the store's order and types.

    First the schema's own; then reserved, ``logged/`` and ``truth/`` columns where present; ``kind`` last. Whatever
    else the source has is left out.

    Raises:
        DataError: the source lacks a column of the schema, or ``kind``.
    """
    present = set(names)
    fields = list(schema.arrow_schema())
    for name in [*(field.name for field in fields), KIND_COLUMN]:
        if name not in present:
            raise DataError(f"the source's examples lack column {name!r}{nearest(name, sorted(present))}")
    taken = {field.name for field in fields}
    fields += [pa.field(name, RESERVED_COLUMNS[name]) for name in sorted((present & set(RESERVED_COLUMNS)) - taken)]
    extra = sorted(name for name in present - taken if name.startswith((LOGGED_PREFIX, TRUTH_PREFIX)))
    fields += [pa.field(name, pa.float32()) for name in extra]
    return pa.schema([*fields, pa.field(KIND_COLUMN, pa.string())])


def any_in_list(mask: Bool, offsets: npt.NDArray[np.int64]) -> Bool:
    """Which lists hold a value that ``mask`` marks: ``[values] -> [N]``."""
    marked = np.concatenate([[0], np.cumsum(mask)])
    hit: Bool = marked[offsets[1:]] > marked[offsets[:-1]]
    return hit


def _is_list(type_: pa.DataType) -> bool:
    return bool(pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_))


def _is_number(type_: pa.DataType) -> bool:
    return bool(pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_decimal(type_))


def _is_text(type_: pa.DataType) -> bool:
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_))


def _flat(array: pa.Array, target: pa.DataType) -> tuple[pa.Array, Bool | None] | None:
    """``array`` as ``target`` with a mask of values that it cannot hold (null there); None for a hopeless type."""
    found = array.type
    if found == target:
        return array, None
    if pa.types.is_null(found):
        return pa.nulls(len(array), target), None
    if pa.types.is_string(target):
        return (array.cast(pa.string()), None) if _is_text(found) else None
    if pa.types.is_floating(target):
        if pa.types.is_boolean(found):
            return array.cast(pa.uint8()).cast(target), None
        return (array.cast(target, safe=False), None) if _is_number(found) else None
    if pa.types.is_decimal128(found):
        bounds = [pa.scalar(bound, pa.decimal256(19)) for bound in (INT64_MIN, INT64_MAX)]
        bad = pc.or_(pc.less(array, bounds[0]), pc.greater(array, bounds[1]))
        bad = pc.or_(bad, pc.not_equal(pc.floor(array), array))
    elif found == pa.uint64():
        bad = pc.greater(array, pa.scalar(INT64_MAX, pa.uint64()))
    elif pa.types.is_integer(found):
        if target.bit_width >= 64 or found.bit_width < target.bit_width:
            return array.cast(target), None
        limit = 2 ** (target.bit_width - 1)
        bad = pc.or_(pc.less(array, pa.scalar(-limit, found)), pc.greater_equal(array, pa.scalar(limit, found)))
    else:
        return None
    bad = pc.fill_null(bad, False)
    mask: Bool = bad.to_numpy(zero_copy_only=False)
    return pc.if_else(bad, pa.scalar(None, found), array).cast(target), mask


def conform(name: str, column: pa.ChunkedArray, target: pa.DataType) -> tuple[pa.Array, Bool | None]:
    """A column in the store's type, and which rows ``[N]`` hold a value that the type cannot represent (None: none).

    Raises:
        DataError: the column's type can never fit.
    """
    array = one_array(column)
    fitted: tuple[pa.Array, Bool | None] | None = None
    if array.type == target:
        fitted = array, None
    elif not pa.types.is_list(target):
        fitted = _flat(array, target)
    elif pa.types.is_null(array.type):
        fitted = pa.nulls(len(array), target), None
    elif _is_list(array.type):
        values, offsets = list_parts(array)
        inner = _flat(values, target.value_type)
        if inner is not None:
            missing = array.is_null() if array.null_count else None
            lists = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), inner[0], mask=missing)
            fitted = lists, None if inner[1] is None else any_in_list(inner[1], offsets)
    if fitted is None:
        hint = ""
        if pa.types.is_int64(target) and _is_text(array.type):
            hint = " (for ids that are text write `id_type: string` in the schema)"
        elif pa.types.is_string(target) and pa.types.is_integer(array.type):
            hint = " (for ids that are whole numbers write `id_type: int64` in the schema)"
        raise DataError(
            f"column {name!r} is {array.type}, the schema wants {target}; fix the source or the schema{hint}"
        )
    return fitted
