"""Amazon reviews as click-through prediction: both spellings of records, negatives, and no look ahead."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bucketed import examples_of

from rayfm.config import ConfigError, DataError, read_yaml, validate
from rayfm.data.prepare import prepare
from rayfm.data.sources import buckets as buckets_module
from rayfm.data.sources import records
from rayfm.data.sources.amazon_electronics import AmazonElectronicsConfig, AmazonElectronicsSource
from rayfm.data.sources.amazon_examples import sample_negatives
from rayfm.data.store import ExampleStore
from rayfm.data.validate import split_rejects
from rayfm.schema import Schema

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCHEMA = validate(Schema, read_yaml(EXAMPLES / "amazon_electronics_schema.yaml"))
D0 = 1_370_304_000
"""4 June 2013, midnight UTC."""
DAY = 86_400
NEGATIVE = 1 << 40


def review(user: str, asin: str, day: int, overall: float = 5.0) -> str:
    """A line as published in 2014."""
    return json.dumps(
        {
            "reviewerID": user,
            "asin": asin,
            "reviewerName": 'Mr. "Quote"',
            "helpful": [0, 1],
            "reviewText": "It's fine,\nreally \u00e9",
            "overall": overall,
            "summary": "ok",
            "unixReviewTime": D0 + day * DAY,
            "reviewTime": "06 4, 2013",
        }
    )


REVIEWS = "\n".join(
    [
        review("AO94", "0528881469", 0, 4.0),
        review("AO94", "B000000001", 2, 1.0),
        review("AO94", "B000000002", 2),  # a tie
        review("AM00", "B000000001", 1, 3.0),
        review("AO94", "B000000003", 5),
        review("AM00", "0528881469", 0),  # out of order in the file
    ]
)
META_2014 = """{'asin': '0528881469', 'title': "Driver's GPS, 5\\" 'trucker'", 'price': 299.99, 'categories': [['Electronics', 'GPS & Navigation', 'Trucking GPS']]}
{'asin': 'B000000001', 'categories': [['Electronics', 'Cables'], ['Computers', 'Adapters']], 'salesRank': {}}
{'asin': 'NOTREVIEWED', 'categories': [['Electronics', 'Radios']]}
{'asin': 'B000000001', 'categories': [['Second', 'Record']]}
{'asin': 'B000000002', 'categories': [[]]}
"""  # noqa: E501 (a line is a record)
META_2018 = """{"asin": "0528881469", "category": ["Electronics", "GPS &amp; Navigation", "Trucking GPS"], "rank": []}
{"asin": "B000000001", "category": ["Computers", "Adapters"], "also_buy": ["X"]}
{"asin": "B000000002", "category": []}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "reviews_Electronics_5.json.gz").write_bytes(gzip.compress((REVIEWS + "\n").encode()))
    (tmp_path / "meta_Electronics.json.gz").write_bytes(gzip.compress(META_2014.encode()))
    return tmp_path


def source(folder: Path, schema: Schema = SCHEMA, **more: object) -> AmazonElectronicsSource:
    return AmazonElectronicsSource(AmazonElectronicsConfig.model_validate({"path": str(folder), **more}), schema)


def test_positives_with_their_history(folder):
    table = examples_of(source(folder))
    rows = table.filter(pa.array(table["example_id"].to_numpy() < NEGATIVE)).to_pydict()
    assert rows["example_id"] == [1, 2, 3, 4], "a first review has no history to predict it from"
    assert rows["user_id"] == ["AO94", "AO94", "AM00", "AO94"]
    assert rows["item_id"] == ["B000000001", "B000000002", "B000000001", "B000000003"]
    assert rows["cate_id"] == ["Adapters", "unknown", "Adapters", "unknown"]
    assert rows["item_history"] == [
        ["0528881469"],
        ["0528881469"],
        ["0528881469"],
        ["0528881469", "B000000001", "B000000002"],
    ], "reviews of one day do not see one another, and a later line may be an earlier review"
    assert rows["cate_history"][3] == ["Trucking GPS", "Adapters", "unknown"]
    assert rows["click"] == [1.0] * 4
    assert rows["overall"] == [1.0, 5.0, 3.0, 5.0]
    assert rows["time"] == [1_000_000 * (D0 + day * DAY) for day in (2, 2, 1, 5)]
    assert set(rows["traffic"]) == {"all"}


