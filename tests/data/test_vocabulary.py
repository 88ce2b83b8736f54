from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from example_store import every_feature_rows, every_feature_schema

from rayfm.config import ConfigError, DataError, validate
from rayfm.data.encode import Encoder
from rayfm.data.vocabulary import Counted, Vocabulary, merge_counts, raw_ids
from rayfm.schema import Schema, Table, string_ids, table_rows


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def table(rows: int = 10, **vocabulary: int) -> Table:
    return Table(rows=rows, id_policy="vocabulary", vocabulary={"shared_rows": 4, "min_count": 3, **vocabulary})


def with_vocabulary(*tables: str, **vocabulary: int) -> Schema:
    """The schema with every feature, whose ``tables`` have vocabularies."""
    plain = every_feature_schema().dump()
    for name in tables:
        plain["tables"][name] |= {"id_policy": "vocabulary", "vocabulary": {"min_count": 3, **vocabulary}}
    return Schema.model_validate(plain)


def test_an_admitted_id_has_its_row_by_order_and_the_others_share_by_hash():
    vocabulary = Vocabulary(ints(70, -5, 9), shared_rows=4, salt=11)
    rows = vocabulary.rows(ints(9, 70, 8, -5, 9, 71))
    shared = table_rows(ints(8, 71), 4, 11)
    assert rows.tolist() == [6, 4, shared[0], 5, 6, shared[1]]
    assert vocabulary.places(ints(8, -5)).tolist() == [-1, 1]
    assert len(vocabulary) == 3
    assert (Vocabulary(ints(), 4, 11).rows(ints(9, 70)) < 4).all()


def test_ids_are_admitted_when_they_were_seen_often_enough_in_all():
    first, record = Counted.nothing().grown(ints(1, 2, 3), ints(3, 2, 5), table())
    assert first.ids_V.tolist() == [3, 1], "the more frequent first"
    assert (first.candidates_C.tolist(), first.counts_C.tolist()) == ([2], [2])
    assert (record.admitted, record.known, record.candidates, record.refused, record.evicted) == (2, 2, 1, 0, 0)
    assert record.coverage == pytest.approx(8 / 10)
    second, record = first.grown(ints(1, 2, 7), ints(9, 1, 4), table())
    assert second.ids_V.tolist() == [3, 1, 7, 2], "2 was seen three times in all; who was admitted keeps the place"
    assert record.admitted == 2
    assert record.coverage == 1.0
    third, record = second.grown(ints(), ints(), table())
    assert third.ids_V.tolist() == second.ids_V.tolist()
    assert record.coverage == 0.0


def test_a_full_table_admits_nobody_and_says_so():
    full, record = Counted.nothing().grown(ints(1, 2, 3, 4), ints(3, 3, 4, 3), table(rows=6))
    assert full.ids_V.tolist() == [3, 1]
    assert (record.admitted, record.refused, record.candidates) == (2, 2, 2)
    again, record = full.grown(ints(2), ints(50), table(rows=6))
    assert again.ids_V.tolist() == [3, 1]
    assert (record.admitted, record.refused, record.coverage) == (0, 2, 0.0)


def test_of_too_many_candidates_the_frequent_ones_are_remembered():
    counted, record = Counted.nothing().grown(ints(1, 2, 3, 4), ints(1, 2, 1, 2), table(max_candidates=3))
    assert counted.candidates_C.tolist() == [1, 2, 4]
    assert counted.counts_C.tolist() == [1, 2, 2]
    assert record.candidates == 3


def test_counts_of_several_places_are_summed():
    ids, counts = merge_counts([(ints(5, 9), ints(1, 2)), (ints(), ints()), (ints(-1, 9), ints(4, 3))])
    assert (ids.tolist(), counts.tolist()) == ([-1, 5, 9], [4, 1, 5])


def test_raw_ids_are_those_that_encoding_folds():
    words = pa.array(["a", "b", "a"])
    assert raw_ids(words).tolist() == string_ids(words).tolist()
    assert raw_ids(pa.array([3, -1], pa.int32())).tolist() == [3, -1]
    assert raw_ids(pa.array([], pa.string())).tolist() == []


def test_the_encoder_looks_up_rows_of_ids_of_every_kind_of_feature():
    schema = with_vocabulary("user", "ad", "topic")
    rows = every_feature_rows(50, seed=1)
    ads = string_ids(pa.array(["ad3", "ad7"]))
    vocabularies = {
        "user": Vocabulary(ints(12, 30), 10, schema.salt("user")),
        "ad": Vocabulary(ads, 5, schema.salt("ad")),
        "topic": Vocabulary(ints(40), 3, schema.salt("topic")),
    }
    encoder = Encoder(schema, vocabularies=vocabularies)
    users = rows["user"].combine_chunks().fill_null(0)
    expected = vocabularies["user"].rows(users.to_numpy())
    assert encoder.table_rows_of(schema.feature("user"), rows["user"].combine_chunks()).tolist() == expected.tolist()
    assert {10, 11} <= set(expected.tolist())
    words = pa.array(["ad7", "ad1", "ad3"])
    found = encoder.table_rows_of(schema.feature("history"), words)
    assert found.tolist() == [6, table_rows(string_ids(words), 5, schema.salt("ad"))[1], 5]
    assert encoder.part(("topics",)).table_rows_of(schema.feature("topics"), pa.array([40])).tolist() == [3]
    plain = Encoder(every_feature_schema())
    tags = pa.array([4, 5, 98])
    assert (
        encoder.table_rows_of(schema.feature("tags"), tags).tolist()
        == plain.table_rows_of(schema.feature("tags"), tags).tolist()
    ), "a table without a policy is as ever"


