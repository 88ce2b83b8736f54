from __future__ import annotations

import contextlib
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import processes
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from stored_lanes import LANES, PERIOD, ROWS, TASKS, all_lanes, check_complete, lane_labels, run_job, take_out, write

from rayfm.config import LabelError
from rayfm.labels import LabelLookup, LabelStore, Retention, expire, pins
from rayfm.labels.pins import floor, settle_floor, take
from rayfm.schema import Task
from rayfm.snapshots import LeaseLost, SQLiteMetadataStore, open_metadata


@pytest.fixture
def guarded(tmp_path) -> LabelStore:
    return LabelStore(tmp_path, SQLiteMetadataStore(tmp_path / "meta.db"))


def test_a_job_run_twice_doubles_nothing(tmp_path):
    first, second = run_job(tmp_path), run_job(tmp_path)
    assert (first.added, first.skipped) == (2 * LANES, 0)
    assert (second.added, second.skipped) == (0, 2 * LANES)
    assert second.table_version == first.table_version
    check_complete(tmp_path)


def test_the_same_records_committed_twice_double_nothing(tmp_path):
    store = LabelStore(tmp_path)
    records = [write(tmp_path, lane) for lane in range(LANES)]
    assert store.labelled_lanes("fm", "2022-04-25-aa", PERIOD) == set()
    assert store.commit(records[:1]).added == 1
    assert store.labelled_lanes("fm", "2022-04-25-aa", PERIOD) == {("impression", 0)}
    assert store.labelled_lanes("fm", "other", PERIOD) == set()
    again = store.commit(records)
    assert (again.added, again.skipped) == (2, 1)
    assert sum(part.rows for part in store.list()) == LANES * ROWS


def test_records_travel_as_plain_values(tmp_path):
    record = write(tmp_path)
    assert type(record).model_validate_json(record.model_dump_json()) == record
    assert pickle.loads(pickle.dumps(record)) == record
    assert (record.rows, record.labelled) == (ROWS, ROWS)


def test_a_counted_batch_is_skipped_once_reached(tmp_path):
    store = LabelStore(tmp_path)
    assert store.commit([write(tmp_path, 0)], app_id="job", app_version=1).added == 1
    assert store.commit([write(tmp_path, 1)], app_id="job", app_version=1).added == 0
    assert store.commit([write(tmp_path, 1)], app_id="job", app_version=2).added == 1
    assert store.commit([], app_id="job", app_version=3).added == 0
    assert DeltaTable(str(tmp_path / "labels")).transaction_version("job") == 3


def race(root: Path, version: str, start, results) -> None:
    store = LabelStore(root)
    records = [
        write(root, lane, labels, kind=kind, version=version, period=PERIOD) for kind, lane, labels in all_lanes()
    ]
    start.wait()
    # Lane by lane, so that the two jobs meet often.
    results.put(sum(store.commit([record]).added for record in records))


def test_two_jobs_racing_commit_each_lane_once(tmp_path):
    start, results = processes.context().Barrier(2), processes.context().Queue()
    racers = [
        processes.context().Process(target=race, args=(tmp_path, "2022-04-25-aa", start, results)) for _ in range(2)
    ]
    for racer in racers:
        racer.start()
    added = [results.get(timeout=120) for _ in racers]
    for racer in racers:
        racer.join(60)
        assert racer.exitcode == 0
    assert sum(added) == 2 * LANES
    check_complete(tmp_path)


