"""Few rows are hashed all features at once, many a feature at a time: each id has the same table row either way."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from rayfm.config import DataError
from rayfm.data import encode as encode_module
from rayfm.data.encode import EncodedChunk, Encoder
from rayfm.schema import Schema, salt_of, table_rows, table_rows_each

SCHEMA = Schema.model_validate(
    {
        "tables": {
            "item": {"rows": 1_000},
            "place": {"rows": 77, "salt": 5},
            "hour": {"rows": 24, "ids": "modulo"},
            "word": {"rows": 50},
        },
        "features": [
            {"name": "item", "kind": "sparse"},
            {"name": "word", "kind": "sparse", "id_type": "string"},
            {"name": "place", "kind": "sparse"},
            {"name": "hour", "kind": "sparse"},
            {"name": "last_item", "kind": "sparse", "table": "item", "negative_ids": "allow"},
        ],
        "tasks": [{"name": "click"}],
    }
)
ROWS = 40


def examples() -> pa.Table:
    """Whole numbers of all 64 bits, and nulls in three of the columns."""
    rng = np.random.default_rng(3)
    wide = rng.integers(-(2**63), 2**63 - 1, ROWS)
    some = np.arange(ROWS) % 7 == 0
    return pa.table(
        {
            "example_id": np.arange(ROWS),
            "traffic": ["all"] * ROWS,
            "item": pa.array(np.abs(wide // 2), mask=some),
            "word": pa.array([f"w{i % 9}" for i in range(ROWS)], mask=some[::-1].copy()),
            "place": rng.integers(0, 2**40, ROWS),
            "hour": rng.integers(0, 1_000, ROWS),
            "last_item": pa.array(wide, mask=some[::-1].copy()),
        }
    )


def encoded(table: pa.Table | pa.RecordBatch, order: np.ndarray | None = None) -> EncodedChunk:
    rows = table.num_rows
    none = np.zeros((rows, 0), np.float32)
    encoder = Encoder(SCHEMA, labels=False)
    return encoder.encode(table, np.zeros(rows, np.int64), none, none.astype(bool), order=order)


@pytest.mark.parametrize("order", [None, np.random.default_rng(1).permutation(ROWS)])
def test_an_id_has_the_same_row_however_many_are_hashed_at_once(
    monkeypatch: pytest.MonkeyPatch, order: np.ndarray | None
) -> None:
    together = encoded(examples(), order)
    monkeypatch.setattr(encode_module, "ROWS_TOGETHER", ROWS - 1)
    alone = encoded(examples(), order)
    assert together.single_valid is not None
    np.testing.assert_array_equal(together.single_valid, alone.single_valid)
    np.testing.assert_array_equal(together.single, alone.single)
    assert (alone.single >= 0).all()


def test_features_hashed_together_have_their_own_tables_and_salts() -> None:
    table = examples()
    found = encoded(table).single
    rows = {"item": (1_000, salt_of("item")), "place": (77, 5), "last_item": (1_000, salt_of("item"))}
    for position, feature in enumerate(SCHEMA.features):
        if feature.name in rows:
            ids = table[feature.name].fill_null(0).to_numpy()
            np.testing.assert_array_equal(found[position], table_rows(ids, *rows[feature.name]))


def test_rows_of_several_features_are_those_of_each() -> None:
    ids = np.random.default_rng(2).integers(-(2**63), 2**63 - 1, (3, 11))
    before, out = ids.copy(), np.empty_like(ids)
    sizes, salts = (1, 7, 2**40), (0, 2**63 - 1, 12_345)
    table_rows_each(ids, sizes, salts, out=out)
    for feature in range(3):
        np.testing.assert_array_equal(out[feature], table_rows(ids[feature], sizes[feature], salts[feature]))
    np.testing.assert_array_equal(ids, before)


def test_a_record_batch_is_encoded_as_a_table() -> None:
    table = examples()
    batch = table.combine_chunks().to_batches()[0]
    np.testing.assert_array_equal(encoded(batch).single, encoded(table).single)


def test_a_traffic_of_all_rows_may_be_sent_once() -> None:
    table = examples()
    at = table.column_names.index("traffic")
    once = pa.DictionaryArray.from_arrays(pa.array(np.zeros(ROWS, np.int32)), pa.array(["all"]))
    np.testing.assert_array_equal(encoded(table.set_column(at, "traffic", once)).traffic, np.zeros(ROWS))
    other = pa.DictionaryArray.from_arrays(pa.array(np.zeros(ROWS, np.int32)), pa.array(["elsewhere"]))
    with pytest.raises(DataError, match="'elsewhere' is not among"):
        encoded(table.set_column(at, "traffic", other))
