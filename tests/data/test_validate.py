"""Every reason to reject a row, and the errors where no row could be good."""

from __future__ import annotations

import datetime
import decimal

import numpy as np
import pyarrow as pa
import pytest
from example_store import DAY_US, every_feature_rows, every_feature_schema

from rayfm.config import DataError
from rayfm.data.sources.base import Period
from rayfm.data.validate import DUPLICATE, row_hash, split_duplicates, split_rejects
from rayfm.schema import Schema

SCHEMA = every_feature_schema()
ROWS = 12


def day(number: int) -> Period:
    start = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(days=number)
    return Period(name=start.date().isoformat(), start=start, end=start + datetime.timedelta(days=1))


def rows(kind: str = "impression") -> pa.Table:
    table = every_feature_rows(ROWS, 1, kind, start=DAY_US)
    return table.append_column("kind", pa.repeat(kind, ROWS))


def with_column(table: pa.Table, name: str, values: object, type_: pa.DataType | None = None) -> pa.Table:
    array = values if isinstance(values, pa.Array) else pa.array(values, type_)
    return table.set_column(table.column_names.index(name), name, array)


def with_value(table: pa.Table, name: str, value: object) -> pa.Table:
    """Row 3 gets ``value`` in column ``name``."""
    values = table[name].to_pylist()
    values[3] = value
    return with_column(table, name, values, table[name].type)


BAD_VALUES = [
    ("time", None, "null time"),
    ("time", -5, "negative time"),
    ("time", 5 * DAY_US, "time outside every period"),
    ("example_id", None, "null example_id"),
    ("traffic", "mail", "unknown traffic"),
    ("traffic", None, "unknown traffic"),
    ("kind", "click", "unknown kind"),
    ("kind", None, "unknown kind"),
    ("age", float("nan"), "dense 'age' is not finite"),
    ("age", float("-inf"), "dense 'age' is not finite"),
    ("user", -1, "negative id in 'user'"),
    ("tags", [1, -2], "negative id in 'tags'"),
    ("tags", [1, None], "null id in 'tags'"),
    ("click", 0.5, "label 'click' is not 0 or 1"),
    ("click", float("nan"), "label 'click' is not finite"),
    ("watch", float("inf"), "label 'watch' is not finite"),
    ("topics", [1, 2, 3, 4, 5, 6], "weights of 'topics' not as long as its ids"),
    ("logged/ranking/click", float("nan"), "'logged/ranking/click' is not finite"),
]


@pytest.mark.parametrize(("column", "value", "reason"), BAD_VALUES)
def test_a_bad_value_rejects_its_row_alone(column, value, reason):
    good, rejects = split_rejects(with_value(rows(), column, value), SCHEMA, [day(1)])
    assert rejects["reason"].to_pylist() == [reason]
    assert good.num_rows == ROWS - 1
    expected = np.delete(rows()["example_id"].to_numpy(), 3)
    np.testing.assert_array_equal(good["example_id"].to_numpy(), expected)
    kept = rejects[column].to_pylist()[0]
    assert kept == value or value != value, "a reject keeps the row as it came"


def test_a_bad_weight():
    table = with_value(with_value(rows(), "topics", [1, 2]), "topics__weights", [1.0, float("nan")])
    _, rejects = split_rejects(table, SCHEMA, [day(1)])
    assert rejects["reason"].to_pylist() == ["a weight of 'topics' is not finite"]


@pytest.mark.parametrize(
    ("column", "array"),
    [
        ("user", pa.array([2**63 if row == 3 else row for row in range(ROWS)], pa.uint64())),
        ("user", pa.array([decimal.Decimal(10**20 if row == 3 else row) for row in range(ROWS)])),
        ("user", pa.array([decimal.Decimal("1.5" if row == 3 else row) for row in range(ROWS)])),
        ("example_id", pa.array([2**63 if row == 3 else row for row in range(ROWS)], pa.uint64())),
        ("tags", pa.array([[7, 2**63] if row == 3 else [row] for row in range(ROWS)], pa.list_(pa.uint64()))),
    ],
)
def test_a_huge_id(column, array):
    good, rejects = split_rejects(with_column(rows(), column, array), SCHEMA, [day(1)])
    assert rejects["reason"].to_pylist() == [f"id beyond int64 in {column!r}"]
    assert rejects.schema.field(column).type == array.type
    assert good.num_rows == ROWS - 1
    assert good.schema.field(column).type == SCHEMA.arrow_schema().field(column).type


def test_a_consideration_has_no_label():
    table = rows("consideration")
    assert split_rejects(table, SCHEMA, [day(1)])[1].num_rows == 0
    _, rejects = split_rejects(with_value(table, "click", 1.0), SCHEMA, [day(1)])
    assert rejects["reason"].to_pylist() == ["consideration with a label"]


def test_negative_ids_where_allowed():
    schema = Schema.model_validate(
        SCHEMA.dump()
        | {"features": [f.dump() | ({"negative_ids": "allow"} if f.name == "user" else {}) for f in SCHEMA.features]}
    )
    good, _ = split_rejects(with_value(rows(), "user", -1), schema, [day(1)])
    assert good["user"][3].as_py() == -1


def test_nulls_are_missing_features():
    table = rows()
    for name in ("age", "user", "ad", "tags", "history", "click", "watch"):
        table = with_value(table, name, None)
    table = with_value(with_value(table, "topics", None), "topics__weights", None)
    good, rejects = split_rejects(table, SCHEMA, [day(1)])
    assert rejects.num_rows == 0
    assert good["tags"][3].as_py() is None


