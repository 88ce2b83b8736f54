from __future__ import annotations

import pickle

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable

from rayfm.config import LabelError
from rayfm.labels import LabelLookup, LabelStore, files, lane_file
from rayfm.labels.lookup import _positions
from rayfm.schema import Task

TASKS = (Task(name="click"), Task(name="like"))
PERIOD = "2022-04-26"


def example_ids(rows: int, lane: int) -> np.ndarray:
    return np.random.default_rng(lane).permutation(10 * rows)[:rows] * 8 + lane


def predictions(ids: np.ndarray) -> np.ndarray:
    return np.stack([(ids % 1009) / 1009, (ids % 499) / 499], 1).astype(np.float32)


def labels_of(ids: np.ndarray, rows: np.ndarray | None = None, null: np.ndarray | None = None) -> pa.Table:
    values = predictions(ids)
    table = pa.table(
        {
            "example_id": ids,
            "click": pa.array(values[:, 0], mask=null),
            "like": pa.array(values[:, 1]),
        }
    )
    return table if rows is None else table.append_column("row", pa.array(rows, pa.int64()))


@pytest.fixture(autouse=True)
def small_row_groups(monkeypatch):
    monkeypatch.setattr(lane_file, "ROW_GROUP_ROWS", 64)


def store_lanes(root, *lanes, version="v1", period=PERIOD):
    LabelStore(root).label(
        "fm", version, None, period, [("impression", lane, table) for lane, table in enumerate(lanes)], TASKS
    )


def test_a_slice_looks_at_the_row_groups_that_it_reaches(tmp_path, monkeypatch):
    ids = example_ids(64 * 30, 0)
    store_lanes(tmp_path, labels_of(ids))
    lane = LabelLookup((tmp_path, None), "fm", "v1", ("click",)).lane(PERIOD, "impression", 0)
    asked: list = []
    monkeypatch.setattr("rayfm.labels.lookup._positions", lambda group: asked.append(group) or _positions(group))
    for start in range(0, len(ids), 64):
        values, mask = lane.rows(start, start + 64, ids[start : start + 64])
        assert mask.all()
        np.testing.assert_array_equal(values[:, 0], predictions(ids[start : start + 64])[:, 0])
    assert asked == [], "their bounds are known since the lane was opened"


def test_row_groups_that_overlap_are_all_found(tmp_path):
    """Bounds as other programs' files have them: overlapping, one inside another, unknown."""
    store_lanes(tmp_path, labels_of(example_ids(64, 0)))
    lane = LabelLookup((tmp_path, None), "fm", "v1", ("click",)).lane(PERIOD, "impression", 0)
    random = np.random.default_rng(0)
    for _ in range(200):
        low = np.sort(random.integers(0, 40, random.integers(0, 8)))
        high = low + random.integers(0, 30, len(low))
        if len(low):
            low[0], high[0] = (0, np.iinfo(np.int64).max) if random.random() < 0.3 else (low[0], high[0])
        lane._low, lane._high, lane._reach = low, high, np.maximum.accumulate(high)
        start, stop = np.sort(random.integers(0, 80, 2)).tolist()
        assert lane._holding(start, stop) == np.flatnonzero((low < stop) & (high >= start)).tolist()


def test_positional_answers(tmp_path):
    ids = [example_ids(1000, lane) for lane in range(2)]
    store_lanes(tmp_path, *map(labels_of, ids))
    lookup = LabelLookup((tmp_path, None), "fm", "v1", ("like", "click"))
    assert lookup.columns == ("fm/like", "fm/click")
    for start, stop in ((0, 10), (60, 70), (0, 1000), (990, 1000), (128, 192), (500, 500), (3, 4)):
        for lane in (1, 0):
            values, mask = lookup.rows(PERIOD, "impression", lane, start, stop, ids[lane][start:stop])
            assert values.dtype == np.float32
            assert mask.all()
            np.testing.assert_array_equal(values, predictions(ids[lane][start:stop])[:, ::-1])


def test_only_the_row_groups_asked_for_are_kept(tmp_path):
    ids = example_ids(1000, 0)
    store_lanes(tmp_path, labels_of(ids))
    lane = LabelLookup((tmp_path, None), "fm", "v1", ("click",)).lane(PERIOD, "impression", 0)
    for start in range(0, 1000, 50):
        assert lane.rows(start, start + 50, ids[start : start + 50])[1].all()
        assert len(lane._kept) <= 2
    assert lane._by_id is None, "no join where the ids agree"


