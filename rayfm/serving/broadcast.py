"""One user and many candidates as one chunk: what all candidates share is converted and hashed once.

The models read plain batches, so the shared ids are repeated at the very end, as table rows and in one pass; nothing
that is text or a Python object is ever repeated.

Shape letters: N candidates, D dense features, F single-id features, L ids in the user's list.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from rayfm.config import DataError
from rayfm.data.encode import EncodedChunk, Encoder, JaggedColumn
from rayfm.schema import EXAMPLE_ID, TRAFFIC, WEIGHTS_SUFFIX
from rayfm.serving.http.problems import Problem
from rayfm.serving.requests import check_complete, conform_columns, fill_columns


def encode_candidates(
    encoder: Encoder, user: pa.Table, candidates: pa.Table, max_list_values: int = 4_000_000
) -> EncodedChunk:
    """The chunk of N examples that the user makes with each candidate.

    Args:
        encoder: the model's, without labels.
        user: one row of features that all candidates share; it may have no columns.
        candidates: a row each, of the other features.
        max_list_values: how many ids a list of the user's may have, times the candidates.

    Raises:
        DataError: a column is missing, unknown, or holds what no example may hold.
        Problem: the user's list is too long for so many candidates (413).
    """
    schema, rows = encoder.schema, candidates.num_rows
    shared = conform_columns(encoder, user)
    own = conform_columns(encoder, candidates)
    if EXAMPLE_ID in shared:
        raise DataError(f"column {EXAMPLE_ID!r} is the candidates'; send it with them, or leave it out")
    if TRAFFIC in shared:
        own[TRAFFIC] = _for_each(shared[TRAFFIC], rows)
    elif TRAFFIC not in own and len(schema.traffics) == 1:
        own[TRAFFIC] = _for_each(encoder.traffics, rows)
    for name, _ in encoder.representations:
        if name in shared:
            own[name] = shared[name].take(pa.array(np.zeros(rows, np.int64)))
    fill_columns(schema, own, rows)
    check_complete(encoder.columns, {*shared, *own})
    for feature in encoder.weighted:
        if (feature.name in shared) != (feature.name + WEIGHTS_SUFFIX in shared):
            raise DataError(f"column {feature.name + WEIGHTS_SUFFIX!r} has to come with {feature.name!r}")
    named = tuple(feature.name for feature in schema.features)
    features = tuple(name for name in named if name in own)
    mine = _encode(encoder.part(features), own, rows)
    if not any(name in shared for name in named):
        return mine
    theirs_encoder = encoder.part(tuple(name for name in named if name in shared))
    # A traffic for the user's row, whose own is not read: the candidates' rows say it.
    theirs = _encode(theirs_encoder, {**shared, EXAMPLE_ID: pa.array([0]), TRAFFIC: encoder.traffics.slice(0, 1)}, 1)
    return _joined(encoder, theirs, mine, shared, rows, max_list_values)


def _for_each(one: pa.Array, rows: int) -> pa.Array:
    """A text of all candidates, which is looked up once."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), one)


def _encode(encoder: Encoder, arrays: Mapping[str, pa.Array], rows: int) -> EncodedChunk:
    vectors = [name for name, _ in encoder.representations if name in arrays]
    names = [*encoder.columns, *vectors]
    table = pa.record_batch([arrays[name] for name in names], names)
    none = np.zeros((rows, 0), np.float32)
    return encoder.encode(table, np.zeros(rows, np.int64), none, none.astype(np.bool_))


def _joined(
    encoder: Encoder,
    theirs: EncodedChunk,
    mine: EncodedChunk,
    shared: Mapping[str, pa.Array],
    rows: int,
    max_list_values: int,
) -> EncodedChunk:
    """``mine`` with the user's features (``theirs``, one row) in their places."""
    dense_ND = np.empty((rows, len(encoder.dense)), np.float32)
    single_FN = np.empty((len(encoder.single), rows), np.int64)
    valid_FN = np.ones((len(encoder.single), rows), np.bool_)
    at_user, at_own = 0, 0
    for position, feature in enumerate(encoder.dense):
        if feature.name in shared:
            dense_ND[:, position] = theirs.dense[0, at_user]
            at_user += 1
        else:
            dense_ND[:, position] = mine.dense[:, at_own]
            at_own += 1
    at_user, at_own = 0, 0
    for position, feature in enumerate(encoder.single):
        if feature.name in shared:
            single_FN[position] = theirs.single[at_user, 0]
            if theirs.single_valid is not None:
                valid_FN[position] = theirs.single_valid[at_user, 0]
            at_user += 1
        else:
            single_FN[position] = mine.single[at_own]
            if mine.single_valid is not None:
                valid_FN[position] = mine.single_valid[at_own]
            at_own += 1
    lists = [*encoder.multi, *encoder.weighted, *encoder.sequence]
    jagged: dict[str, JaggedColumn] = {}
    for feature in lists:
        if feature.name not in shared:
            jagged[feature.name] = mine.jagged[feature.name]
            continue
        column = theirs.jagged[feature.name]
        length = len(column.values)
        if length * rows > max_list_values:
            raise Problem(
                413,
                f"the user's {feature.name!r} has {length} ids, for {rows} candidates: more than {max_list_values} in "
                "all; send fewer candidates, or a shorter list",
            )
        weights = None if column.weights is None else np.tile(column.weights, rows)
        jagged[feature.name] = JaggedColumn(np.tile(column.values, rows), np.arange(rows + 1) * length, weights)
    mine.dense, mine.single, mine.jagged = dense_ND, single_FN, jagged
    mine.single_valid = None if valid_FN.all() else valid_FN
    return mine
