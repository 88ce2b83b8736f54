"""From Arrow columns to tensors, a chunk of many steps at a time.

Hashing and conversion cost a call a column, whatever the number of rows; so a chunk of several steps is encoded once
and each step is a slice of it.

Shape letters: N rows of the chunk, B rows of a step, D dense features, F single-id features, T tasks, S supervision,
V stored representations, R their width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from rayfm.config import DataError
from rayfm.data.batch import Batch
from rayfm.data.columns import (
    IntArray,
    ScalarT,
    list_parts,
    one_array,
    optional,
    ordered,
    put,
    taken,
    truncate,
    valid_rows,
    whole_numbers,
)
from rayfm.data.steps import StepRows
from rayfm.data.vocabulary import Vocabulary, vocabulary_of
from rayfm.schema import EXAMPLE_ID, TRAFFIC, WEIGHTS_SUFFIX, Feature, Schema, string_ids, table_rows, table_rows_each

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

MAX_PARTS = 16
"""Encoders of parts of the features that an encoder keeps."""
ROWS_TOGETHER = 4096
"""Up to so many rows, as of a request, all features are hashed in one call; a chunk of steps is hashed a feature at a
time, which stays in the processor's cache."""


@dataclasses.dataclass
class JaggedColumn:
    """A list feature's ids, back to back: the list of row i is ``values[offsets[i] : offsets[i + 1]]``."""

    values: IntArray
    offsets: IntArray
    weights: FloatArray | None = None

    def slice(self, start: int, stop: int) -> tuple[IntArray, IntArray]:
        """Values and lengths of rows ``[start, stop)``."""
        return self.values[self.offsets[start] : self.offsets[stop]], np.diff(self.offsets[start : stop + 1])


@dataclasses.dataclass
class EncodedChunk:
    """Examples as arrays, ready to be cut into batches."""

    dense: FloatArray
    """``[N, D]``"""
    single: IntArray
    """``[F, N]``: table rows of the single-id features."""
    single_valid: BoolArray | None
    """``[F, N]``, or None where no id is missing."""
    jagged: dict[str, JaggedColumn]
    labels: FloatArray
    label_mask: BoolArray
    supervision: FloatArray
    supervision_mask: BoolArray
    example_id: IntArray
    kind: IntArray
    traffic: IntArray
    weight: FloatArray
    group: IntArray
    user: IntArray
    representation: FloatArray | None = None
    """``[N, sum of R]``"""
    representation_mask: BoolArray | None = None
    """``[N, V]``"""

    def __len__(self) -> int:
        return len(self.example_id)