def test_negatives_are_items_that_the_user_never_reviews(folder):
    table = examples_of(source(folder)).to_pydict()
    # AO94 has reviewed everything; AM00 has B000000002 and B000000003 left.
    assert table["example_id"] == [1, 2, 3, 4, NEGATIVE + 3]
    assert table["item_id"][-1] in ("B000000002", "B000000003")
    assert (table["click"][-1], table["overall"][-1]) == (0.0, None)
    for name in ("user_id", "time", "item_history", "cate_history"):
        assert table[name][-1] == table[name][2], name
    assert table["cate_id"][-1] == "unknown"
    drawn = {examples_of(source(folder, seed=seed))["item_id"][-1].as_py() for seed in range(20)}
    assert drawn == {"B000000002", "B000000003"}


def test_draws_are_uniform_over_what_the_user_does_not_have():
    owned = np.array([0, 3, 4, 9, 3])  # one twice
    users = np.array([7, 7, 7, 7, 7, 2])
    items = np.append(owned, 5)
    rows = np.zeros(60_000, np.int64)
    ids = np.arange(60_000)
    drawn = sample_negatives(users, items, rows, ids, 10, seed=3)
    counts = Counter(drawn.tolist())
    assert set(counts) == {1, 2, 5, 6, 7, 8}
    assert max(abs(count - 10_000) for count in counts.values()) < 5 * np.sqrt(60_000 * 5 / 36)
    other = sample_negatives(users, items, np.full(60_000, 5), ids, 10, seed=3)
    assert set(other.tolist()) == set(range(10)) - {5}
    full = sample_negatives(np.zeros(3, np.int64), np.arange(3), np.zeros(2, np.int64), ids[:2], 3, seed=0)
    assert full.tolist() == [-1, -1], "nothing is left to draw"
    last = sample_negatives(np.zeros(3, np.int64), np.array([0, 1, 3]), np.zeros(2, np.int64), ids[:2], 4, seed=0)
    assert last.tolist() == [2, 2]


def test_a_draw_depends_on_seed_and_row_alone():
    users, items = np.array([0, 0, 1]), np.array([2, 5, 2])
    ids = np.arange(100)
    first = sample_negatives(users, items, np.zeros(100, np.int64), ids, 50, seed=1)
    again = sample_negatives(users[:2], items[:2], np.zeros(100, np.int64), ids, 50, seed=1)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(
        first[40:60], sample_negatives(users, items, np.zeros(20, np.int64), ids[40:60], 50, seed=1)
    )
    assert (first != sample_negatives(users, items, np.zeros(100, np.int64), ids, 50, seed=2)).mean() > 0.8


def test_all_spellings_say_the_same(folder):
    whole = examples_of(source(folder))
    assert whole.num_rows == 5
    (folder / "meta_Electronics.json.gz").unlink()
    (folder / "meta_Electronics.json").write_text(META_2018)
    assert examples_of(source(folder)).equals(whole), "the metadata of 2018"
    (folder / "reviews_Electronics_5.json.gz").unlink()
    literals = "\n".join(repr(json.loads(line)) for line in REVIEWS.split("\n")).replace("5.0", "5")
    assert literals.startswith("{'reviewerID'")
    (folder / "reviews_Electronics_5.json").write_text(literals)
    assert examples_of(source(folder)).equals(whole), "reviews as Python literals"
    (folder / "reviews_Electronics_5.json").unlink()
    (folder / "Electronics_5.json").write_text(REVIEWS.replace('"helpful": [0, 1]', '"style": {"Color:": "red"}'))
    assert examples_of(source(folder)).equals(whole), "the reviews of 2018"
    (folder / "Electronics.json").write_text(REVIEWS.split("\n")[0])
    assert source(folder, five_core=False).estimated_rows() == 2


@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize("buckets", [1, 3])
def test_any_cut_of_the_file_gives_the_same_examples(folder, buckets, literal, monkeypatch):
    whole = examples_of(source(folder))
    (folder / "reviews_Electronics_5.json.gz").unlink()
    lines = [repr(json.loads(line)) if literal else line for line in REVIEWS.split("\n")]
    (folder / "reviews_Electronics_5.json").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(records, "PART_BYTES", 100)
    monkeypatch.setattr(buckets_module, "RUN_BYTES", 1)
    own = source(folder)
    assert len(own.parts()) > 10
    assert examples_of(own, buckets).equals(whole)