def test_the_join_by_id_gives_what_positions_give(tmp_path):
    rows = 1000
    ids = example_ids(rows, 0)
    store_lanes(tmp_path, labels_of(ids))
    lookup = LabelLookup((tmp_path, None), "fm", "v1", ("click", "like"))
    straight = lookup.rows(PERIOD, "impression", 0, 0, rows, ids)
    shuffled = np.random.default_rng(7).permutation(rows)
    for order in (shuffled, np.roll(np.arange(rows), 1), np.arange(rows)[::-1]):
        values, mask = lookup.rows(PERIOD, "impression", 0, 0, rows, ids[order])
        np.testing.assert_array_equal(values, straight[0][order])
        np.testing.assert_array_equal(mask, straight[1][order])
    # The lane was dealt anew: an example was put before the others, which all moved by one.
    moved = np.concatenate([[77_777_777], ids])
    values, mask = lookup.rows(PERIOD, "impression", 0, 100, 200, moved[100:200])
    np.testing.assert_array_equal(values, predictions(moved[100:200]))
    assert mask.all()
    values, mask = lookup.rows(PERIOD, "impression", 0, 0, 3, moved[:3])
    assert mask[:, 0].tolist() == [False, True, True]
    assert values[0].tolist() == [0.0, 0.0]


def test_rows_without_a_label_are_masked(tmp_path):
    rows = 300
    ids = example_ids(rows, 0)
    kept = np.flatnonzero(np.random.default_rng(1).random(rows) < 0.7)
    null = np.random.default_rng(2).random(len(kept)) < 0.3
    shuffled = np.random.default_rng(3).permutation(len(kept))  # a worker may hand rows in any order
    store_lanes(tmp_path, labels_of(ids[kept][shuffled], kept[shuffled], null[shuffled]))
    lookup = LabelLookup((tmp_path, None), "fm", "v1", ("click", "like"))
    expected = np.zeros((rows, 2), bool)
    expected[kept, 0], expected[kept, 1] = ~null, True
    for start, stop in ((0, rows), (10, 75), (299, 300)):
        values, mask = lookup.rows(PERIOD, "impression", 0, start, stop, ids[start:stop])
        np.testing.assert_array_equal(mask, expected[start:stop])
        np.testing.assert_array_equal(values, np.where(mask, predictions(ids[start:stop]), 0))
    beyond = np.array([900_001, 900_002])
    assert not lookup.rows(PERIOD, "impression", 0, rows, rows + 2, beyond)[1].any()
    assert not lookup.rows(PERIOD, "consideration", 0, 0, 2, ids[:2])[1].any()
    assert not lookup.rows(PERIOD, "impression", 5, 0, 2, ids[:2])[1].any()
    assert not lookup.rows("2030-01-01", "impression", 0, 0, 2, ids[:2])[1].any()
    with pytest.raises(ValueError, match="2 ids for rows"):
        lookup.rows(PERIOD, "impression", 0, 0, 3, ids[:2])


def test_a_look_up_reads_one_version_of_the_table_and_of_the_teacher(tmp_path):
    ids = example_ids(100, 0)
    store_lanes(tmp_path, labels_of(ids))
    old = LabelLookup((tmp_path, None), "fm", "v1", ("click",))
    later = labels_of(ids).set_column(1, "click", pa.array(np.full(100, 0.125)))
    store_lanes(tmp_path, later, version="v2")
    store_lanes(tmp_path, labels_of(ids), period="2022-04-27")
    new = LabelLookup((tmp_path, None), "fm", "v2", ("click",))
    assert (new.rows(PERIOD, "impression", 0, 0, 100, ids)[0] == 0.125).all()
    np.testing.assert_array_equal(old.rows(PERIOD, "impression", 0, 0, 100, ids)[0], predictions(ids)[:, :1])
    assert not old.rows("2022-04-27", "impression", 0, 0, 100, ids)[1].any(), "committed after the table version"
    assert LabelLookup((tmp_path, old.table_version), "fm", "v1", ("click",)).table_version == old.table_version


def test_a_look_up_travels(tmp_path):
    ids = example_ids(100, 0)
    store_lanes(tmp_path, labels_of(ids))
    lookup = LabelLookup((tmp_path, None), "fm", "v1", ("click",))
    lookup.rows(PERIOD, "impression", 0, 0, 100, ids)
    data = pickle.dumps(lookup)
    assert len(data) < 4000
    assert pickle.loads(data).rows(PERIOD, "impression", 0, 0, 100, ids)[1].all()


