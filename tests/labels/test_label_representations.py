"""The teacher's representation in the label store: written, pinned and looked up beside the predictions."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from rayfm.config import LabelError
from rayfm.labels import LabelLookup, LabelStore, Retention, expire, lane_file
from rayfm.schema import Task
from rayfm.snapshots import SQLiteMetadataStore

TASKS = (Task(name="click"),)
PERIOD, WIDTH = "2022-04-26", 4


@pytest.fixture(autouse=True)
def small_row_groups(monkeypatch):
    monkeypatch.setattr(lane_file, "ROW_GROUP_ROWS", 64)
    monkeypatch.setattr(lane_file, "row_group_rows", lambda schema: 64)


def example_ids(rows: int, lane: int = 0) -> np.ndarray:
    return np.random.default_rng(lane).permutation(10 * rows)[:rows] * 8 + lane


def vectors_of(ids: np.ndarray, width: int = WIDTH) -> np.ndarray:
    return (ids[:, None] % np.arange(7, 7 + width)).astype(np.float32)


def labels_of(
    ids: np.ndarray, null: np.ndarray | None = None, vectors: np.ndarray | None = None, stored: bool = True
) -> pa.Table:
    table = pa.table({"example_id": ids, "click": pa.array((ids % 997 / 997).astype(np.float32))})
    if not stored:
        return table
    values = vectors_of(ids) if vectors is None else vectors
    column = pa.FixedSizeListArray.from_arrays(
        pa.array(values.reshape(-1)), values.shape[1], mask=None if null is None else pa.array(null)
    )
    return table.append_column("representation", column)


def store_lanes(root: Path, *lanes: pa.Table, version: str = "v1") -> LabelStore:
    store = LabelStore(root)
    store.label("fm", version, None, PERIOD, [("impression", i, table) for i, table in enumerate(lanes)], TASKS)
    return store


def lookup(root: Path, version: str = "v1", tasks: tuple[str, ...] = ("click",), width: int = WIDTH) -> LabelLookup:
    return LabelLookup((root, None), "fm", version, tasks, width)


def ask(found: LabelLookup, ids: np.ndarray, start: int = 0, lane: int = 0):
    return found.vectors(PERIOD, "impression", lane, start, start + len(ids), ids)


def test_representations_come_back_by_position(tmp_path):
    ids = [example_ids(300, lane) for lane in range(2)]
    store_lanes(tmp_path, *map(labels_of, ids))
    found = lookup(tmp_path)
    assert (found.name, found.width, found.columns) == ("fm", WIDTH, ("fm/click",))
    for start, stop in ((0, 10), (60, 70), (0, 300), (299, 300), (128, 128)):
        for lane in (1, 0):
            values, mask = ask(found, ids[lane][start:stop], start, lane)
            assert (values.dtype, values.shape, mask.shape) == (np.float32, (stop - start, WIDTH), (stop - start,))
            assert mask.all()
            np.testing.assert_array_equal(values, vectors_of(ids[lane][start:stop]))
    predictions, known = found.rows(PERIOD, "impression", 0, 0, 300, ids[0])
    assert known.all()
    np.testing.assert_array_equal(predictions[:, 0], (ids[0] % 997 / 997).astype(np.float32))


def test_a_full_row_group_is_not_copied(tmp_path):
    ids = example_ids(64)
    store_lanes(tmp_path, labels_of(ids))
    found = lookup(tmp_path, tasks=())
    values, _ = ask(found, ids)
    again, _ = ask(found, ids[10:20], 10)
    assert np.shares_memory(values, again), "both are views of what was read"
    base = values
    while isinstance(base.base, np.ndarray):
        base = base.base
    assert not base.flags.owndata, "which lies in Arrow's own memory"
    with pytest.raises(ValueError, match="read-only"):
        values[0, 0] = 1


def test_representations_need_no_task(tmp_path):
    ids = example_ids(100)
    store_lanes(tmp_path, labels_of(ids))
    found = lookup(tmp_path, tasks=())
    assert found.columns == ()
    np.testing.assert_array_equal(ask(found, ids)[0], vectors_of(ids))
    with pytest.raises(LabelError, match="no tasks"):
        lookup(tmp_path, tasks=(), width=0)


def test_rows_without_a_representation_are_masked(tmp_path):
    ids = example_ids(200)
    null = np.random.default_rng(5).random(200) < 0.4
    store_lanes(tmp_path, labels_of(ids, null))
    values, mask = ask(lookup(tmp_path), ids)
    np.testing.assert_array_equal(mask, ~null)
    np.testing.assert_array_equal(values, np.where(null[:, None], 0, vectors_of(ids)))
    values, mask = ask(lookup(tmp_path), np.array([900_001, 900_002]), 200)
    assert not mask.any()
    assert not values.any()


def test_the_join_by_id_finds_them_too(tmp_path):
    ids = example_ids(200)
    store_lanes(tmp_path, labels_of(ids))
    moved = np.concatenate([[77_777_777], ids])
    values, mask = ask(lookup(tmp_path), moved[:150])
    assert mask.tolist() == [False] + [True] * 149
    np.testing.assert_array_equal(values[1:], vectors_of(moved[1:150]))
    assert not values[0].any()


def test_compacted_files_answer_alike(tmp_path):
    ids = [example_ids(150, lane) for lane in range(3)]
    null = np.arange(150) % 5 == 0
    store_lanes(tmp_path, labels_of(ids[0]), labels_of(ids[1], null), labels_of(ids[2]))
    store_lanes(tmp_path, labels_of(ids[0], stored=False), version="v2")
    DeltaTable(str(tmp_path / "labels")).optimize.compact()
    assert len(DeltaTable(str(tmp_path / "labels")).file_uris()) == 1
    for lane in (2, 0, 1):
        values, mask = ask(lookup(tmp_path), ids[lane], 0, lane)
        kept = ~null if lane == 1 else np.ones(150, bool)
        np.testing.assert_array_equal(mask, kept)
        np.testing.assert_array_equal(values, np.where(kept[:, None], vectors_of(ids[lane]), 0))
    with pytest.raises(LabelError, match=r"fm@v2 .* no representations are stored"):
        ask(lookup(tmp_path, "v2"), ids[0])


def test_what_was_not_stored_is_said(tmp_path):
    ids = example_ids(50)
    store_lanes(tmp_path, labels_of(ids, stored=False))
    assert lookup(tmp_path, width=0).rows(PERIOD, "impression", 0, 0, 50, ids)[1].all()
    with pytest.raises(
        LabelError, match="no representations are stored; set the teacher's 'store_representation: true"
    ):
        ask(lookup(tmp_path), ids)


def test_another_width_is_refused(tmp_path):
    ids = example_ids(50)
    store_lanes(tmp_path, labels_of(ids))
    with pytest.raises(LabelError, match="have width 4, not 8"):
        ask(lookup(tmp_path, width=8), ids)


def test_a_representation_that_is_not_finite_is_refused(tmp_path):
    ids = example_ids(50)
    for bad in (np.nan, np.inf):
        vectors = vectors_of(ids)
        vectors[17, 2] = bad
        with pytest.raises(LabelError, match="row 17: its representation is not finite"):
            store_lanes(tmp_path, labels_of(ids, vectors=vectors))
    vectors = vectors_of(ids)
    vectors[17, 2] = np.nan
    null = np.arange(50) == 3
    with pytest.raises(LabelError, match="row 17"):
        store_lanes(tmp_path, labels_of(ids, null, vectors))
    store_lanes(tmp_path, labels_of(ids, np.arange(50) == 17, vectors))  # what a null hides is not read


def test_pins_and_versions_hold_for_them(tmp_path):
    ids = example_ids(50)
    store = LabelStore(tmp_path, SQLiteMetadataStore(tmp_path / "meta.db"))
    store_lanes(tmp_path, labels_of(ids))
    pin = store.pin("fm", "v1", "student")
    store_lanes(tmp_path, labels_of(ids, vectors=vectors_of(ids) + 100), version="v2")
    np.testing.assert_array_equal(ask(lookup(tmp_path, "v2"), ids)[0], vectors_of(ids) + 100)
    expire(store, Retention(version="v1"), also_pinned=True)
    store.vacuum(retention_hours=0)
    found = LabelLookup(pin, "fm", "v1", (), WIDTH)
    np.testing.assert_array_equal(ask(pickle.loads(pickle.dumps(found)), ids)[0], vectors_of(ids))
    assert not ask(lookup(tmp_path, "v1"), ids)[1].any(), "expired in the newest table version"


def test_row_groups_with_representations_are_bounded_in_bytes(tmp_path, monkeypatch):
    monkeypatch.undo()
    ids = example_ids(5000)
    wide = np.ones((5000, 256), np.float32)
    monkeypatch.setattr(lane_file, "ROW_GROUP_BYTES", 2048 * 256 * 4)
    store_lanes(tmp_path, labels_of(ids, vectors=wide))
    (path,) = (tmp_path / "labels").rglob("*.parquet")
    metadata = pq.ParquetFile(path).metadata
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [2048, 2048, 904]
