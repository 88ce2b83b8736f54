"""Scoring in the window: each example once for all students, each student its own part."""

from __future__ import annotations

import datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from counting_teacher import DAY, VERSION, CountingTeacher
from example_store import DAY_US

from rayfm.augment.shared import SharedDataset
from rayfm.augment.views import ViewConfig, with_clusters
from rayfm.augment.window import ScoringTeacher, label_window
from rayfm.config import DataError, LabelError
from rayfm.data.sources.base import Period
from rayfm.schema import Schema

SCHEMA = Schema.model_validate(
    {
        "tables": {"item": {"rows": 100}},
        "features": [
            {"name": "price", "kind": "dense"},
            {"name": "item", "kind": "sparse"},
            {"name": "tags", "kind": "weighted", "table": "item"},
        ],
        "tasks": [{"name": "click"}, {"name": "buy"}],
        "traffics": ["feed", "search", "video"],
    }
)


def period_of(day: int) -> Period:
    start = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(days=day - 1)
    return Period(name=start.strftime("%Y-%m-%d"), start=start, end=start + datetime.timedelta(days=1))


def teacher(handle: CountingTeacher, **changes) -> ScoringTeacher:
    known = {
        "name": "large", "version": VERSION, "trained_through": "2024-01-01", "example_schema": SCHEMA,
        "features": ("price", "tags"), "tasks": ("click", "buy"), "handle": handle,
    }  # fmt: skip
    return ScoringTeacher(**(known | changes))


def examples(rows: int = 400, seed: int = 0) -> pa.Table:
    """Rows of 2024-01-02 in three traffics and two stages, a tenth of them considerations."""
    rng = np.random.default_rng(seed)
    kind = np.where(rng.random(rows) < 0.1, "consideration", "impression")
    offsets = np.arange(rows + 1, dtype=np.int32)
    label = pa.array((rng.random(rows) < 0.3).astype(np.float32), mask=kind == "consideration")
    return pa.table(
        {
            "example_id": pa.array(rng.permutation(rows * 10)[:rows]),
            "time": pa.array(DAY + rng.integers(0, DAY_US, rows)),
            "traffic": rng.choice(["feed", "search", "video"], rows).tolist(),
            "kind": kind.tolist(),
            "stage_reached": rng.choice(["ranking", "early"], rows).tolist(),
            "price": pa.array(rng.random(rows)),  # float64: the store's type is float32
            "item": pa.array(rng.integers(0, 50, rows).astype(np.int32)),
            "tags": pa.ListArray.from_arrays(offsets, pa.array(rng.integers(0, 50, rows))),
            "tags__weights": pa.ListArray.from_arrays(offsets, pa.array(rng.random(rows, dtype=np.float32))),
            "click": label,
            "buy": label,
            "request_id": pa.array(np.arange(rows)),
        }
    )


STUDENTS = {
    "feed": ViewConfig(teacher="large", traffics=("feed",), features=("price", "item"), tasks=("click",)),
    "two": ViewConfig(teacher="large", traffics=("feed", "search"), kinds=("impression", "consideration")),
    "early": ViewConfig(teacher="large", stages=("early",), traffics=("feed", "search"), features=("tags",)),
    "another": ViewConfig(teacher="small"),
}


def view_of(shared: SharedDataset, table: pa.Table, student: str) -> pa.Table:
    return shared.view(table, student, STUDENTS[student], SCHEMA)


def test_an_example_is_scored_once_for_all_students():
    handle, table = CountingTeacher(), examples()
    window = label_window(table, teacher(handle), period_of(2), STUDENTS, rows_per_request=100)
    wanted = {row["example_id"] for row in table.to_pylist() if row["traffic"] != "video"}
    assert set(handle.asked) == wanted
    assert set(handle.asked.values()) == {1}, "three students want most of these"
    assert max(handle.sizes) == 100
    assert handle.columns == {"example_id", "traffic", "price", "tags", "tags__weights"}
    assert window.unwanted == 400 - len(wanted)
    shared = window.shared
    assert set(shared["example_id"].to_pylist()) == wanted
    ids = shared["example_id"].to_numpy()
    np.testing.assert_array_equal(shared["logged/large/click"].to_numpy(), (ids % 97 / 97).astype(np.float32))
    np.testing.assert_array_equal(shared["logged/large/buy"].to_numpy(), (ids % 89 / 89).astype(np.float32))
    assert set(shared["version/large"].to_pylist()) == {VERSION}
    assert shared.schema.field("price").type == pa.float32(), "the example store's types"