def test_min_history_and_feedback_delay(folder):
    def positives(**more: object) -> dict[int, list[str]]:
        table = examples_of(source(folder, **more))
        return {
            row: items
            for row, items in zip(table["example_id"].to_pylist(), table["item_history"].to_pylist(), strict=True)
            if row < NEGATIVE
        }

    assert list(positives(min_history=0)) == [0, 1, 2, 3, 4, 5]
    assert positives(min_history=0)[0] == []
    assert list(positives(min_history=2)) == [4]
    assert list(positives(feedback_delay=2 * DAY)) == [4], "the bound itself is excluded"
    assert positives(feedback_delay=2 * DAY)[4] == ["0528881469", "B000000001", "B000000002"]
    assert positives(feedback_delay=3 * DAY)[4] == ["0528881469"]


def test_a_later_review_changes_no_history(folder):
    before = examples_of(source(folder))
    more = [review("AO94", "B000000009", 9), review("AO94", "B000000008", 5), review("ZZ", "B000000009", 2)]
    (folder / "reviews_Electronics_5.json.gz").write_bytes(gzip.compress("\n".join([REVIEWS, *more]).encode()))
    after = examples_of(source(folder))
    rows = after.filter(pa.array(np.isin(after["example_id"].to_numpy(), [1, 2, 3, 4])))
    for name in ("item_history", "cate_history", "item_id"):
        assert rows[name].to_pylist() == before[name].to_pylist()[:4]


def test_periods(folder):
    assert [period.name for period in source(folder).periods()] == [
        "2013-06-04",
        "2013-06-05",
        "2013-06-06",
        "2013-06-09",
    ]
    weeks = source(folder, period_days=7).periods()
    assert [period.name for period in weeks] == ["2013-05-30", "2013-06-06"], "weeks count from 1970-01-01, a Thursday"
    cut = source(folder, period_days=7, start="2013-06-05", end="2013-06-06")
    names = [(period.name, period.start.isoformat()[:10], period.end.isoformat()[:10]) for period in cut.periods()]
    assert names == [("2013-05-30", "2013-06-05", "2013-06-06"), ("2013-06-06", "2013-06-06", "2013-06-07")]
    assert [row for row in examples_of(cut)["example_id"].to_pylist() if row < NEGATIVE] == [1, 2, 3]
    with pytest.raises(DataError, match="go from 2013-06-04 to 2013-06-09, none of that lies between start and end"):
        source(folder, start="2020-01-01").periods()
    with pytest.raises(ConfigError, match="start 2020-01-01 is after end 2019-01-01"):
        source(folder, start="2020-01-01", end="2019-01-01")


def test_bad_rows_are_rejected_and_missing_ones_kill_nothing(folder):
    bad = [
        review("AO94", "B000000001", 6).replace(f"{D0 + 6 * DAY}", "null"),
        review("AO94", "B000000001", 6).replace(f"{D0 + 6 * DAY}", "-1"),
        review("AO94", "B000000001", 6).replace('"B000000001"', "null"),
        review("AO94", "B000000001", 6).replace('"AO94"', "null"),
        review("AO94", "B000000001", 6).replace("5.0", "null"),
    ]
    (folder / "reviews_Electronics_5.json.gz").write_bytes(gzip.compress("\n".join([REVIEWS, *bad]).encode()))
    own = source(folder, min_history=0)
    good, rejects = split_rejects(examples_of(own), own.schema, own.periods())
    assert rejects.sort_by("example_id")["reason"].to_pylist() == ["null time", "negative time"]
    rows = {row["example_id"]: row for row in good.to_pylist()}
    assert rows[8]["item_id"] is None
    assert rows[8]["cate_id"] is None
    assert rows[9]["user_id"] is None
    assert rows[9]["item_history"] == []
    assert rows[10]["overall"] is None
    assert NEGATIVE + 8 not in rows
    assert NEGATIVE + 9 not in rows


