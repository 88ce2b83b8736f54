"""Histories: decayed averages of a teacher's representations, by entity, before each period."""

from __future__ import annotations

import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from example_store import write_store

from rayfm.config import LabelError
from rayfm.data.store import ExampleStore
from rayfm.labels import LabelLookup, LabelStore, Retention, expire, history
from rayfm.labels.history import HistoryLookup, HistorySpec, HistoryState, HistoryStore
from rayfm.schema import Task
from rayfm.snapshots import SQLiteMetadataStore

PERIODS = ("2024-01-01", "2024-01-02", "2024-01-03")
WIDTH = 3
SPEC = HistorySpec("fm", "user", 0.5, None, WIDTH)


def represented(ids: np.ndarray) -> np.ndarray:
    return np.stack([ids % 5, ids % 7, -(ids % 3)], 1).astype(np.float32)


def as_dict(state: HistoryState) -> dict[object, tuple[float, list[float]]]:
    rows = zip(state.keys.to_pylist(), state.weight.tolist(), state.vector.tolist(), strict=True)
    return {key: (weight, vector) for key, weight, vector in rows}


def test_an_update_by_hand():
    state = HistoryState.empty(2, pa.int64())
    one = pa.array([7, 3, 7]), np.array([[1, 0], [5, 5], [3, 2]], np.float32)
    state = state.then(0.5, [one])
    assert as_dict(state) == {7: (2.0, [2.0, 1.0]), 3: (1.0, [5.0, 5.0])}
    # 7: weight 0.5 * 2 + 1 = 2, sum 0.5 * (4, 2) + (6, 1) = (8, 2). 3 is only decayed: its average stays. 9 is new.
    two = [(pa.array([7]), np.array([[6, 1]], np.float32)), (pa.array([9]), np.array([[1, 1]], np.float32))]
    state = state.then(0.5, two)
    assert as_dict(state) == {7: (2.0, [4.0, 1.0]), 3: (0.5, [5.0, 5.0]), 9: (1.0, [1.0, 1.0])}


def test_who_was_not_seen_for_long_is_forgotten():
    state = HistoryState.empty(1, pa.string()).then(0.5, [(pa.array(["a"]), np.ones((1, 1), np.float32))])
    for _ in range(9):
        state = state.then(0.5, [])
    assert as_dict(state) == {"a": (0.5**9, [1.0])}
    assert len(state.then(0.5, []).keys) == 0


def parts(count: int, rows: int, width: int):
    """Each of ``rows`` keys once a part: sums that float64 holds exactly, in any order."""
    for number in range(count):
        keys = np.random.default_rng(number).permutation(rows)
        yield pa.array(keys), np.repeat((keys % 7 + number)[:, None], width, 1).astype(np.float32)


def test_memory_does_not_grow_with_the_rows():
    empty, peaks = HistoryState.empty(32, pa.int64()), []
    for count in (12, 48):
        tracemalloc.start()
        state = empty.then(0.5, parts(count, 4096, 32))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert (state.weight == count).all()
        expected = (np.asarray(state.keys) % 7 + (count - 1) / 2).astype(np.float32)
        np.testing.assert_array_equal(state.vector, np.repeat(expected[:, None], 32, 1))
    assert peaks[1] < 1.2 * peaks[0]


def test_how_parts_are_gathered_changes_nothing(monkeypatch):
    """Also not the order of the keys, nor where the keys of a part are of another type than the state's."""
    before = HistoryState.empty(2, pa.string()).then(1.0, [(pa.array(["b", "9"]), np.ones((2, 2), np.float32))])
    rows = [(part.cast(pa.int32()), vectors) for part, vectors in parts(9, 50, 2)]
    found = []
    for values in (0, 150, 10**9):
        monkeypatch.setattr(history, "GATHERED_VALUES", values)
        found.append(before.then(0.5, rows))
    assert found[0].keys.to_pylist()[:2] == ["b", "9"]
    assert len(found[0].keys) == 51
    for other in found[1:]:
        assert other.keys.equals(found[0].keys)
        np.testing.assert_array_equal(other.weight, found[0].weight)
        np.testing.assert_array_equal(other.vector, found[0].vector)


@pytest.fixture
def stores(tmp_path: Path) -> tuple[Path, ExampleStore, dict[str, int]]:
    """Labels with representations of three periods; every eleventh row has none."""
    store = write_store(tmp_path / "data", list(PERIODS), impressions=300, considerations=60, lanes=2)
    labels, committed = LabelStore(tmp_path), {}
    for period in PERIODS:
        lanes = []
        for lane in range(2):
            ids = store.open_lane(period, "impression", lane).read(columns=["example_id"])["example_id"].to_numpy()
            vectors = pa.FixedSizeListArray.from_arrays(
                pa.array(represented(ids).reshape(-1)), WIDTH, mask=pa.array(ids % 11 == 0)
            )
            clicks = pa.array(np.full(len(ids), 0.5, np.float32))
            lanes.append(
                ("impression", lane, pa.table({"example_id": ids, "click": clicks, "representation": vectors}))
            )
        done = labels.label("fm", "v1", None, period, lanes, [Task(name="click")])
        committed[period] = done.table_version
    return tmp_path, store, committed


