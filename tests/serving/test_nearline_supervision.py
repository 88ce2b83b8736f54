"""Near-line labels as a student's supervision: bulk labels where they stand, near-line ones elsewhere."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from example_store import every_feature_schema, write_store

from rayfm.config import LabelError
from rayfm.data.encode import Encoder
from rayfm.data.reader import ArrowReader, RayDataReader
from rayfm.data.steps import ReadPlan
from rayfm.data.store import ExampleStore
from rayfm.labels.store import LabelStore
from rayfm.serving.labelling import StoredLabels
from rayfm.serving.nearline.labels import NearLineLabels
from rayfm.serving.nearline.tickets import new_ticket
from rayfm.training.spec import PinnedLabels

PERIODS = ("2024-01-01", "2024-01-02", "2024-01-03")
PERIOD, VERSION, OLDER = PERIODS[1], "2024-01-01-aaaaaaaa", "2023-12-31-bbbbbbbb"
LANES, TASKS = 2, ("click", "watch")
NEAR = np.float32(0.75)


def near_line(root: Path, ids, value: float = NEAR, version: str = VERSION, period: str = PERIOD, **tasks) -> int:
    """Commit near-line labels as the consumer does; the table's version."""
    count = len(ids)
    columns = {f"task_{task}": pa.array(tasks.get(task, [value] * count), pa.float32()) for task in TASKS}
    rows = pa.table(
        {
            "period": [period] * count,
            "version": [version] * count,
            "ticket": [new_ticket()] * count,
            "row": pa.array(range(count), pa.int64()),
            "example_id": pa.array(ids, pa.int64()),
            **columns,
        }
    )
    return NearLineLabels(root).append("fm", rows).table_version


def impressions(root: Path) -> None:
    """Bulk labels of the impressions alone: 0.25, but nothing said of the watch time of each lane's first row."""
    store = write_store(root, list(PERIODS), impressions=40, considerations=20, lanes=LANES)
    lanes = []
    for lane in range(LANES):
        ids = store.open_lane(PERIOD, "impression", lane).read()["example_id"]
        click = pa.array([0.25] * len(ids), pa.float32())
        watch = pa.array([None, *[0.25] * (len(ids) - 1)], pa.float32())
        lanes.append(("impression", lane, pa.table({"example_id": ids, "click": click, "watch": watch})))
    schema = every_feature_schema()
    LabelStore(root).label("fm", VERSION, PERIODS[0], PERIOD, lanes, [schema.task(task) for task in TASKS])


@pytest.fixture
def root(tmp_path):
    impressions(tmp_path)
    return tmp_path


def ids_of(root: Path, kind: str, lane: int, period: str = PERIOD) -> np.ndarray:
    return ExampleStore(root).open_lane(period, kind, lane).read()["example_id"].to_numpy()


def pinned(near: int | None, version: str = VERSION) -> PinnedLabels:
    return PinnedLabels(version=version, table_version=1, near_line=near)


def lookup(root: Path, near: int | None, tasks: tuple[str, ...] = TASKS):
    return StoredLabels(root, near_line=root).lookup("fm", pinned(near), tasks)


def read(root: Path, near: int | None, by_ray: bool = False) -> dict[int, tuple[list[float], list[bool]]]:
    """Example id -> (values, mask) of the supervision that a student's batches hold."""
    columns = tuple(f"fm/{task}" for task in TASKS)
    encoder = Encoder(every_feature_schema(), supervision=columns)
    plan = ReadPlan(
        ExampleStore(root), tuple(encoder.columns), 16, columns, (lookup(root, near),), consideration_share=1.0
    )
    found = {}
    reader = RayDataReader(plan, encoder, [PERIOD]) if by_ray else ArrowReader(plan, encoder)
    for batch in reader.batches(PERIOD):
        parts = [batch.supervised(column) for column in columns]
        for row, example in enumerate(batch.example_id.tolist()):
            found[example] = [float(v[row]) for v, _ in parts], [bool(m[row]) for _, m in parts]
    return found


def test_a_student_reads_bulk_labels_where_they_stand_and_near_line_ones_elsewhere(root):
    shown = {lane: ids_of(root, "impression", lane) for lane in range(LANES)}
    considered = ids_of(root, "consideration", 0)
    # Posted: two impressions, of which the first lacks a watch time in bulk, and three considerations.
    posted = [shown[0][0], shown[0][5], *considered[:3]]
    near = near_line(root, posted)
    found = read(root, near)
    assert len(found) == 60
    for lane, ids in shown.items():
        for row, example in enumerate(ids.tolist()):
            if (lane, row) == (0, 0):
                assert found[example] == ([0.25, 0.75], [True, True])
            elif row == 0:
                assert found[example] == ([0.25, 0.0], [True, False])
            else:
                assert found[example] == ([0.25, 0.25], [True, True]), "bulk labels stay"
    for lane in range(LANES):
        for example in ids_of(root, "consideration", lane).tolist():
            expected = ([0.75, 0.75], [True, True]) if example in posted else ([0.0, 0.0], [False, False])
            assert found[example] == expected


@pytest.mark.ray
def test_reading_tasks_fill_as_a_direct_reader_does(root, ray_session):
    near = near_line(root, ids_of(root, "consideration", 1)[2:6])
    direct = read(root, near)
    assert sum(all(mask) for _, mask in direct.values()) == 38 + 4
    assert read(root, near, by_ray=True) == direct


