"""A request's columns in the schema's types, every value checked: what the models see is as clean as a prepared row.

`rayfm.data.validate` sets such rows aside; a request is refused whole, with its column and row named.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rayfm.config import DataError, nearest
from rayfm.data.columns import list_parts, one_array
from rayfm.data.conform import conform
from rayfm.data.encode import Encoder
from rayfm.data.sources.base import KIND_COLUMN, TRUTH_PREFIX
from rayfm.schema import EXAMPLE_ID, LOGGED_PREFIX, RESERVED_COLUMNS, TRAFFIC, WEIGHTS_SUFFIX, Feature, Schema


def conform_columns(encoder: Encoder, table: pa.Table) -> dict[str, pa.Array]:
    """The columns of a request that the encoder reads, in the schema's types; what only other models read is left out.

    Raises:
        DataError: a column that the schema does not have; one of a type that cannot fit, or with a value that no row of
            the example store may have: beyond the type, negative ids where the feature forbids them, a number that is
            not finite, a null within a list, weights that do not match their ids.
    """
    schema, wanted, types = encoder.schema, set(encoder.columns), encoder.types
    widths = dict(encoder.representations)
    known = {*types, *widths, KIND_COLUMN, *RESERVED_COLUMNS}
    arrays: dict[str, pa.Array] = {}
    for name in table.column_names:
        if name not in known and not name.startswith((LOGGED_PREFIX, TRUTH_PREFIX)):
            raise DataError(f"unknown column {name[:80]!r}{nearest(name[:80], [*types, *widths])}")
        if name in widths:
            arrays[name] = _vectors(name, table[name], widths[name])
        if name not in wanted:
            continue
        arrays[name], unfit = conform(name, table[name], types[name])
        if unfit is not None and unfit.any():
            raise DataError(f"row {int(unfit.argmax())}: column {name!r} holds a value that no {types[name]} can")
    for feature in schema.features:
        if feature.name in arrays:
            _check_feature(feature, arrays)
    ids = arrays.get(EXAMPLE_ID)
    if ids is not None and ids.null_count:
        raise DataError(f"column {EXAMPLE_ID!r} holds a null; number the rows, or leave it out")
    traffic = arrays.get(TRAFFIC)
    if traffic is not None:
        unknown = pc.invert(pc.is_in(traffic, value_set=encoder.traffics))
        row = _first(unknown)
        if row is not None:
            value = str(traffic[row].as_py())[:80]
            raise DataError(
                f"row {row}: traffic {value!r} is not among the schema's{nearest(value, list(schema.traffics))}"
            )
    return arrays


def fill_columns(schema: Schema, arrays: dict[str, pa.Array], rows: int) -> None:
    """Number the rows where they have no ``example_id``, and name the traffic where the schema has a single one."""
    arrays.setdefault(EXAMPLE_ID, pa.array(np.arange(rows)))
    if TRAFFIC not in arrays and len(schema.traffics) == 1:
        arrays[TRAFFIC] = pa.repeat(pa.scalar(schema.traffics[0], pa.string()), rows)


def check_complete(wanted: list[str], present: set[str]) -> None:
    """Raises DataError naming the first column of ``wanted`` that a request lacks."""
    for name in wanted:
        if name not in present:
            raise DataError(f"the request lacks column {name!r}; send it (null where a value is unknown)")


def conform_rows(encoder: Encoder, table: pa.Table) -> pa.Table:
    """The rows of a request to a teacher, ready to be scored.

    Raises:
        DataError: as `conform_columns`; or a column is missing.
    """
    arrays = conform_columns(encoder, table)
    fill_columns(encoder.schema, arrays, table.num_rows)
    check_complete(encoder.columns, set(arrays))
    return pa.table(arrays)


def _vectors(name: str, column: pa.ChunkedArray, width: int) -> pa.Array:
    """A column of vectors that a model reads beside its features, as the encoder wants it."""
    try:
        return one_array(column).cast(pa.list_(pa.float32(), width))
    except (pa.ArrowException, ValueError):
        raise DataError(f"column {name!r} is {column.type}; give lists of {width} numbers, or null") from None


def _first(mask: pa.Array) -> int | None:
    """Row of the first true value; a null counts as false."""
    return int(pc.index(mask, True).as_py()) if mask.true_count else None


def _refuse(name: str, mask: pa.Array, what: str, offsets: npt.NDArray[np.int64] | None = None) -> None:
    place = _first(mask)
    if place is None:
        return
    row = place if offsets is None else int(np.searchsorted(offsets, place, "right")) - 1
    raise DataError(f"row {row}: column {name!r} holds {what}")


def _refuse_not_finite(name: str, values: pa.Array, what: str, offsets: npt.NDArray[np.int64] | None = None) -> None:
    # numpy's calls take a fifth of Arrow's for the few rows of a request, and most have nothing to refuse.
    if not values.null_count and np.isfinite(values.to_numpy()).all():
        return
    finite = pc.is_finite(values)
    if finite.false_count:
        _refuse(name, pc.invert(finite), what, offsets)


def _check_feature(feature: Feature, arrays: dict[str, pa.Array]) -> None:
    name, array = feature.name, arrays[feature.name]
    if feature.kind == "dense":
        _refuse_not_finite(name, array, "a number that is not finite (null says that it is unknown)")
        return
    values: pa.Array = array
    offsets: npt.NDArray[np.int64] | None = None
    if feature.is_list:
        values, offsets = list_parts(array)
        if values.null_count:
            _refuse(name, values.is_null(), "a null within a list", offsets)
    if (
        feature.id_type == "int64"
        and feature.negative_ids == "reject"
        and (values.null_count or values.to_numpy().min(initial=0) < 0)
    ):
        _refuse(name, pc.less(values, 0), "a negative id", offsets)
    weights = arrays.get(name + WEIGHTS_SUFFIX)
    if weights is not None and offsets is not None:
        flat, weight_offsets = list_parts(weights)
        if not np.array_equal(weight_offsets, offsets):
            raise DataError(f"column {name + WEIGHTS_SUFFIX!r}: its lists are not as long as those of {name!r}")
        _refuse(name + WEIGHTS_SUFFIX, flat.is_null(), "a null within a list", weight_offsets)
        _refuse_not_finite(name + WEIGHTS_SUFFIX, flat, "a weight that is not finite", weight_offsets)