def test_compacted_files_answer_alike(tmp_path):
    ids = [example_ids(200, lane) for lane in range(4)]
    store_lanes(tmp_path, *map(labels_of, ids))
    store_lanes(tmp_path, *(labels_of(part) for part in ids[:2]), version="v2")
    DeltaTable(str(tmp_path / "labels")).optimize.compact()
    store = LabelStore(tmp_path)
    assert len(DeltaTable(str(tmp_path / "labels")).file_uris()) == 1
    assert len(store.list()) == 6
    assert store.coverage("fm", "v1", PERIOD, {"impression": 800}) == {"impression": 1.0}
    assert store.coverage("fm", "v2", PERIOD, {"impression": 800}, ("click",)) == {"impression": 0.5}
    lookup = LabelLookup((tmp_path, None), "fm", "v1", ("click", "like"))
    for lane in range(4):
        values, mask = lookup.rows(PERIOD, "impression", lane, 50, 150, ids[lane][50:150])
        assert mask.all()
        np.testing.assert_array_equal(values, predictions(ids[lane][50:150]))
    again = store.label("fm", "v1", None, PERIOD, [("impression", 3, labels_of(ids[3]))], TASKS)
    assert (again.added, again.skipped) == (0, 1)


def test_a_representation_is_stored_beside_the_predictions(tmp_path):
    ids = example_ids(10, 0)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(40, dtype=np.float32)), 4)
    store_lanes(tmp_path, labels_of(ids).append_column("representation", vectors), labels_of(example_ids(10, 1)))
    assert LabelLookup((tmp_path, None), "fm", "v1", ("click",)).rows(PERIOD, "impression", 0, 0, 10, ids)[1].all()
    table = DeltaTable(str(tmp_path / "labels"))
    stored = {part.lane: part for part in LabelStore(tmp_path).list()}
    assert stored.keys() == {0, 1}
    import pyarrow.parquet as pq

    (path,) = [uri for uri in table.file_uris() if "lane-00000" in uri]
    assert pq.read_table(path)["representation"].combine_chunks().flatten().to_pylist() == list(range(40))


def test_a_corrupt_or_missing_label_file_is_named(tmp_path):
    ids = example_ids(100, 0)
    store_lanes(tmp_path, labels_of(ids))
    (path,) = (tmp_path / "labels").rglob("*.parquet")
    data = path.read_bytes()
    for content in (b"not parquet", data[: len(data) // 2]):
        path.write_bytes(content)
        with pytest.raises(LabelError, match=path.name):
            LabelLookup((tmp_path, None), "fm", "v1", ("click",)).rows(PERIOD, "impression", 0, 0, 100, ids)
    path.unlink()
    with pytest.raises(LabelError, match=path.name):
        LabelLookup((tmp_path, None), "fm", "v1", ("click",)).rows(PERIOD, "impression", 0, 0, 100, ids)


def test_a_doubled_row_is_an_error_and_never_an_answer(tmp_path):
    ids = example_ids(100, 0)
    store_lanes(tmp_path, labels_of(ids))
    lookup = LabelLookup((tmp_path, None), "fm", "v1", ("click",))
    (file,) = lookup._files[PERIOD]
    lookup._files[PERIOD] = [file, file]
    with pytest.raises(LabelError, match="row 0 is labelled twice"):
        lookup.rows(PERIOD, "impression", 0, 0, 100, ids)


def test_nothing_to_look_up(tmp_path):
    with pytest.raises(LabelError, match="no labels yet"):
        LabelLookup((tmp_path, None), "fm", "v1", ("click",))
    store_lanes(tmp_path, labels_of(example_ids(5, 0)))
    with pytest.raises(LabelError, match="no tasks"):
        LabelLookup((tmp_path, None), "fm", "v1", ())
    with pytest.raises(LabelError, match="version 7"):
        LabelLookup((tmp_path, 7), "fm", "v1", ("click",))


def test_footers_beyond_what_is_kept_are_read_again(tmp_path, monkeypatch):
    ids = [example_ids(200, lane) for lane in range(4)]
    store_lanes(tmp_path, *map(labels_of, ids))
    monkeypatch.setattr(files, "KEPT_FOOTER_BYTES", 1)
    lookup = LabelLookup((tmp_path, None), "fm", "v1", ("click", "like"))
    for start in range(0, 200, 50):
        for lane in range(4):
            values, _ = lookup.rows(PERIOD, "impression", lane, start, start + 50, ids[lane][start : start + 50])
            np.testing.assert_array_equal(values, predictions(ids[lane][start : start + 50]))
    footers = lookup._data._footers
    assert len(footers._kept) == 1
    assert footers._bytes == next(iter(footers._kept.values())).serialized_size