def test_without_it_nothing_changes(root):
    near_line(root, ids_of(root, "consideration", 0))
    plain = StoredLabels(root).lookup("fm", pinned(None), TASKS)
    assert type(lookup(root, None)) is type(plain)
    for kind in ("impression", "consideration"):
        ids = ids_of(root, kind, 1)
        values, mask = lookup(root, None).rows(PERIOD, kind, 1, 0, len(ids), ids)
        expected = plain.rows(PERIOD, kind, 1, 0, len(ids), ids)
        assert (values == expected[0]).all()
        assert (mask == expected[1]).all()
        assert mask.any() == (kind == "impression")


def test_only_the_same_teacher_version_of_the_same_period_fills(root):
    ids = ids_of(root, "consideration", 0)
    near_line(root, ids[:3], version=OLDER)
    near_line(root, ids[3:6], period=PERIODS[2])
    near = near_line(root, ids[6:8])
    _, mask = lookup(root, near).rows(PERIOD, "consideration", 0, 0, len(ids), ids)
    assert mask.all(axis=1).tolist() == [False] * 6 + [True] * 2 + [False] * (len(ids) - 8)
    assert (mask[:, 0] == mask[:, 1]).all()


def test_tasks_are_filled_one_by_one_in_the_order_asked(root):
    ids = ids_of(root, "consideration", 0)
    near = near_line(root, ids[:2], click=[0.5, None], watch=[None, 2.0])
    values, mask = lookup(root, near, ("watch", "click")).rows(PERIOD, "consideration", 0, 0, 2, ids[:2])
    assert values.tolist() == [[0.0, 0.5], [2.0, 0.0]]
    assert mask.tolist() == [[False, True], [True, False]]
    values, mask = lookup(root, near, ("click",)).rows(PERIOD, "consideration", 0, 0, 2, ids[:2])
    assert values.tolist() == [[0.5], [0.0]]


def test_a_pinned_table_version_says_the_same_for_ever(root):
    ids = ids_of(root, "consideration", 0)
    near = near_line(root, ids[:2], 0.5)
    before = lookup(root, near)
    first = before.rows(PERIOD, "consideration", 0, 0, len(ids), ids)
    near_line(root, ids[::-1], 0.125)  # more rows, and these two again
    NearLineLabels(root).compact("fm", PERIOD)
    for found in (before, lookup(root, near), pickle.loads(pickle.dumps(before))):
        again = found.rows(PERIOD, "consideration", 0, 0, len(ids), ids)
        assert (again[0] == first[0]).all()
        assert (again[1] == first[1]).all()
    newer, mask = lookup(root, near + 1).rows(PERIOD, "consideration", 0, 0, len(ids), ids)
    assert mask.all()
    assert newer[:, 0].tolist() == [0.5, 0.5] + [0.125] * (len(ids) - 2), "the first ticket's label is taken"


def test_a_period_is_read_once(root, monkeypatch):
    ids = ids_of(root, "consideration", 0)
    found = lookup(root, near_line(root, ids))
    calls = []
    real = NearLineLabels.of_period
    monkeypatch.setattr(NearLineLabels, "of_period", lambda self, *asked: calls.append(asked) or real(self, *asked))
    for start in range(0, 8, 2):
        _, mask = found.rows(PERIOD, "consideration", 0, start, start + 2, ids[start : start + 2])
        assert mask.all()
    shown = ids_of(root, "impression", 0)[1:5]
    found.rows(PERIOD, "impression", 0, 1, 5, shown)
    assert [asked[2] for asked in calls] == [PERIOD]


def test_a_task_that_the_teacher_did_not_predict_near_line(root):
    rows = pa.table(
        {
            "period": [PERIOD],
            "version": [VERSION],
            "ticket": [new_ticket()],
            "row": pa.array([0], pa.int64()),
            "example_id": pa.array([1], pa.int64()),
            "task_click": pa.array([0.5], pa.float32()),
        }
    )
    near = NearLineLabels(root).append("fm", rows).table_version
    ids = ids_of(root, "consideration", 0)[:2]
    with pytest.raises(LabelError, match="no labels of task 'watch'"):
        lookup(root, near).rows(PERIOD, "consideration", 0, 0, 2, ids)


def test_a_version_that_is_gone_is_named(root):
    with pytest.raises(LabelError, match="version 4 of the near-line labels, which the run recorded, is gone"):
        lookup(root, 4)
    near_line(root, [1])
    with pytest.raises(LabelError, match="near-line label table"):
        lookup(root, 4)
    with pytest.raises(LabelError, match=f"labels of fm@{VERSION} are filled from near-line ones; name their folder"):
        StoredLabels(root).lookup("fm", pinned(1), TASKS)


def test_what_is_pinned(root):
    labels = NearLineLabels(root)
    assert labels.pin("fm", PERIOD) is None, "nobody has posted yet"
    with pytest.raises(LabelError, match=r"no version 3 of near-line labels \(nothing was labelled near-line yet\)"):
        labels.pin("fm", PERIOD, 3)
    first = near_line(root, [1])
    second = near_line(root, [2])
    assert second > first
    assert labels.pin("fm", PERIOD) == second
    assert labels.pin("fm", PERIOD, first) == first
    with pytest.raises(LabelError, match=rf"no version {second + 1} of near-line labels \(the newest is {second}\)"):
        labels.pin("fm", PERIOD, second + 1)


@pytest.mark.parametrize(
    ("made", "asked", "wanted"), [("2024-01-02", "2024-01-02T05", "hour"), ("2024-01-02T05", "2024-01-02", "day")]
)
def test_periods_of_another_length_would_never_be_found(root, made, asked, wanted):
    near_line(root, [1], period=made)
    labels = NearLineLabels(root)
    with pytest.raises(LabelError, match=f"like {made}, not like {asked}; set 'period: {wanted}' where near-line"):
        labels.pin("fm", asked)
    assert labels.pin("other", asked) is not None