def test_jobs_of_different_versions_racing_lose_nothing(tmp_path):
    threads = [threading.Thread(target=run_job, args=(tmp_path, f"2022-04-25-{i}")) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert LabelStore(tmp_path).versions("fm") == [f"2022-04-25-{i}" for i in range(4)]
    for i in range(4):
        check_complete(tmp_path, f"2022-04-25-{i}")


@pytest.mark.parametrize("committed", [0, 2])
def test_a_job_killed_between_files_and_commit_is_completed_by_its_rerun(tmp_path, committed):
    code = f"""
        import os, signal, sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from stored_lanes import all_lanes, write
        from rayfm.labels import LabelStore
        root = Path({str(tmp_path)!r})
        records = [write(root, lane, labels, kind=kind) for kind, lane, labels in all_lanes()]
        if {committed}:
            LabelStore(root).commit(records[:{committed}])
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=120)
    assert done.returncode == -signal.SIGKILL
    store = LabelStore(tmp_path)
    written = list((tmp_path / "labels").rglob("*.parquet"))
    assert len(written) == 2 * LANES
    assert sum(part.rows for part in store.list()) == committed * ROWS, "files without a commit are invisible"
    assert run_job(tmp_path).added == 2 * LANES - committed
    check_complete(tmp_path)


@pytest.mark.parametrize("trained_through", [PERIOD, "2022-04-27", "2023-01-01"])
def test_a_teacher_that_saw_the_period_is_refused(tmp_path, trained_through):
    complaint = rf"leak: fm@2022-04-25-aa was trained through {trained_through}.*{PERIOD}"
    with pytest.raises(LabelError, match=complaint):
        write(tmp_path, trained_through=trained_through)
    with pytest.raises(LabelError, match=complaint):
        LabelStore(tmp_path).label("fm", "2022-04-25-aa", trained_through, PERIOD, all_lanes(), TASKS)
    forged = write(tmp_path).model_copy(update={"trained_through": trained_through})
    with pytest.raises(LabelError, match=complaint):
        LabelStore(tmp_path).commit([forged])
    assert LabelStore(tmp_path).list() == []


@pytest.mark.parametrize(
    ("trained_through", "period", "leaks"),
    [
        ("2022-04-25", "2022-04-25T00", True),
        ("2022-04-25", "2022-04-25T23", True),
        ("2022-04-25", "2022-04-26T00", False),
        ("2022-04-25", "2022-04-24T23", True),
        ("2022-04-25T05", "2022-04-25", True),  # some of the day's hours
        ("2022-04-25T23", "2022-04-26", False),
        ("2022-04-25T23", "2022-04-24", True),
        ("2022-04-25T05", "2022-04-25T05", True),
        ("2022-04-25T05", "2022-04-25T06", False),
        (None, "2022-04-25", False),
    ],
)
def test_days_and_hours_are_compared_by_what_they_share(tmp_path, trained_through, period, leaks):
    if not leaks:
        write(tmp_path, trained_through=trained_through, period=period)
        return
    with pytest.raises(LabelError, match=f"was trained through {trained_through} and must not label period {period}"):
        write(tmp_path, trained_through=trained_through, period=period)


def test_a_teacher_that_saw_nothing_or_less_may_label(tmp_path):
    for lane, seen in enumerate((None, "2022-04-25", "2022-04-25T23")):
        assert LabelStore(tmp_path).commit([write(tmp_path, lane, trained_through=seen)]).added == 1


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"click": [0.5, float("nan"), 0.5]}, r"row 1 \(example 11\), task 'click': prediction nan is not a probab"),
        ({"click": [0.5, 0.5, 1.0001]}, "row 2 .*1.0001"),
        ({"click": [-0.1, 0.5, 2.0]}, r"row 0 .*-0\.1.*2 such rows"),
        ({"watch_time": [0.0, float("inf"), 1.0]}, "row 1 .*'watch_time': prediction inf is not finite"),
        ({"click": ["a", "b", "c"]}, "'click' is string"),
        ({"click": None}, "column 'click' is missing"),
        ({"example_id": None}, "column 'example_id' is missing"),
        ({"example_id": [1, None, 3]}, "'example_id' is int64; it must be int64 without nulls"),
        ({"row": [0, 1, 1]}, "row 1 stands twice"),
        ({"row": [-1, 1, 2]}, "row -1 is negative"),
        ({"representation": [1.0, 2.0, 3.0]}, "'representation' is double"),
    ],
)
def test_bad_predictions_are_refused(tmp_path, change, complaint):
    columns = {"example_id": [1, 11, 21], "click": [0.1, 0.2, 0.3], "watch_time": [1.0, -2.0, 3.0]} | change
    labels = pa.table({name: values for name, values in columns.items() if values is not None})
    with pytest.raises(LabelError, match=complaint):
        write(tmp_path, labels=labels)
    assert list((tmp_path / "labels").rglob("*.parquet")) == []


@pytest.mark.parametrize("name", ["../fm", "a/b", "", "x'; DROP", "a\n"])
def test_names_cannot_leave_their_folder(tmp_path, name):
    for what in ("teacher", "version", "period"):
        with pytest.raises(LabelError, match="use letters"):
            write(tmp_path, **{what: name})


def test_a_missing_or_changed_data_file_is_noticed_at_commit(tmp_path):
    record = write(tmp_path)
    (tmp_path / "labels" / record.path).write_bytes(b"short")
    with pytest.raises(LabelError, match="not what a worker wrote"):
        LabelStore(tmp_path).commit([record])


def test_two_records_of_one_lane_in_a_commit_are_refused(tmp_path):
    with pytest.raises(LabelError, match="two records"):
        LabelStore(tmp_path).commit([write(tmp_path), write(tmp_path)])
    with pytest.raises(LabelError, match="one teacher"):
        LabelStore(tmp_path).commit([write(tmp_path), write(tmp_path, teacher="other")])


@pytest.mark.parametrize(
    ("table", "partitions", "complaint"),
    [
        (pa.table({"x": [1]}), None, "column 'teacher' is missing"),
        ("lane", None, "column 'lane' is string, not int32"),
        ("extra", None, "unknown column 'extra'"),
        ("task_click", None, "column 'task_click' is double, not float"),
        ("fine", ["teacher"], r"partitioned by \['teacher'\]"),
    ],
)
def test_a_foreign_table_is_refused(tmp_path, table, partitions, complaint):
    if isinstance(table, str):
        columns = {
            "teacher": pa.array(["fm"]),
            "period": pa.array([PERIOD]),
            "version": pa.array(["v"]),
            "kind": pa.array(["impression"]),
            "lane": pa.array([0], pa.int32()),
            "row": pa.array([0], pa.int64()),
            "example_id": pa.array([0], pa.int64()),
            "representation": pa.array([[0.0]], pa.list_(pa.float32())),
        }
        columns |= {"lane": pa.array(["0"])} if table == "lane" else {}
        columns |= {table: pa.array([1.0])} if table in ("extra", "task_click") else {}
        table = pa.table(columns)
    write_deltalake(str(tmp_path / "labels"), table, partition_by=partitions)
    store = LabelStore(tmp_path)
    before = DeltaTable(str(tmp_path / "labels")).version()
    for use in (
        lambda: store.commit([write(tmp_path)]),
        lambda: store.list(),
        lambda: store.pin("fm", "v", "me"),
        lambda: LabelLookup((tmp_path, None), "fm", "v", ("click",)),
    ):
        with pytest.raises(LabelError, match=complaint):
            use()
    assert DeltaTable(str(tmp_path / "labels")).version() == before


def test_a_later_teacher_may_bring_new_tasks(tmp_path):
    store = LabelStore(tmp_path)
    store.commit([write(tmp_path)])
    labels = lane_labels(0).append_column("like", pa.array(np.full(ROWS, 0.25)))
    store.commit([write(tmp_path, labels=labels, teacher="big", tasks=(*TASKS, Task(name="like")))])
    assert set(store.tasks()) == {"click", "watch_time", "like"}
    ids = labels["example_id"].to_numpy()
    values, mask = LabelLookup((tmp_path, None), "big", "2022-04-25-aa", ("like",)).rows(
        PERIOD, "impression", 0, 0, ROWS, ids
    )
    assert mask.all()
    assert (values == 0.25).all()
    totals = {"impression": ROWS}
    assert store.coverage("fm", "2022-04-25-aa", PERIOD, totals) == {"impression": 1.0}
    assert store.coverage("fm", "2022-04-25-aa", PERIOD, totals, tasks=("like",)) == {"impression": 0.0}
    assert store.coverage("big", "2022-04-25-aa", PERIOD, totals, tasks=("like", "click")) == {"impression": 1.0}
    with pytest.raises(LabelError, match=r"'like'.*there are: click, watch_time"):
        LabelLookup((tmp_path, None), "fm", "2022-04-25-aa", ("like",)).rows(PERIOD, "impression", 0, 0, ROWS, ids)


def test_coverage_counts_predictions_and_nothing_else(tmp_path):
    store = LabelStore(tmp_path)
    totals = {"impression": 2 * ROWS, "consideration": 0}
    assert store.coverage("fm", "2022-04-25-aa", PERIOD, totals) == {"impression": 0.0, "consideration": 1.0}
    some = lane_labels(1).to_pandas()
    some.loc[some.index % 4 == 0, "click"] = None
    some.loc[some.index % 8 == 0, "watch_time"] = None
    some = pa.Table.from_pandas(some, preserve_index=False)
    record = write(tmp_path, 1, some)
    assert record.labelled == ROWS * 7 // 8
    store.commit([write(tmp_path, 0), record])
    store.commit([write(tmp_path, 0, period="2022-04-27"), write(tmp_path, 2, version="other")])
    assert store.coverage("fm", "2022-04-25-aa", PERIOD, totals)["impression"] == (1 + 7 / 8) / 2
    assert store.coverage("fm", "2022-04-25-aa", PERIOD, totals, ("click",))["impression"] == (1 + 3 / 4) / 2
    assert store.coverage("fm", "2022-04-25-aa", PERIOD, totals, ("click", "watch_time"))["impression"] == 1.75 / 2
    with pytest.raises(LabelError, match="did you mean 'click'"):
        store.coverage("fm", "2022-04-25-aa", PERIOD, totals, ("clik",))
    assert store.versions("fm") == ["2022-04-25-aa", "other"]
    assert store.versions("fm", "2022-04-27") == ["2022-04-25-aa"]
    assert [(part.version, part.lane, part.labelled) for part in store.list("fm", PERIOD)] == [
        ("2022-04-25-aa", 0, ROWS),
        ("2022-04-25-aa", 1, ROWS * 7 // 8),
        ("other", 2, ROWS),
    ]


def test_an_empty_lane_is_labelled_too(tmp_path):
    store = LabelStore(tmp_path)
    assert store.commit([write(tmp_path, 0, lane_labels(0, 0))]).added == 1
    assert store.commit([write(tmp_path, 0, lane_labels(0, 0))]).added == 0
    assert store.coverage("fm", "2022-04-25-aa", PERIOD, {"impression": 10}) == {"impression": 0.0}
    values, mask = LabelLookup((tmp_path, None), "fm", "2022-04-25-aa", ("click",)).rows(
        PERIOD, "impression", 0, 0, 2, np.array([1, 2])
    )
    assert values.shape == (2, 1)
    assert not mask.any()


def test_pins_hold_back_vacuum(guarded):
    root = Path(guarded.root)
    run_job(root)
    pin = guarded.pin("fm", "2022-04-25-aa", "student", ttl_s=60.0)
    assert take_out(guarded, "2022-04-25-aa") == 2 * LANES * ROWS
    assert guarded.list() == []
    assert guarded.vacuum(retention_hours=0) == []
    lookup = LabelLookup(pin, "fm", "2022-04-25-aa", ("click",))
    ids = lane_labels(1)["example_id"].to_numpy()
    assert lookup.rows(PERIOD, "impression", 1, 0, ROWS, ids)[1].all(), "the pinned version still has its labels"
    guarded.release(guarded.extend(pin, 30.0))
    assert len(guarded.vacuum(retention_hours=0)) == 2 * LANES
    assert list((root / "labels").rglob("*.parquet")) == []
    with pytest.raises(LabelError, match="is vacuumed"):
        guarded.pin("fm", "2022-04-25-aa", "late", table_version=pin.table_version)
    with pytest.raises(LeaseLost):
        guarded.extend(pin)


def test_pins_in_zookeeper_hold_back_vacuum_and_expiry(tmp_path, zookeeper_server):
    with contextlib.closing(open_metadata(f"zookeeper://{zookeeper_server.address}/labels/pins")) as metadata:
        store = LabelStore(tmp_path, metadata)
        run_job(tmp_path)
        pin = store.pin("fm", "2022-04-25-aa", "student", ttl_s=60.0)
        (kept,) = expire(store, Retention(version="2022-04-25-aa"))
        assert kept.kept_for == ("student",)
        take_out(store, "2022-04-25-aa")
        assert store.vacuum(retention_hours=0) == []
        store.release(store.extend(pin, 60.0))
        assert len(store.vacuum(retention_hours=0)) == 2 * LANES
        with pytest.raises(LabelError, match="is vacuumed"):
            store.pin("fm", "2022-04-25-aa", "late", table_version=pin.table_version)


def test_vacuum_never_passes_the_oldest_of_several_pins(guarded):
    root = Path(guarded.root)
    pins = []
    for day in range(4):
        guarded.commit([write(root, version=f"v{day}")])
        pins.append(guarded.pin("fm", f"v{day}", "student", ttl_s=60.0))
    for day in range(4):
        take_out(guarded, f"v{day}")
    ids = lane_labels(0)["example_id"].to_numpy()
    for oldest in range(4):
        assert len(guarded.vacuum(retention_hours=0)) == 0
        for day in range(oldest, 4):
            pin = guarded.pin("fm", f"v{day}", "again", table_version=pins[day].table_version)
            assert LabelLookup(pin, "fm", f"v{day}", ("click",)).rows(PERIOD, "impression", 0, 0, ROWS, ids)[1].all()
            guarded.release(pin)
        guarded.release(pins[oldest])
    assert len(guarded.vacuum(retention_hours=0)) == 4


def test_an_expired_pin_holds_nothing(guarded):
    run_job(guarded.root)
    guarded.pin("fm", "2022-04-25-aa", "dead student", ttl_s=0.1)
    take_out(guarded, "2022-04-25-aa")
    time.sleep(0.2)
    assert len(guarded.vacuum(retention_hours=0)) == 2 * LANES


def test_vacuum_spares_young_orphans_and_takes_old_ones(guarded):
    run_job(guarded.root)
    orphan = write(guarded.root, 0, period="2022-04-27")
    assert guarded.vacuum() == []
    assert guarded.vacuum(retention_hours=0) == [orphan.path]
    check_complete(guarded.root)


def test_vacuum_without_metadata_is_refused(tmp_path):
    run_job(tmp_path)
    with pytest.raises(LabelError, match="metadata store"):
        LabelStore(tmp_path).vacuum()


def test_pinning_what_is_not_there_is_refused(guarded):
    with pytest.raises(LabelError, match="no labels yet"):
        guarded.pin("fm", "v", "me")
    run_job(guarded.root)
    with pytest.raises(
        LabelError,
        match="no labels of fm@v9 in version 1 of the table: it never labelled; its newest versions: 2022-04-25-aa",
    ):
        guarded.pin("fm", "v9", "me")
    assert list(guarded.metadata.leases("labels/pins/")) == []
    with pytest.raises(LabelError, match="version 99"):
        guarded.pin("fm", "2022-04-25-aa", "me", table_version=99)
    pin = guarded.pin("fm", "2022-04-25-aa", "me")
    with pytest.raises(LabelError, match="pin is of"):
        LabelLookup(pin, "fm", "other", ("click",))


def test_whoever_asks_for_the_newest_table_gets_the_one_that_is_newest_then(guarded, monkeypatch):
    """A commit and a vacuum between loading the newest table and taking its lease."""
    run_job(guarded.root)
    real, calls = pins.take, []

    def take_late(*arguments):
        if not calls:
            calls.append(guarded.commit([write(guarded.root, version="v2")]))
            guarded.vacuum(retention_hours=0)
        return real(*arguments)

    monkeypatch.setattr(pins, "take", take_late)
    assert guarded.pin("fm", "2022-04-25-aa", "student").table_version == calls[0].table_version
    assert len(guarded.metadata.leases("labels/pins/")) == 1


def test_the_floor_yields_to_a_pin_taken_while_it_was_proposed(tmp_path):
    """A reader that meets a proposal lowers it; vacuum's settling then fails and starts over."""
    metadata = SQLiteMetadataStore(tmp_path / "meta.db")
    inner, calls = metadata.leases, []

    def leases(prefix):
        found = inner(prefix)
        calls.append(len(found))
        if len(calls) == 2:  # after the proposal, after vacuum looked: the last moment
            calls.append(take(metadata, 3, "fm", "v", "late", 60.0))
        return found

    metadata.leases = leases
    assert settle_floor(metadata, 10) == 3
    assert floor(metadata) == 3
    metadata.leases = inner
    with pytest.raises(LabelError, match="vacuumed"):
        take(metadata, 2, "fm", "v", "later", 60.0)
    assert len(inner("labels/pins/")) == 1, "a refused reader keeps no lease"
    metadata.release(calls[2])
    assert settle_floor(metadata, 10) == 10
    # A refused reader's lease, seen in passing, does not bring back what is gone.
    metadata.acquire("labels/pins/3/fm/v/passing", "passing", 60.0)
    assert settle_floor(metadata, 10) == 10