def test_the_first_reason_counts_once():
    _, rejects = split_rejects(with_value(with_value(rows(), "user", -1), "age", float("nan")), SCHEMA, [day(1)])
    assert rejects.num_rows == 1


def test_other_types_of_the_same_values():
    plain = rows()
    other = plain
    user = plain["user"].cast(pa.int32())
    for name, array in [
        ("user", user.combine_chunks()),
        ("example_id", plain["example_id"].cast(pa.uint64()).combine_chunks()),
        ("ad", plain["ad"].combine_chunks().dictionary_encode()),
        ("age", plain["age"].cast(pa.float64()).combine_chunks()),
        ("click", pa.array([None if v is None else bool(v) for v in plain["click"].to_pylist()])),
        ("tags", plain["tags"].combine_chunks().cast(pa.large_list(pa.int32()))),
        ("topics__weights", plain["topics__weights"].combine_chunks().cast(pa.list_(pa.float64()))),
    ]:
        other = with_column(other, name, array)
    assert split_rejects(other, SCHEMA, [day(1)])[0].equals(split_rejects(plain, SCHEMA, [day(1)])[0])


def test_an_all_null_column_has_no_type_of_its_own():
    good, rejects = split_rejects(with_column(rows(), "watch", pa.nulls(ROWS)), SCHEMA, [day(1)])
    assert rejects.num_rows == 0
    assert good.schema.field("watch").type == pa.float32()


@pytest.mark.parametrize(
    ("column", "array", "message"),
    [
        ("user", pa.array(["u"] * ROWS), r"column 'user' is string, the schema wants int64.*id_type: string"),
        ("ad", pa.array([1] * ROWS), r"column 'ad' is int64, the schema wants string.*id_type: int64"),
        ("age", pa.array(["old"] * ROWS), r"column 'age' is string, the schema wants float"),
        ("tags", pa.array([1] * ROWS), r"column 'tags' is int64, the schema wants list<item: int64>"),
        ("user", pa.array([1.0] * ROWS), r"column 'user' is double, the schema wants int64"),
    ],
)
def test_a_hopeless_type_is_an_error(column, array, message):
    with pytest.raises(DataError, match=message):
        split_rejects(with_column(rows(), column, array), SCHEMA, [day(1)])


def test_a_missing_column_is_an_error_with_the_nearest():
    table = rows().rename_columns(["users" if name == "user" else name for name in rows().column_names])
    with pytest.raises(DataError, match=r"lack column 'user'; did you mean '.*user"):
        split_rejects(table.drop_columns("user_id"), SCHEMA, [day(1)])


def test_sliced_and_chunked_tables():
    whole = rows()
    pieces = pa.concat_tables([whole.slice(0, 5), whole.slice(5)])
    good, _ = split_rejects(pieces.slice(2, 8), SCHEMA, [day(1)])
    assert good.equals(split_rejects(whole, SCHEMA, [day(1)])[0].slice(2, 8))
    assert split_rejects(whole.slice(0, 0), SCHEMA, [day(1)])[0].num_rows == 0


def sorted_rows(ids: list[int], times: list[int], age: list[float]) -> pa.Table:
    return pa.table({"example_id": ids, "time": times, "age": age})


def test_duplicates_keep_the_earliest():
    seen = np.zeros(2, np.bool_)
    first = sorted_rows([7, 3, 9, 7], [1, 2, 2, 3], [0.1, 0.2, 0.3, 0.4])
    good, rejects = split_duplicates(first, np.array([7, 9]), seen)
    assert good["age"].to_pylist() == [0.1, 0.2, 0.3]
    assert rejects["age"].to_pylist() == [0.4]
    assert rejects["reason"].to_pylist() == [DUPLICATE]
    again = sorted_rows([9, 1], [4, 4], [0.5, 0.6])
    good, rejects = split_duplicates(again, np.array([7, 9]), seen)
    assert good["age"].to_pylist() == [0.6]
    assert rejects["age"].to_pylist() == [0.5]


def test_duplicates_of_one_time_are_chosen_by_content():
    one = sorted_rows([7, 7, 7], [1, 1, 1], [0.1, 0.2, 0.3])
    other = one.take(pa.array([2, 0, 1]))
    kept = [
        split_duplicates(table, np.array([7]), np.zeros(1, np.bool_))[0]["age"].to_pylist() for table in (one, other)
    ]
    assert kept[0] == kept[1]
    assert len(kept[0]) == 1


def test_row_hash_sees_every_column():
    table = split_rejects(rows(), SCHEMA, [day(1)])[0]
    base = row_hash(table)
    assert len(np.unique(base)) == ROWS
    np.testing.assert_array_equal(base[::-1], row_hash(table.take(pa.array(np.arange(ROWS)[::-1]))))
    for name, value in [("age", 1.5), ("ad", "x"), ("tags", [2, 1]), ("history", ["x"]), ("user", None)]:
        changed = row_hash(with_value(with_value(table, name, None), name, value))
        assert (changed != base).sum() <= 1
        swapped = [[1, 2], [2, 1]]
        if name == "tags":
            hashes = [row_hash(with_value(table, "tags", tags))[3] for tags in swapped]
            assert hashes[0] != hashes[1]
