from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from example_store import every_feature_rows
from served_models import (
    CANDIDATE_COLUMNS,
    SCHEMA,
    USER_COLUMNS,
    as_examples,
    candidate_rows,
    user_row,
)

from rayfm.config import DataError
from rayfm.data.encode import EncodedChunk, Encoder
from rayfm.schema import Schema
from rayfm.serving.broadcast import encode_candidates
from rayfm.serving.http.problems import Problem
from rayfm.serving.requests import conform_rows

ENCODER = Encoder(SCHEMA, labels=False)


def plain(table: pa.Table, encoder: Encoder = ENCODER) -> EncodedChunk:
    none = np.zeros((len(table), 0), np.float32)
    return encoder.encode(table, np.zeros(len(table), np.int64), none, none.astype(bool))


def assert_same_batch(found: EncodedChunk, expected: EncodedChunk, encoder: Encoder = ENCODER) -> None:
    ours, theirs = (encoder.batch(chunk, 0, len(chunk)) for chunk in (found, expected))
    for name in ("dense", "example_id", "kind", "traffic", "weight"):
        np.testing.assert_array_equal(getattr(ours, name).numpy(), getattr(theirs, name).numpy(), name)
    for name in ("sparse", "weighted", "sequence"):
        one, other = getattr(ours, name), getattr(theirs, name)
        assert one.keys() == other.keys()
        np.testing.assert_array_equal(one.values().numpy(), other.values().numpy())
        np.testing.assert_array_equal(one.lengths().numpy(), other.lengths().numpy())
        if name == "weighted":
            np.testing.assert_array_equal(one.weights().numpy(), other.weights().numpy())


def test_a_user_sent_once_is_the_user_in_every_row():
    user, candidates = user_row(), candidate_rows(9)
    assert_same_batch(encode_candidates(ENCODER, user, candidates), plain(as_examples(user, candidates)))


def test_what_is_unknown_of_the_user_is_unknown_in_every_row():
    user, candidates = user_row(), candidate_rows(4)
    for name in ("age", "user", "history"):
        user = user.set_column(user.column_names.index(name), user.schema.field(name), pa.nulls(1, user[name].type))
    found = encode_candidates(ENCODER, user, candidates)
    assert_same_batch(found, plain(as_examples(user, candidates)))
    assert found.single_valid is not None


def test_any_feature_may_be_the_users_or_the_candidates():
    rows = every_feature_rows(7, seed=5).drop_columns(["click", "watch"])
    everything = encode_candidates(ENCODER, pa.table({}), rows)
    assert_same_batch(everything, plain(rows))
    ids = pa.table({"example_id": [5, 6, 7]})
    all_shared = user_row()
    for name in CANDIDATE_COLUMNS:
        all_shared = all_shared.append_column(name, candidate_rows(1)[name])
    expected = plain(as_examples(all_shared, ids.append_column("row", pa.nulls(3)).drop_columns(["example_id"])))
    expected.example_id = np.array([5, 6, 7])
    assert_same_batch(encode_candidates(ENCODER, all_shared, ids), expected)


def test_no_candidates_make_no_rows():
    assert len(encode_candidates(ENCODER, user_row(), candidate_rows(3).slice(0, 0))) == 0


def test_a_lone_traffic_need_not_be_sent():
    schema = Schema.model_validate(SCHEMA.dump() | {"traffics": ["feed"]})
    encoder = Encoder(schema, labels=False)
    user = user_row().drop_columns(["traffic"])
    assert encode_candidates(encoder, user, candidate_rows(3)).traffic.tolist() == [0, 0, 0]
    with pytest.raises(DataError, match="lacks column 'traffic'"):
        encode_candidates(ENCODER, user, candidate_rows(3))


def replaced(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, column)


@pytest.mark.parametrize("missing", [*USER_COLUMNS, *CANDIDATE_COLUMNS])
def test_a_missing_column_is_named(missing):
    user, candidates = user_row(), candidate_rows(3)
    if missing in USER_COLUMNS:
        user = user.drop_columns([missing])
    else:
        candidates = candidates.drop_columns([missing])
    with pytest.raises(DataError, match=f"column '{missing}'"):
        encode_candidates(ENCODER, user, candidates)


