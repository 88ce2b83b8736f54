"""Bad rows leave here with a reason; they neither kill the job nor vanish."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rayfm.data.columns import list_parts
from rayfm.data.conform import any_in_list, conform, store_schema
from rayfm.data.sources.base import KIND_COLUMN, TRUTH_PREFIX, Period
from rayfm.schema import EXAMPLE_ID, KINDS, TIME, TRAFFIC, WEIGHTS_SUFFIX, Feature, Schema, mix64, string_ids

REASON = "reason"
DUPLICATE = "example_id twice in its period"
Bool = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]


class _Verdicts:
    """The first reason against each row."""

    def __init__(self, rows: int) -> None:
        self.codes = np.zeros(rows, np.int16)
        self.reasons = [""]

    def against(self, mask: Bool | pa.Array | None, reason: str) -> None:
        if mask is None:
            return
        if not isinstance(mask, np.ndarray):
            mask = pc.fill_null(mask, False).to_numpy(zero_copy_only=False)
        hit = mask & (self.codes == 0)
        if hit.any():
            self.codes[hit] = len(self.reasons)
            self.reasons.append(reason)


def period_index(times: Int64, periods: Sequence[Period]) -> Int64:
    """Position of the period of each time in ``periods`` (rising, disjoint), -1 where there is none: ``[N] -> [N]``."""
    starts = np.array([period.start_us for period in periods], np.int64)
    ends = np.array([period.end_us for period in periods], np.int64)
    index = np.searchsorted(starts, times, "right") - 1
    inside = (index >= 0) & (times < ends[np.maximum(index, 0)])
    return np.where(inside, index, -1)


def split_rejects(table: pa.Table, schema: Schema, periods: Sequence[Period]) -> tuple[pa.Table, pa.Table]:
    """Good rows in the store's columns and types, and rejects as they came, with a ``reason`` column.

    Ids that stand twice in a period can only be told over the whole period: see `split_duplicates`.

    Args:
        table: rows as a source gives them.
        schema: what an example is.
        periods: every period that a row may belong to, in time order.

    Raises:
        DataError: a column is missing or of a type that never fits: then no row can be good.
    """
    target = store_schema(schema, table.column_names)
    verdicts = _Verdicts(table.num_rows)
    arrays: dict[str, pa.Array] = {}
    for field in target:
        arrays[field.name], misfits = conform(field.name, table[field.name], field.type)
        is_id = pa.types.is_int64(getattr(field.type, "value_type", field.type)) and field.name != TIME
        verdicts.against(misfits, f"id beyond int64 in {field.name!r}" if is_id else f"{field.name!r} out of range")
    _check_place(arrays, verdicts, periods)
    kind = arrays[KIND_COLUMN]
    verdicts.against(pc.invert(pc.is_in(kind, value_set=pa.array(KINDS))), "unknown kind")
    known = pc.is_in(arrays[TRAFFIC], value_set=pa.array(schema.traffics, pa.string()))
    verdicts.against(pc.invert(known), "unknown traffic")
    for feature in schema.features:
        _check_feature(feature, arrays, verdicts)
    considered = pc.equal(kind, "consideration")
    for task in schema.tasks:
        label = arrays[task.name]
        verdicts.against(pc.and_(considered, label.is_valid()), "consideration with a label")
        verdicts.against(_not_finite(label), f"label {task.name!r} is not finite")
        if task.kind == "binary":
            wrong = pc.and_(pc.not_equal(label, 0.0), pc.not_equal(label, 1.0))
            verdicts.against(wrong, f"label {task.name!r} is not 0 or 1")
    own = set(schema.arrow_schema().names)
    for field in target:
        if pa.types.is_float32(field.type) and field.name not in own and not field.name.startswith(TRUTH_PREFIX):
            verdicts.against(_not_finite(arrays[field.name]), f"{field.name!r} is not finite")
    examples = pa.Table.from_arrays([arrays[name] for name in target.names], schema=target)
    if len(verdicts.reasons) == 1:
        return examples, table.slice(0, 0).append_column(REASON, pa.array([], pa.string()))
    bad = verdicts.codes > 0
    reasons = pa.array(np.array(verdicts.reasons, object)[verdicts.codes[bad]], pa.string())
    return examples.filter(pa.array(~bad)), table.filter(pa.array(bad)).append_column(REASON, reasons)


def _check_place(arrays: dict[str, pa.Array], verdicts: _Verdicts, periods: Sequence[Period]) -> None:
    time = arrays[TIME]
    verdicts.against(time.is_null(), "null time")
    verdicts.against(pc.less(time, 0), "negative time")
    times = pc.fill_null(time, 0).to_numpy(zero_copy_only=False)
    verdicts.against(period_index(times, periods) < 0, "time outside every period")
    verdicts.against(arrays[EXAMPLE_ID].is_null(), "null example_id")


def _not_finite(array: pa.Array) -> pa.Array:
    return pc.invert(pc.is_finite(array))


def _check_feature(feature: Feature, arrays: dict[str, pa.Array], verdicts: _Verdicts) -> None:
    name, array = feature.name, arrays[feature.name]
    if feature.kind == "dense":
        verdicts.against(_not_finite(array), f"dense {name!r} is not finite")
        return
    negative = feature.id_type == "int64" and feature.negative_ids == "reject"
    if not feature.is_list:
        if negative:
            verdicts.against(pc.less(array, 0), f"negative id in {name!r}")
        return
    values, offsets = list_parts(array)
    if values.null_count:
        verdicts.against(any_in_list(values.is_null().to_numpy(zero_copy_only=False), offsets), f"null id in {name!r}")
    if negative and len(values):
        below = pc.fill_null(pc.less(values, 0), False).to_numpy(zero_copy_only=False)
        verdicts.against(any_in_list(below, offsets), f"negative id in {name!r}")
    if feature.kind == "weighted":
        weights, weight_offsets = list_parts(arrays[name + WEIGHTS_SUFFIX])
        verdicts.against(np.diff(weight_offsets) != np.diff(offsets), f"weights of {name!r} not as long as its ids")
        bad = pc.fill_null(_not_finite(weights), True).to_numpy(zero_copy_only=False)
        verdicts.against(any_in_list(bad, weight_offsets), f"a weight of {name!r} is not finite")


def split_duplicates(table: pa.Table, duplicated: Int64, seen: Bool) -> tuple[pa.Table, pa.Table]:
    """Keep the first row of each id that stands twice, reject the others.

    Args:
        table: rows sorted by time, all those of a time together; windows of a period come in order.
        duplicated: the ids that stand more than once in the period, rising ``[M]``.
        seen: which of them an earlier window had ``[M]``; updated in place.
    """
    nothing = table.slice(0, 0).append_column(REASON, pa.array([], pa.string()))
    if not len(duplicated):
        return table, nothing
    ids = table[EXAMPLE_ID].to_numpy()
    place = np.minimum(np.searchsorted(duplicated, ids), len(duplicated) - 1)
    rows = np.flatnonzero(duplicated[place] == ids)
    if not len(rows):
        return table, nothing
    place = place[rows]
    candidates = table.take(pa.array(rows))
    # The earliest row wins; of rows of one time, the one whose content hashes lowest, so that the order in which
    # parallel tasks delivered them does not matter.
    order = np.lexsort((row_hash(candidates), candidates[TIME].to_numpy(), place))
    first = np.ones(len(order), np.bool_)
    first[1:] = np.diff(place[order]) != 0
    keep = np.zeros(len(rows), np.bool_)
    keep[order] = first & ~seen[place[order]]
    seen[place] = True
    bad = np.zeros(table.num_rows, np.bool_)
    bad[rows[~keep]] = True
    rejects = table.filter(pa.array(bad))
    return table.filter(pa.array(~bad)), rejects.append_column(REASON, pa.array([DUPLICATE] * rejects.num_rows))


def row_hash(table: pa.Table) -> npt.NDArray[np.uint64]:
    """A hash of each row's content, the same on every machine: ``[N]``."""
    total = np.zeros(table.num_rows, np.uint64)
    for salt, name in enumerate(table.column_names):
        array = table[name].combine_chunks()
        if pa.types.is_list(array.type):
            values, offsets = list_parts(array)
            hashed = _value_hash(values, salt)
            position = np.arange(len(hashed), dtype=np.int64) - np.repeat(offsets[:-1], np.diff(offsets))
            sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mix64(position, 1) * hashed, dtype=np.uint64)])
            hashes = mix64(sums[offsets[1:]] - sums[offsets[:-1]], salt)
        else:
            hashes = _value_hash(array, salt)
        total += hashes
    return total


def _value_hash(array: pa.Array, salt: int) -> npt.NDArray[np.uint64]:
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    if pa.types.is_string(array.type):
        ids = string_ids(pc.fill_null(array, "")) if len(array) else np.zeros(0, np.int64)
    elif pa.types.is_floating(array.type):
        ids = pc.fill_null(array, pa.scalar(0.0, array.type)).to_numpy(zero_copy_only=False).astype(np.float64)
        ids = ids.view(np.int64)
    else:
        ids = pc.fill_null(array, 0).to_numpy(zero_copy_only=False).astype(np.int64)
    return np.where(valid, mix64(ids, salt), np.uint64(salt))