class Encoder:
    """Encodes Arrow tables of examples for one set of features.

    Args:
        schema: the pipeline's schema.
        features: names of the features to encode; all of the schema's by default.
        supervision: names of the supervision columns, in the order of ``Batch.supervision``.
        labels: whether the tables have the tasks' columns; what is served has none.
        representations: name and width of the stored representations, in the order of ``Batch.representation``.
        vocabularies: table -> which ids have rows of their own, for the tables whose ``id_policy`` gives them.
    """

    def __init__(
        self,
        schema: Schema,
        features: tuple[str, ...] | None = None,
        supervision: tuple[str, ...] = (),
        labels: bool = True,
        representations: tuple[tuple[str, int], ...] = (),
        vocabularies: Mapping[str, Vocabulary] | None = None,
    ) -> None:
        wanted = [f for f in schema.features if features is None or f.name in features]
        self.schema, self.features = schema, features
        self.dense = [f for f in wanted if f.kind == "dense"]
        self.single = [f for f in wanted if f.kind == "sparse"]
        self.multi = [f for f in wanted if f.kind == "multi"]
        self.weighted = [f for f in wanted if f.kind == "weighted"]
        self.sequence = [f for f in wanted if f.kind == "sequence"]
        self.supervision = supervision
        self.representations = representations
        self.vocabularies = vocabularies or {}
        self.tasks = tuple(task.name for task in schema.tasks) if labels else ()
        self._parts: dict[tuple[str, ...], Encoder] = {}

    @functools.cached_property
    def types(self) -> dict[str, pa.DataType]:
        """Types of the schema's columns."""
        return {field.name: field.type for field in self.schema.arrow_schema()}

    @functools.cached_property
    def traffics(self) -> pa.Array:
        """The schema's traffics, in its order."""
        return pa.array(self.schema.traffics, pa.string())

    def part(self, features: tuple[str, ...]) -> Encoder:
        """An encoder of some of the features, with the same representations and without labels; kept for the next
        request that is cut in the same way."""
        found = self._parts.get(features)
        if found is None:
            found = Encoder(
                self.schema,
                features,
                labels=False,
                representations=self.representations,
                vocabularies=self.vocabularies,
            )
            if len(self._parts) < MAX_PARTS:  # who asks chooses what stands on which side
                self._parts[features] = found
        return found

    @functools.cached_property
    def columns(self) -> list[str]:
        """Names of the schema's columns that encoding reads."""
        names = [f.name for f in (*self.dense, *self.single, *self.multi, *self.weighted, *self.sequence)]
        names += [f.name + WEIGHTS_SUFFIX for f in self.weighted]
        return list(dict.fromkeys([EXAMPLE_ID, TRAFFIC, *names, *self.tasks]))

    def encode(
        self,
        table: pa.Table | pa.RecordBatch,
        kind: IntArray,
        supervision: FloatArray,
        supervision_mask: BoolArray,
        representation: FloatArray | None = None,
        representation_mask: BoolArray | None = None,
        order: IntArray | None = None,
    ) -> EncodedChunk:
        """Encode ``table`` (N rows) with its kinds ``[N]``, supervision ``[N, S]`` and representations ``[N, sum R]``.

        ``order`` ``[N]``: row i of the chunk is row ``order[i]`` of the table (its own order by default); what is
        given beside the table has the chunk's order. Each column is put in order where it is written anyway, which
        costs less than a table in order.

        Representations that are not given are taken from the table's columns of their names (fixed-size lists, null
        where there is none), as a request has them; a column that is not there is known nowhere.

        Raises:
            DataError: a column is missing, a representation is of another type, or a prediction of a binary task is
                no probability.
        """
        present = set(table.schema.names)
        missing = [name for name in self.columns if name not in present]
        if missing:
            raise DataError(f"the examples lack column {missing[0]!r}; prepare them with the schema that has it")
        self._check_supervision(supervision, supervision_mask)
        rows = table.num_rows
        if representation is None and self.representations:
            representation, representation_mask = self._represented(table)
        # An own copy: torch wants writable memory, and Arrow's is not.
        example_id = ordered(one_array(table[EXAMPLE_ID]).to_numpy(zero_copy_only=False).astype(np.int64), order)
        single, valid = self._single(table, order)
        jagged = {f.name: self._jagged(f, table, order) for f in (*self.multi, *self.weighted, *self.sequence)}
        labels, label_mask = self._labels(table, order)
        return EncodedChunk(
            dense=self._dense(table, order),
            single=single,
            single_valid=valid,
            jagged=jagged,
            labels=labels,
            label_mask=label_mask,
            supervision=supervision,
            supervision_mask=supervision_mask,
            example_id=example_id,
            kind=kind,
            traffic=ordered(self._traffic(table), order),
            weight=optional(table, "sampling_weight", np.ones(rows, np.float32), order),
            group=optional(table, "request_id", np.full(rows, -1, np.int64), order),
            user=optional(table, "user_id", example_id, order),
            representation=representation,
            representation_mask=representation_mask,
        )

    def encode_steps(self, rows: StepRows) -> EncodedChunk:
        """`encode` of what was read of some steps."""
        return self.encode(
            rows.table,
            rows.kind,
            rows.supervision,
            rows.supervision_mask,
            rows.representation,
            rows.representation_mask,
            rows.order,
        )

    def batch(self, chunk: EncodedChunk, start: int, stop: int) -> Batch:
        """Rows ``[start, stop)`` of a chunk as a batch. Dense tensors are views of the chunk."""
        return Batch(
            dense=torch.from_numpy(chunk.dense[start:stop]),
            sparse=self._sparse(chunk, start, stop),
            weighted=self._keyed(chunk, self.weighted, start, stop),
            sequence=self._keyed(chunk, self.sequence, start, stop),
            labels=torch.from_numpy(chunk.labels[start:stop]),
            label_mask=torch.from_numpy(chunk.label_mask[start:stop]),
            supervision=torch.from_numpy(chunk.supervision[start:stop]),
            supervision_mask=torch.from_numpy(chunk.supervision_mask[start:stop]),
            example_id=torch.from_numpy(chunk.example_id[start:stop]),
            kind=torch.from_numpy(chunk.kind[start:stop]),
            traffic=torch.from_numpy(chunk.traffic[start:stop]),
            weight=torch.from_numpy(chunk.weight[start:stop]),
            group=torch.from_numpy(chunk.group[start:stop]),
            user=torch.from_numpy(chunk.user[start:stop]),
            tasks=self.tasks,
            supervision_names=self.supervision,
            representation=_tensor(chunk.representation, start, stop),
            representation_mask=_tensor(chunk.representation_mask, start, stop),
            representation_widths=self.representations,
        )

    def _single(self, table: pa.Table | pa.RecordBatch, order: IntArray | None) -> tuple[IntArray, BoolArray | None]:
        """Table rows of the single-id features ``[F, N]``, and where there is an id (None: everywhere)."""
        single = np.empty((len(self.single), table.num_rows), np.int64)
        valid: BoolArray | None = None
        together, tables, salts = self._together if table.num_rows <= ROWS_TOGETHER else ([], [], [])
        for position, feature in enumerate(self.single):
            column = one_array(table[feature.name])
            if column.null_count:
                valid = np.ones(single.shape, np.bool_) if valid is None else valid
                valid[position] = ordered(valid_rows(column), order)
            find = whole_numbers if position in together else functools.partial(self.table_rows_of, feature)
            put(find(column), order, single[position])
        if together:
            ids = single[together]
            table_rows_each(ids, tables, salts, out=ids)
            single[together] = ids
        return single, valid

    @functools.cached_property
    def _together(self) -> tuple[list[int], list[int], list[int]]:
        """Positions of the single-id features whose rows are a hash of whole numbers; their tables' rows and salts."""
        tables = [self.schema.tables[feature.table_name] for feature in self.single]
        positions = [
            position
            for position, (feature, table) in enumerate(zip(self.single, tables, strict=True))
            if feature.id_type == "int64" and table.id_policy == "hash" and table.ids == "hash"
        ]
        salts = [self.schema.salt(self.single[position].table_name) for position in positions]
        return positions, [tables[position].rows for position in positions], salts

    def _represented(self, table: pa.Table | pa.RecordBatch) -> tuple[FloatArray, BoolArray]:
        """The columns named as the representations: ``[N, sum R]`` and mask ``[N, V]``."""
        rows = table.num_rows
        values = np.zeros((rows, sum(width for _, width in self.representations)), np.float32)
        mask = np.zeros((rows, len(self.representations)), np.bool_)
        start = 0
        for position, (name, width) in enumerate(self.representations):
            if table.schema.get_field_index(name) >= 0:
                column = one_array(table[name])
                if not pa.types.is_fixed_size_list(column.type) or column.type.list_size != width:
                    raise DataError(f"column {name!r} is {column.type}; give fixed-size lists of {width} floats")
                known = valid_rows(column)
                flat = column.flatten().cast(pa.float32())  # leaves out what stands behind a null
                if flat.null_count or not pc.all(pc.is_finite(flat), min_count=0).as_py():
                    raise DataError(f"column {name!r} has a list with a null, NaN or infinite value; leave it null")
                values[known, start : start + width] = flat.to_numpy(zero_copy_only=False).reshape(-1, width)
                mask[:, position] = known
            start += width
        return values, mask

    def _sparse(self, chunk: EncodedChunk, start: int, stop: int) -> KeyedJaggedTensor | None:
        if not self.single and not self.multi:
            return None
        rows = chunk.single[:, start:stop]
        if chunk.single_valid is None:
            values, lengths = [rows.reshape(-1)], [np.ones(rows.size, np.int32)]
        else:
            valid = chunk.single_valid[:, start:stop]
            values, lengths = [rows[valid]], [valid.astype(np.int32).reshape(-1)]
        for feature in self.multi:
            ids, counts = chunk.jagged[feature.name].slice(start, stop)
            values.append(ids)
            lengths.append(counts.astype(np.int32))
        return KeyedJaggedTensor(
            keys=[f.name for f in (*self.single, *self.multi)],
            values=torch.from_numpy(_joined(values)),
            lengths=torch.from_numpy(_joined(lengths)),
        )

    def _keyed(self, chunk: EncodedChunk, features: list[Feature], start: int, stop: int) -> KeyedJaggedTensor | None:
        if not features:
            return None
        columns = [chunk.jagged[feature.name] for feature in features]
        slices = [column.slice(start, stop) for column in columns]
        weights = [
            column.weights[column.offsets[start] : column.offsets[stop]]
            for column in columns
            if column.weights is not None
        ]
        return KeyedJaggedTensor(
            keys=[feature.name for feature in features],
            values=torch.from_numpy(np.concatenate([ids for ids, _ in slices])),
            lengths=torch.from_numpy(np.concatenate([counts for _, counts in slices]).astype(np.int32)),
            weights=torch.from_numpy(np.concatenate(weights)) if weights else None,
        )

    def _check_supervision(self, supervision: FloatArray, mask: BoolArray) -> None:
        kinds = {task.name: task.kind for task in self.schema.tasks}
        for position, name in enumerate(self.supervision):
            task = name.rpartition("/")[2]
            if kinds.get(task) != "binary":
                continue
            values = supervision[:, position][mask[:, position]]
            wrong = ~((values >= 0) & (values <= 1))  # not a number is neither
            if wrong.any():
                raise DataError(
                    f"supervision column {name!r}: {values[wrong][0]:g} is no probability, and task {task!r} is "
                    "binary; it must be in [0, 1], and null where there is no prediction"
                )

    def _dense(self, table: pa.Table | pa.RecordBatch, order: IntArray | None) -> FloatArray:
        dense = np.empty((table.num_rows, len(self.dense)), np.float32)
        for position, feature in enumerate(self.dense):
            column = one_array(table[feature.name])
            if column.null_count:
                column = pc.fill_null(column, pa.scalar(feature.missing, column.type))
            values = column.to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
            if feature.transform == "log1p":
                values = np.log1p(np.maximum(values, 0))
            elif feature.transform == "signed_log1p":
                values = np.sign(values) * np.log1p(np.abs(values))
            if feature.mean != 0 or feature.std != 1:
                values = (values - np.float32(feature.mean)) / np.float32(feature.std)
            dense[:, position] = ordered(values, order)
        return dense

    def table_rows_of(self, feature: Feature, ids: pa.Array) -> IntArray:
        """The row of the feature's table that each id is looked up at, as encoding does: ``[N]`` int64.

        Raises:
            DataError: the table has a vocabulary, which the encoder was not given.
        """
        table = self.schema.tables[feature.table_name]
        if not pa.types.is_integer(ids.type):
            if not pa.types.is_dictionary(ids.type):
                ids = ids.dictionary_encode()
            words = ids.dictionary
            rows_of_words = self._rows(feature, string_ids(words)) if len(words) else np.zeros(1, np.int64)
            indices = pc.fill_null(ids.indices, 0) if ids.null_count else ids.indices
            rows: IntArray = rows_of_words[indices.to_numpy(zero_copy_only=False)]
            return rows
        values = whole_numbers(ids)
        if table.ids == "modulo":
            wrapped: IntArray = np.mod(values, table.rows)
            return wrapped
        return self._rows(feature, values)

    def _rows(self, feature: Feature, ids: IntArray) -> IntArray:
        """Rows of 64-bit ids: ``[N]``."""
        name = feature.table_name
        table = self.schema.tables[name]
        if table.id_policy != "hash":
            return vocabulary_of(self.vocabularies, name).rows(ids)
        return table_rows(ids, table.rows, self.schema.salt(name))

    def _jagged(self, feature: Feature, table: pa.Table | pa.RecordBatch, order: IntArray | None) -> JaggedColumn:
        values, offsets = _ids_of_lists(taken(table[feature.name], order))
        weights = None
        if feature.kind == "weighted":
            flat, weight_offsets = _ids_of_lists(taken(table[feature.name + WEIGHTS_SUFFIX], order))
            if not np.array_equal(weight_offsets, offsets):
                raise DataError(f"column {feature.name + WEIGHTS_SUFFIX!r}: its lists are not as long as the ids'")
            weights = flat.to_numpy(zero_copy_only=False).astype(np.float32)
        rows = self.table_rows_of(feature, values)
        if feature.max_len is not None:
            keep, offsets = truncate(offsets, feature.max_len, newest=feature.kind == "sequence")
            rows = rows[keep]
            weights = None if weights is None else weights[keep]
        return JaggedColumn(rows, offsets, weights)

    def _labels(self, table: pa.Table | pa.RecordBatch, order: IntArray | None) -> tuple[FloatArray, BoolArray]:
        labels = np.zeros((table.num_rows, len(self.tasks)), np.float32)
        mask = np.zeros((table.num_rows, len(self.tasks)), np.bool_)
        for position, name in enumerate(self.tasks):
            task = self.schema.task(name)
            column = one_array(table[task.name])
            mask[:, position] = ordered(valid_rows(column), order)
            values = pc.fill_null(column, pa.scalar(0.0, column.type)).to_numpy(zero_copy_only=False)
            values = ordered(values, order)
            labels[:, position] = np.log1p(np.maximum(values, 0)) if task.transform == "log1p" else values
        return labels, mask

    def _traffic(self, table: pa.Table | pa.RecordBatch) -> IntArray:
        column = one_array(table[TRAFFIC])
        words = column.dictionary if pa.types.is_dictionary(column.type) else column
        positions = pc.index_in(words, value_set=self.traffics)
        if words is not column:
            positions = positions.take(column.indices)
        if positions.null_count:
            unknown = column.filter(pc.is_null(positions))[0].as_py()
            raise DataError(f"traffic {unknown!r} is not among the schema's traffics; add it and prepare again")
        found: IntArray = positions.to_numpy(zero_copy_only=False).astype(np.int64)
        return found


def _tensor(values: npt.NDArray[Any] | None, start: int, stop: int) -> torch.Tensor | None:
    return None if values is None else torch.from_numpy(values[start:stop])


def _ids_of_lists(column: pa.Array) -> tuple[pa.Array, IntArray]:
    """`list_parts` of lists of ids or weights."""
    values, offsets = list_parts(column)
    if values.null_count:
        raise DataError("a list holds a null id; prepare the examples again")
    return values, offsets


def _joined(parts: list[npt.NDArray[ScalarT]]) -> npt.NDArray[ScalarT]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