def test_a_student_sees_its_own_rows_and_columns(tmp_path):
    table = examples()
    shared = label_window(table, teacher(CountingTeacher()), period_of(2), STUDENTS).shared
    rows = table.to_pylist()
    found = {name: view_of(SharedDataset(tmp_path, "large"), shared, name) for name in ("feed", "two", "early")}
    assert found["feed"].column_names == [
        "example_id", "time", "kind", "traffic", "stage_reached", "price", "item", "click", "logged/large/click",
        "version/large",
    ]  # fmt: skip
    assert set(found["early"].column_names) - set(found["feed"].column_names) == {
        "tags", "tags__weights", "buy", "logged/large/buy",
    }  # fmt: skip
    wanted = {
        "feed": [r for r in rows if r["traffic"] == "feed" and r["kind"] == "impression"],
        "two": [r for r in rows if r["traffic"] != "video"],
        "early": [
            r for r in rows
            if r["traffic"] != "video" and r["stage_reached"] == "early" and r["kind"] == "impression"
        ],
    }  # fmt: skip
    for name, part in wanted.items():
        assert sorted(found[name]["example_id"].to_pylist()) == sorted(row["example_id"] for row in part)
        prices = {row["example_id"]: row["click"] for row in part}
        for row in found[name].to_pylist():
            assert row["click"] == prices[row["example_id"]]


def test_a_view_copies_nothing(tmp_path):
    shared = label_window(examples(), teacher(CountingTeacher()), period_of(2), STUDENTS).shared

    def buffers(table: pa.Table, name: str) -> set[tuple[int, int]]:
        return {(b.address, b.size) for chunk in table[name].chunks for b in chunk.buffers() if b is not None}

    view = view_of(SharedDataset(tmp_path, "large"), shared, "early")
    assert 0 < view.num_rows < shared.num_rows
    assert view["price" if "price" in view.column_names else "tags"].num_chunks <= 5, "one slice a run of rows"
    for name in view.column_names:
        assert buffers(view, name) <= buffers(shared, name), name


def test_rows_of_a_run_are_in_time_order():
    table = with_clusters(examples())
    runs = {}
    for row in table.to_pylist():
        runs.setdefault((row["kind"], row["traffic"], row["stage_reached"]), []).append(row["time"])
    assert len(runs) == 12
    assert all(times == sorted(times) for times in runs.values())
    assert table.column("kind").num_chunks == 1
    changes = sum(
        one != other
        for one, other in zip(
            zip(*(table[name].to_pylist()[1:] for name in ("kind", "traffic", "stage_reached")), strict=True),
            zip(*(table[name].to_pylist()[:-1] for name in ("kind", "traffic", "stage_reached")), strict=True),
            strict=True,
        )
    )
    assert changes == 11


@pytest.mark.parametrize(
    ("trained", "period", "leaks"),
    [
        ("2024-01-01", "2024-01-02", False),
        ("2024-01-02", "2024-01-02", True),
        ("2024-01-03", "2024-01-02", True),
        ("2024-01-02", "2024-01-02T05", True),
        ("2024-01-01", "2024-01-02T05", False),
        ("2024-01-02T04", "2024-01-02T05", False),
        ("2024-01-02T05", "2024-01-02T05", True),
        ("2024-01-02T05", "2024-01-02", True),
        (None, "2024-01-02", False),
    ],
)
def test_a_teacher_that_saw_the_period_scores_nothing(trained, period, leaks):
    handle = CountingTeacher()
    scoring = teacher(handle, trained_through=trained)
    span = period_of(2).model_copy(update={"name": period})
    if leaks:
        with pytest.raises(LabelError, match=f"leak: large@{VERSION} was trained through {trained}"):
            label_window(examples(), scoring, span, STUDENTS)
        assert not handle.asked
    else:
        assert label_window(examples(), scoring, span, STUDENTS).shared.num_rows