def by_hand(
    store: ExampleStore, periods: tuple[str, ...], decay: float, clicked: bool
) -> dict[int, tuple[float, list]]:
    """The same averages, row by row."""
    weight: dict[int, float] = {}
    total: dict[int, np.ndarray] = {}
    for period in periods:
        weight = {key: decay * value for key, value in weight.items()}
        total = {key: decay * value for key, value in total.items()}
        for lane in range(2):
            for row in store.open_lane(period, "impression", lane).read().to_pylist():
                if row["example_id"] % 11 == 0 or row["user"] is None or (clicked and not row["click"]):
                    continue
                vector = represented(np.array([row["example_id"]]))[0].astype(np.float64)
                weight[row["user"]] = weight.get(row["user"], 0.0) + 1
                total[row["user"]] = total.get(row["user"], 0.0) + vector
    return {key: (weight[key], list(total[key] / weight[key])) for key in weight}


@pytest.mark.parametrize("clicked", [False, True])
def test_each_period_sees_the_periods_before_it(stores, clicked: bool):
    root, store, committed = stores
    spec = HistorySpec("fm", "user", 0.5, "click" if clicked else None, WIDTH)
    histories = HistoryStore(root)
    before = None
    for index, period in enumerate(PERIODS):
        histories.advance(spec, store, period, before)
        found = as_dict(histories.read(spec, period))
        expected = by_hand(store, PERIODS[:index], 0.5, clicked)
        assert found.keys() == expected.keys()
        assert bool(found) == bool(index)
        for key, (weight, vector) in expected.items():
            assert found[key][0] == pytest.approx(weight)
            np.testing.assert_allclose(found[key][1], vector, rtol=1e-6, atol=1e-6)
        before = (period, "v1", committed[period])
    path = root / "histories" / histories.path(spec, PERIODS[2])
    written = path.read_bytes(), path.stat().st_mtime_ns
    histories.advance(spec, store, PERIODS[2], before)  # done already
    assert (path.read_bytes(), path.stat().st_mtime_ns) == written
    path.unlink()
    histories.advance(spec, store, PERIODS[2], (PERIODS[1], "v1", committed[PERIODS[1]]))
    assert path.read_bytes() == written[0]


def test_labels_are_pinned_while_they_are_read(stores, monkeypatch):
    """An update that begins before a newer version supersedes the labels, and a vacuum that comes in its midst."""
    root, store, committed = stores
    guarded = LabelStore(root, SQLiteMetadataStore(root / "meta.db"))
    histories, read, deleted = HistoryStore(root, guarded.metadata), LabelLookup.vectors, []

    def vectors(lookup: LabelLookup, *place):
        if not deleted:
            expire(guarded, Retention(version="v1"), also_pinned=True)
            deleted.append(len(guarded.vacuum(retention_hours=0)))
        return read(lookup, *place)

    monkeypatch.setattr(LabelLookup, "vectors", vectors)
    before = PERIODS[0], "v1", committed[PERIODS[2]]
    histories.advance(SPEC, store, PERIODS[0], None)
    histories.advance(SPEC, store, PERIODS[1], before)
    assert len(histories.read(SPEC, PERIODS[1]).keys) > 0
    assert deleted == [0]
    assert list(guarded.metadata.leases("labels/pins/")) == []
    assert len(guarded.vacuum(retention_hours=0)) == 2 * len(PERIODS)
    with pytest.raises(LabelError, match=f"version {before[2]} of the label table is vacuumed"):
        histories.advance(SPEC, store, PERIODS[2], (PERIODS[1], "v1", before[2]))


def test_a_lookup_by_place(stores):
    root, store, committed = stores
    histories = HistoryStore(root)
    histories.advance(SPEC, store, PERIODS[0], None)
    histories.advance(SPEC, store, PERIODS[1], (PERIODS[0], "v1", committed[PERIODS[0]]))
    state = as_dict(histories.read(SPEC, PERIODS[1]))
    lookup = pickle.loads(pickle.dumps(HistoryLookup(root, SPEC, store, PERIODS[1])))
    assert (lookup.name, lookup.width) == ("history/fm/user", WIDTH)
    seen = 0
    for kind in ("impression", "consideration"):
        for lane in range(2):
            table = store.open_lane(PERIODS[1], kind, lane).read(columns=["example_id", "user"])
            ids, users = table["example_id"].to_numpy(), table["user"].to_pylist()
            for start, stop in ((0, len(ids)), (3, 9), (4, 4)):
                values, mask = lookup.vectors(PERIODS[1], kind, lane, start, stop, ids[start:stop])
                assert mask.tolist() == [user in state for user in users[start:stop]]
                for value, user in zip(values, users[start:stop], strict=True):
                    np.testing.assert_allclose(value, state[user][1] if user in state else [0] * WIDTH, rtol=1e-6)
                seen += int(mask.sum())
    assert seen
    with pytest.raises(LabelError, match=f"the state is the one before {PERIODS[1]}, the rows are of {PERIODS[2]}"):
        lookup.vectors(PERIODS[2], "impression", 0, 0, 1, np.zeros(1, np.int64))


def test_what_is_not_there_or_another_is_refused(stores):
    root, store, committed = stores
    histories = HistoryStore(root)
    with pytest.raises(LabelError, match="no history before this period; label the periods in order"):
        histories.advance(SPEC, store, PERIODS[2], (PERIODS[1], "v1", committed[PERIODS[1]]))
    histories.advance(SPEC, store, PERIODS[0], None)
    with pytest.raises(LabelError, match=r"made with decay 0\.5, asked with 0\.9; start a new run"):
        histories.read(HistorySpec("fm", "user", 0.9, None, WIDTH), PERIODS[0])
    (root / "histories" / histories.path(SPEC, PERIODS[0])).write_bytes(b"PAR1")
    with pytest.raises(LabelError, match="corrupt history"):
        histories.read(SPEC, PERIODS[0])