@pytest.mark.parametrize(
    ("name", "column", "said"),
    [
        ("ad", pa.array([1, 2, 3]), "column 'ad' is int64"),
        ("tags", pa.array([1, 2, 3]), "column 'tags' is int64"),
        ("tags", pa.array([[1], [-2], [3]]), "row 1: column 'tags' holds a negative id"),
        ("tags", pa.array([[1], [], [3, None]]), "row 2: column 'tags' holds a null within a list"),
        ("tags", pa.array([[], [], [2**63]], pa.list_(pa.uint64())), "row 2: column 'tags' holds a value that no"),
        ("tags", pa.array([[1.5], [], []]), "column 'tags' is list<item: double>"),
    ],
)
def test_what_a_candidate_cannot_have(name, column, said):
    with pytest.raises(DataError, match=said):
        encode_candidates(ENCODER, user_row(), replaced(candidate_rows(3), name, column))


@pytest.mark.parametrize(
    ("name", "column", "said"),
    [
        ("age", pa.array([float("nan")]), "row 0: column 'age' holds a number that is not finite"),
        ("age", pa.array([1e300]), "row 0: column 'age' holds a number that is not finite"),
        ("age", pa.array(["old"]), "column 'age' is string"),
        ("user", pa.array([-1]), "row 0: column 'user' holds a negative id"),
        ("user", pa.array([2**63], pa.uint64()), "row 0: column 'user' holds a value that no int64 can"),
        ("user", pa.array([True]), "column 'user' is bool"),
        ("traffic", pa.array(["feeds"]), "traffic 'feeds' is not among the schema's; did you mean 'feed'"),
        ("traffic", pa.nulls(1, pa.string()), "traffic 'None' is not among"),
        ("topics", pa.array([[1, 2, 3, 4, 5, 6]]), "column 'topics__weights': its lists are not as long"),
        ("topics__weights", pa.array([[float("inf")] * 9]), "column 'topics__weights'"),
    ],
)
def test_what_a_user_cannot_have(name, column, said):
    with pytest.raises(DataError, match=said):
        encode_candidates(ENCODER, replaced(user_row(), name, column), candidate_rows(3))


def test_unknown_columns_are_refused_and_those_of_others_left_out():
    user, candidates = user_row(), candidate_rows(3)
    with pytest.raises(DataError, match="unknown column 'histry'; did you mean 'history'"):
        encode_candidates(ENCODER, user.append_column("histry", pa.array([1])), candidates)
    narrow = Encoder(SCHEMA, ("user", "ad"), labels=False)
    assert len(encode_candidates(narrow, user, candidates)) == 3
    extra = candidates.append_column("campaign", pa.array(["c"] * 3)).append_column("click", pa.nulls(3))
    assert len(encode_candidates(ENCODER, user, extra)) == 3


def test_weights_come_with_their_ids():
    user, candidates = user_row(), candidate_rows(3)
    moved = candidates.append_column("topics__weights", pa.array([[0.5]] * 3, pa.list_(pa.float32())))
    with pytest.raises(DataError, match="column 'topics__weights' has to come with 'topics'"):
        encode_candidates(ENCODER, user.drop_columns(["topics__weights"]), moved)


def test_a_users_list_times_the_candidates_is_limited():
    schema = Schema.model_validate(
        SCHEMA.dump()
        | {"features": [{**f, "max_len": None} if f["name"] == "history" else f for f in SCHEMA.dump()["features"]]}
    )
    user = replaced(user_row(), "history", pa.array([["a"] * 50]))
    encoder = Encoder(schema, labels=False)
    assert len(encode_candidates(encoder, user, candidate_rows(4), max_list_values=200)) == 4
    with pytest.raises(Problem, match="the user's 'history' has 50 ids, for 5 candidates: more than 200") as long:
        encode_candidates(encoder, user, candidate_rows(5), max_list_values=200)
    assert long.value.status == 413


def test_a_teachers_rows_are_conformed():
    rows = every_feature_rows(5, seed=1)
    assert_same_batch(plain(conform_rows(ENCODER, rows)), plain(rows))
    bare = conform_rows(ENCODER, rows.drop_columns(["example_id", "time", "click", "watch"]))
    assert bare["example_id"].to_pylist() == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match="column 'example_id' holds a null"):
        conform_rows(ENCODER, replaced(rows, "example_id", pa.nulls(5, pa.int64())))
    with pytest.raises(DataError, match="lacks column 'tags'"):
        conform_rows(ENCODER, rows.drop_columns(["tags"]))
    with pytest.raises(DataError, match="row 4: column 'user' holds a negative id"):
        conform_rows(ENCODER, replaced(rows, "user", pa.array([1, 2, 3, None, -4])))