def test_answers_that_are_no_supervision():
    with pytest.raises(LabelError, match=f"asked large@{VERSION}, the service answered with another"):
        label_window(examples(), teacher(CountingTeacher("another")), period_of(2), STUDENTS)
    with pytest.raises(LabelError, match=f"large@{VERSION} has no labels of task 'bui'; did you mean 'buy'"):
        label_window(examples(), teacher(CountingTeacher(), tasks=("bui",)), period_of(2), STUDENTS)

    class Short(CountingTeacher):
        def remote(self, table, version):
            return super().remote(table.slice(1), version)

    with pytest.raises(LabelError, match="rows were asked and"):
        label_window(examples(), teacher(Short()), period_of(2), STUDENTS)
    with pytest.raises(DataError, match="no student takes teacher 'huge'"):
        label_window(examples(), teacher(CountingTeacher(), name="huge"), period_of(2), STUDENTS)
    with pytest.raises(DataError, match="lack column 'price'"):
        label_window(examples().drop_columns("price"), teacher(CountingTeacher()), period_of(2), STUDENTS)
    with pytest.raises(DataError, match="a view chooses by 'stage_reached', which the examples lack"):
        label_window(examples().drop_columns("stage_reached"), teacher(CountingTeacher()), period_of(2), STUDENTS)


def test_rows_that_no_store_would_take_are_rejected_not_scored():
    table = examples(20)
    bad = table.slice(0, 2).set_column(5, "price", pa.array([float("nan"), 1.0]))
    bad = bad.set_column(2, "traffic", pa.array(["feed", "lift"]))
    outside = table.slice(3, 1).set_column(1, "time", pa.array([DAY + DAY_US]))
    rows = pa.concat_tables([table.slice(2), bad, outside, table.slice(4, 1)])
    handle = CountingTeacher()
    every = {"all": ViewConfig(teacher="large", kinds=("impression", "consideration"))}
    window = label_window(rows, teacher(handle), period_of(2), every)
    assert sorted(window.rejected["reason"].to_pylist()) == [
        "dense 'price' is not finite", "example_id twice in its period", "time outside every period",
        "unknown traffic",
    ]  # fmt: skip
    assert window.shared.num_rows == 18
    assert set(handle.asked.values()) == {1}


def test_examples_of_one_traffic_without_kind_and_tasks():
    schema = Schema.model_validate(SCHEMA.dump() | {"traffics": ["all"]})
    rows = examples(10).drop_columns(["traffic", "kind", "buy"])
    window = label_window(
        rows, teacher(CountingTeacher(), example_schema=schema), period_of(2), {"all": ViewConfig(teacher="large")}
    )
    assert window.shared.num_rows == 10
    assert window.shared["buy"].null_count == 10
    assert set(window.shared["kind"].to_pylist()) == {"impression"}
    assert set(window.shared["traffic"].to_pylist()) == {"all"}


def test_what_is_scored_stays_scored(tmp_path):
    """A labeller that dies goes on with what is left; nothing is scored twice, or by two processes at once."""
    folder = tmp_path / "examples" / "period=2024-01-02"
    folder.mkdir(parents=True)
    table = examples(300)
    for number in range(3):
        pq.write_table(table.slice(number * 100, 100), folder / f"batch-{number:08d}.parquet")
    shared, handle = SharedDataset(tmp_path, "large"), CountingTeacher()
    handle.fail_at = 2

    def label_all() -> list[int]:
        with shared.lock():
            return [
                shared.label(period_of(2), file, teacher(handle), STUDENTS)["scored"] for _, file in shared.waiting()
            ]

    with pytest.raises(LabelError, match="the service is gone"):
        label_all()
    assert [file for _, file in shared.waiting()] == ["batch-00000001.parquet", "batch-00000002.parquet"]
    handle.fail_at = 0
    assert len(label_all()) == 2
    assert label_all() == []
    assert set(handle.asked.values()) == {1}
    assert shared.periods() == ["2024-01-02"]
    whole = shared.table("2024-01-02")
    assert set(whole["example_id"].to_pylist()) == set(handle.asked)
    assert view_of(shared, whole, "feed")["item"].num_chunks <= 4
    with shared.lock(), pytest.raises(DataError, match="another process scores for teacher 'large'"), shared.lock():
        pass
    with pytest.raises(DataError, match="nothing of period 2024-01-03 is scored"):
        shared.table("2024-01-03")


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (ViewConfig(teacher="small"), "no supervision of teacher 'small'"),
        (ViewConfig(teacher="large", features=("prize",)), "no feature 'prize'; did you mean 'price'"),
        (ViewConfig(teacher="large", tasks=("bui",)), "no label and supervision of task 'bui'; did you mean 'buy'"),
    ],
)
def test_views_of_what_is_not_there(tmp_path, view, message):
    shared = label_window(examples(50), teacher(CountingTeacher()), period_of(2), STUDENTS).shared
    with pytest.raises(DataError, match=message):
        SharedDataset(tmp_path, "large").view(shared, "mine", view, SCHEMA)


# From logs to views, with a teacher that is really published.