def test_only_the_reviews_are_read_without_categories(folder):
    (folder / "meta_Electronics.json.gz").unlink()
    with pytest.raises(DataError, match=r"meta_Electronics\.json \(or \.json\.gz\) is missing; download"):
        source(folder).parts()
    features = [feature.dump() for feature in SCHEMA.features if not feature.name.startswith("cate_")]
    lean = Schema.model_validate(SCHEMA.dump() | {"features": features})
    assert examples_of(source(folder, lean)).num_rows == 5


def test_errors_name_the_file_and_what_to_do(folder, tmp_path):
    with pytest.raises(DataError, match="no such folder; download the Electronics reviews"):
        source(tmp_path / "nowhere").periods()
    with pytest.raises(DataError, match=r"reviews_Electronics\.json or Electronics\.json \(or \.json\.gz\) is missing"):
        source(folder, five_core=False).periods()
    packed = folder / "reviews_Electronics_5.json.gz"
    whole = packed.read_bytes()
    packed.write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"reviews_Electronics_5\.json\.gz: cannot be read"):
        source(folder).periods()
    packed.write_bytes(b"no gzip at all")
    with pytest.raises(DataError, match=r"reviews_Electronics_5\.json\.gz: cannot be read"):
        source(folder).periods()
    packed.unlink()
    plain = folder / "reviews_Electronics_5.json"
    for text, message in [
        ("", "the file is empty"),
        ("not a record\n", "the first line is neither a JSON object nor a Python dictionary"),
        (REVIEWS.replace("asin", "item"), r"the first record has no key 'asin'"),
        (REVIEWS + '\n{"reviewerID": \n', "cannot be read"),
        (REVIEWS.replace("1.0", '"one"'), "cannot be read .*overall"),
        (re.sub(r"Time\": \d+", 'Time": -1', REVIEWS), "no record has a unixReviewTime in seconds"),
        (repr(json.loads(REVIEWS.split("\n")[0])) + "\n{'reviewerID': \n", "line 2 is no Python dictionary"),
        (repr(json.loads(REVIEWS.split("\n")[0])).replace("4.0", "'four'"), "cannot be read .*lines 1 to 1"),
    ]:
        plain.write_text(text)
        with pytest.raises(DataError, match=rf"reviews_Electronics_5\.json: .*{message}"):
            examples_of(source(folder))
    plain.write_text(REVIEWS)
    (folder / "meta_Electronics.json.gz").write_bytes(gzip.compress(b"{'asin': 'B000000001', 'title': 'x'}\n"))
    with pytest.raises(DataError, match="no record of a reviewed item has 'categories'"):
        examples_of(source(folder))


def test_literals_are_never_evaluated(folder):
    evil = "{'asin': 'B000000001', 'categories': [[__import__('os').getcwd()]]}\n"
    (folder / "meta_Electronics.json.gz").write_bytes(gzip.compress((META_2014 + evil).encode()))
    with pytest.raises(DataError, match=r"meta_Electronics\.json\.gz: line 6 is no Python dictionary"):
        examples_of(source(folder))


def test_schemas_that_do_not_fit_are_refused(folder):
    def changed(**more: object) -> Schema:
        return Schema.model_validate(SCHEMA.dump() | more)

    with pytest.raises(ConfigError, match="has no task 'rating'"):
        source(folder, changed(tasks=[{"name": "rating"}]))
    with pytest.raises(ConfigError, match="task 'overall' is regression, not binary"):
        source(folder, changed(tasks=[{"name": "overall"}]))
    with pytest.raises(ConfigError, match="'item_id' is text; write `id_type: string`"):
        source(folder, changed(features=[{"name": "item_id", "kind": "sparse", "table": "item"}]))


@pytest.mark.ray
def test_prepare_on_ray(folder, tmp_path, ray_session):
    store = ExampleStore(tmp_path / "store")
    own = source(folder, period_days=7)
    own.buckets = lambda: 2
    manifests = prepare(own, SCHEMA, store, lanes=2)
    assert [(manifest.period, manifest.rows("impression")) for manifest in manifests] == [
        ("2013-05-30", 2),
        ("2013-06-06", 3),
    ]
    rows = pa.concat_tables(pq.read_table(path) for _, path in store.files("2013-05-30", "impression"))
    assert sorted(rows["example_id"].to_pylist()) == [3, NEGATIVE + 3]