def test_without_its_vocabulary_nothing_is_encoded():
    with pytest.raises(DataError, match="table 'user' has an id_policy of rows of their own, and its vocabulary"):
        Encoder(with_vocabulary("user")).table_rows_of(every_feature_schema().feature("user"), pa.array([1]))


def test_the_shared_part_is_a_tenth_unless_it_is_named():
    assert Table(rows=100, id_policy="vocabulary").shared_rows == 10
    assert Table(rows=5, id_policy="vocabulary").shared_rows == 1
    assert table().shared_rows == 4
    assert Table(rows=100).shared_rows == 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id_policy": "vocabulary", "ids": "modulo"}, "leave one of them out"),
        ({"id_policy": "vocabulary", "vocabulary": {"shared_rows": 10}}, "leaves none of the 10 rows"),
        ({"vocabulary": {"min_count": 2}}, "'vocabulary' goes with id_policy: vocabulary or managed"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        validate(Table, {"rows": 10, **changes}, "table")


# -- managed ------------------------------------------------------------------------------------------


def managed(rows: int = 6, **vocabulary: float) -> Table:
    """Two rows of one's own, unless more are asked for."""
    settings = {"shared_rows": 4, "min_count": 3, "decay": 0.5, **vocabulary}
    return Table(rows=rows, id_policy="managed", vocabulary=settings)


def test_counts_fade_and_what_counts_more_takes_the_row_of_what_counts_least():
    counted, record = Counted.nothing().grown(ints(1, 2), ints(8, 4), managed())
    assert (counted.ids_V.tolist(), counted.scores_V.tolist()) == ([1, 2], [8.0, 4.0])
    assert (record.admitted, record.evicted, counted.replaced_K.tolist()) == (2, 0, [])
    # 1: 4, 2: 2 + 1 = 3; 7: 3 counts no more than the least, so nobody goes.
    counted, record = counted.grown(ints(2, 7), ints(1, 3), managed())
    assert counted.ids_V.tolist() == [1, 2]
    assert (record.admitted, record.evicted, record.refused, record.candidates) == (0, 0, 1, 1)
    # 1: 2, 2: 1.5 + 1 = 2.5; 7: 1.5 + 3 = 4.5 takes the row of 1, which is a candidate again with what it counted.
    counted, record = counted.grown(ints(2, 7), ints(1, 3), managed())
    assert counted.ids_V.tolist() == [7, 2]
    assert counted.scores_V.tolist() == [4.5, 2.5]
    assert (counted.candidates_C.tolist(), counted.counts_C.tolist()) == ([1], [2.0])
    assert counted.replaced_K.tolist() == [0]
    assert (record.admitted, record.evicted, record.known, record.refused) == (1, 1, 2, 0)
    assert record.coverage == 1.0
    # It comes back where it was seen enough again: 1: 1 + 9 takes the row of 2 (1.25).
    counted, record = counted.grown(ints(1), ints(9), managed())
    assert counted.ids_V.tolist() == [7, 1]
    assert counted.replaced_K.tolist() == [1]


def test_free_rows_are_given_away_before_anybody_is_evicted():
    first, _ = Counted.nothing().grown(ints(1), ints(3), managed(rows=7))
    counted, record = first.grown(ints(5, 6, 7), ints(30, 20, 10), managed(rows=7))
    assert counted.ids_V.tolist() == [7, 5, 6], "5 and 6 get the free rows, 7 that of 1, which counts 1.5"
    assert (record.admitted, record.evicted, counted.replaced_K.tolist()) == (3, 1, [0])


def test_each_holder_is_evicted_by_one_newcomer_alone():
    first, _ = Counted.nothing().grown(ints(1, 2, 3), ints(40, 4, 20), managed(rows=7))
    counted, record = first.grown(ints(11, 12, 13), ints(9, 11, 5), managed(rows=7))
    # Holders 20, 2, 10; 12 (11) takes the row of 2 (2), 11 (9) not that of 3 (10).
    assert dict(zip(counted.ids_V.tolist(), counted.scores_V.tolist(), strict=True)) == {1: 20.0, 12: 11.0, 3: 10.0}
    assert (record.evicted, record.refused) == (1, 2)
