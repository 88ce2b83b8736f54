from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from stored_lanes import LANES, PERIOD, ROWS, TASKS, all_lanes, check_complete, lane_labels, run_job, take_out, write

from rayfm.config import LabelError
from rayfm.labels import (
    LabelLookup,
    LabelStore,
    Retention,
    compact,
    compaction,
    delta,
    expire,
    lane_file,
    rewrite,
)
from rayfm.schema import Task
from rayfm.snapshots import SQLiteMetadataStore

VERSION, WIDTH = "2022-04-25-aa", 3


@pytest.fixture(autouse=True)
def small_row_groups(monkeypatch):
    for module in (lane_file, rewrite):
        monkeypatch.setattr(module, "row_group_rows", lambda schema: 16)


def rich_labels(lane: int, kind: str = "impression", rows: int = ROWS) -> pa.Table:
    """Predictions and representations, some of each missing."""
    labels = lane_labels(lane, rows, kind=kind)
    rng = np.random.default_rng(lane)
    values = rng.standard_normal((rows, WIDTH)).astype(np.float32)
    vectors = pa.FixedSizeListArray.from_arrays(
        pa.array(values.reshape(-1)), WIDTH, mask=pa.array(rng.random(rows) < 0.3)
    )
    click = pa.array(labels["click"].to_numpy(), mask=rng.random(rows) < 0.2)
    return labels.set_column(1, "click", click).append_column("representation", vectors)


def rich_job(root: Path, version: str = VERSION) -> list[tuple[str, int, pa.Table]]:
    """A commit for each lane, one of them empty."""
    lanes = [(kind, lane, rich_labels(lane, kind)) for kind in ("impression", "consideration") for lane in range(LANES)]
    lanes.append(("impression", LANES, rich_labels(LANES, rows=0)))
    for number, (kind, lane, labels) in enumerate(lanes):
        record = write(root, lane, labels, kind=kind, version=version)
        LabelStore(root).commit([record], app_id=f"job/{version}", app_version=number)
    return lanes


def everything(root: Path, lanes: list, version: str = VERSION, table_version: int | None = None) -> list[bytes]:
    """What a student can read of lanes: predictions, representations and masks, as bytes."""
    found = LabelLookup((root, table_version), "fm", version, ("watch_time", "click"), WIDTH)
    answers = []
    for kind, lane, labels in lanes:
        ids = labels["example_id"].to_numpy()
        for start, stop in ((0, len(ids)), (3, min(21, len(ids)))):
            at = (PERIOD, kind, lane, start, max(start, stop), ids[start : max(start, stop)])
            answers += [array.tobytes() for array in (*found.rows(*at), *found.vectors(*at))]
    return answers


def data_files(root: Path) -> list[str]:
    return sorted(pa.table(DeltaTable(str(root / "labels")).get_add_actions(flatten=True))["path"].to_pylist())


def test_nothing_changes_for_readers(tmp_path):
    lanes, store = rich_job(tmp_path), LabelStore(tmp_path)
    before, listed = everything(tmp_path, lanes), store.list()
    totals = {"impression": LANES * ROWS, "consideration": LANES * ROWS}
    covered = [store.coverage("fm", VERSION, PERIOD, totals, tasks) for tasks in (None, ("click",))]
    assert 0 < covered[1]["impression"] < 1
    (done,) = compact(store)
    assert (done.files_before, done.files_after, done.rows) == (2 * LANES, 1, 2 * LANES * ROWS)
    assert len(data_files(tmp_path)) == 2, "one, and the empty lane's"
    assert everything(tmp_path, lanes) == before
    assert store.list() == listed
    assert [store.coverage("fm", VERSION, PERIOD, totals, tasks) for tasks in (None, ("click",))] == covered
    assert compact(store) == [], "nothing is left to do"


def test_what_was_committed_stays_known(tmp_path):
    lanes, store = rich_job(tmp_path), LabelStore(tmp_path)
    compact(store)
    assert store.labelled_lanes("fm", VERSION, PERIOD) == {(kind, lane) for kind, lane, _ in lanes}
    again = store.commit([write(tmp_path, lane, labels, kind=kind) for kind, lane, labels in lanes])
    assert (again.added, again.skipped) == (0, len(lanes))
    record = write(tmp_path, 7)
    assert store.commit([record], app_id=f"job/{VERSION}", app_version=len(lanes) - 1).added == 0, "counted before"
    assert store.commit([record], app_id=f"job/{VERSION}", app_version=len(lanes)).added == 1


def test_a_compacted_file_is_sorted_as_lanes_are(tmp_path):
    rich_job(tmp_path)
    compact(LabelStore(tmp_path))
    (path,) = [path for path in data_files(tmp_path) if "compacted" in path]
    file = pq.ParquetFile(tmp_path / "labels" / path)
    table = file.read(["kind", "lane", "row"]).to_pandas()
    assert table.equals(table.sort_values(["kind", "lane", "row"], ignore_index=True))
    groups = [file.read_row_group(i, ["kind", "lane"]).to_pandas() for i in range(file.metadata.num_row_groups)]
    assert all(len(group.drop_duplicates()) == 1 for group in groups), "a look-up reads rows of its own lane alone"
    assert [len(group) for group in groups] == [16, 16, 8] * 2 * LANES


def test_many_small_pieces_of_a_lane_become_full_row_groups_in_order(tmp_path):
    """Such as several writers leave, who know of one another's rows."""
    labels = rich_labels(0)
    order = np.random.default_rng(3).permutation(ROWS)
    store = LabelStore(tmp_path)
    store.commit([write(tmp_path, 9, rich_labels(9))])
    for start in range(0, ROWS, 5):
        rows = np.sort(order[start : start + 5])
        part = labels.take(pa.array(rows)).append_column("row", pa.array(rows))
        delta.apply(store.open(), delta.Change(add=[write(tmp_path, 0, part)]))
    lanes = [("impression", 0, labels), ("impression", 9, rich_labels(9))]
    before = everything(tmp_path, lanes)
    (done,) = compact(store)
    assert (done.files_before, done.files_after) == (ROWS // 5 + 1, 1)
    assert everything(tmp_path, lanes) == before
    (path,) = data_files(tmp_path)
    footer = pq.ParquetFile(tmp_path / "labels" / path).metadata
    assert [footer.row_group(i).num_rows for i in range(footer.num_row_groups)] == [16, 16, 8] * 2


def test_a_row_that_stands_twice_is_not_compacted_away(tmp_path):
    store = LabelStore(tmp_path)
    store.commit([write(tmp_path)])
    delta.apply(store.open(), delta.Change(add=[write(tmp_path)]))
    before = data_files(tmp_path)
    with pytest.raises(LabelError, match="impression/lane 0: row 0 is labelled twice"):
        compact(store)
    assert data_files(tmp_path) == before


def test_files_of_other_columns_versions_periods_and_teachers_stay_apart(tmp_path):
    store = LabelStore(tmp_path)
    more = lane_labels(0).append_column("like", pa.array(np.full(ROWS, 0.25)))
    for lane in (0, 1):
        store.commit([write(tmp_path, lane)])
        store.commit([write(tmp_path, lane, version="other")])
        store.commit([write(tmp_path, lane, teacher="big", labels=more, tasks=(*TASKS, Task(name="like")))])
        store.commit([write(tmp_path, lane, period="2022-04-27")])
        store.commit([write(tmp_path, lane + 2, rich_labels(lane + 2))])
    listed = store.list()
    done = compact(store, teacher="fm", period=PERIOD)
    assert [(item.teacher, item.period, item.files_before, item.files_after) for item in done] == [("fm", PERIOD, 6, 3)]
    done = compact(store)
    assert [(item.teacher, item.period, item.files_after) for item in done] == [
        ("big", PERIOD, 1),
        ("fm", "2022-04-27", 1),
    ]
    assert store.list() == listed
    with pytest.raises(LabelError, match="'like'"):
        LabelLookup((tmp_path, None), "fm", VERSION, ("like",)).rows(PERIOD, "impression", 0, 0, 1, np.array([0]))
    with pytest.raises(LabelError, match="no representations are stored"):
        LabelLookup((tmp_path, None), "fm", "other", (), WIDTH).vectors(PERIOD, "impression", 0, 0, 1, np.array([0]))


def test_files_reach_the_target_and_large_ones_are_left(tmp_path):
    run_job(tmp_path)
    store = LabelStore(tmp_path)
    largest = max(path.stat().st_size for path in (tmp_path / "labels").rglob("*.parquet"))
    assert compact(store, target_bytes=largest) == [], "each is at least half of the target"
    (done,) = compact(store, target_bytes=3 * largest)
    assert (done.files_before, done.files_after) == (2 * LANES, LANES - 1)
    check_complete(tmp_path)


def test_two_students_of_one_pin_read_the_same_bits_through_it_all(tmp_path):
    store = LabelStore(tmp_path, SQLiteMetadataStore(tmp_path / "meta.db"))
    lanes = rich_job(tmp_path)
    first, second = (store.pin("fm", VERSION, name) for name in ("first", "second"))
    assert first.table_version == second.table_version
    before = everything(tmp_path, lanes, table_version=first.table_version)
    compact(store)
    store.vacuum(retention_hours=0)
    rich_job(tmp_path, "2022-04-25-bb")
    assert everything(tmp_path, lanes, table_version=second.table_version) == before
    later = store.pin("fm", VERSION, "later")
    store.release(first)
    assert [item.kept_for for item in expire(store, Retention(version=VERSION))] == [("later", "second")]
    assert everything(tmp_path, lanes) == before
    expire(store, Retention(version=VERSION), also_pinned=True)
    compact(store)
    store.vacuum(retention_hours=0)
    for pin in (second, later):
        assert everything(tmp_path, lanes, table_version=pin.table_version) == before
    with pytest.raises(LabelError, match="they were expired; its newest versions: 2022-04-25-bb"):
        store.pin("fm", VERSION, "too late")
    store.release(second)
    assert store.vacuum(retention_hours=0), "the small files that the later pin does not need"
    assert everything(tmp_path, lanes, table_version=later.table_version) == before
    store.release(later)
    assert any("compacted" in path for path in store.vacuum(retention_hours=0))


def test_a_student_that_has_the_table_open_reads_on_within_the_grace(tmp_path):
    store = LabelStore(tmp_path, SQLiteMetadataStore(tmp_path / "meta.db"))
    lanes = rich_job(tmp_path)
    before, opened = everything(tmp_path, lanes), LabelStore(tmp_path).open().version()
    compact(store)
    assert store.vacuum(retention_hours=1) == []
    assert everything(tmp_path, lanes, table_version=opened) == before, "without a pin"
    pin = store.pin("fm", VERSION, "resumed", table_version=opened)
    store.release(pin)
    assert len(store.vacuum(retention_hours=0)) == 2 * LANES
    with pytest.raises(LabelError, match=r"version \d+ of the label table is vacuumed .* run `rayfm label` again"):
        store.pin("fm", VERSION, "too late", table_version=opened)
    with pytest.raises(LabelError, match="missing label file: vacuum takes what no pin holds"):
        everything(tmp_path, lanes, table_version=opened)
    assert everything(tmp_path, lanes) == before


def interrupted(monkeypatch, action) -> None:
    """Let ``action`` happen once between a compaction's reading and its commit."""
    real, calls = compaction.rewrite, []

    def rewrite_and_act(*arguments):
        done = real(*arguments)
        if not calls:
            calls.append(action)
            action()
        return done

    monkeypatch.setattr(compaction, "rewrite", rewrite_and_act)


def test_lanes_that_are_committed_meanwhile_stay(tmp_path, monkeypatch):
    store = LabelStore(tmp_path)
    records = [write(tmp_path, lane, labels, kind=kind) for kind, lane, labels in all_lanes()]
    store.commit(records[:3])
    interrupted(monkeypatch, lambda: store.commit(records[3:]))
    (done,) = compact(store)
    assert (done.files_before, done.files_after) == (3, 1)
    check_complete(tmp_path)


def test_of_two_compactions_at_once_one_gives_way(tmp_path, monkeypatch):
    run_job(tmp_path)
    store, inner = LabelStore(tmp_path), []
    interrupted(monkeypatch, lambda: inner.extend(compact(store)))
    assert compact(store) == []
    assert len(inner) == 1
    check_complete(tmp_path)


def test_what_is_expired_meanwhile_does_not_come_back(tmp_path, monkeypatch):
    store = LabelStore(tmp_path, SQLiteMetadataStore(tmp_path / "meta.db"))
    run_job(tmp_path)
    run_job(tmp_path, "2022-04-25-bb")

    interrupted(monkeypatch, lambda: take_out(store, VERSION))
    (done,) = compact(store)
    assert (done.files_before, done.files_after) == (2 * LANES, 1)
    assert store.versions("fm") == ["2022-04-25-bb"]
    check_complete(tmp_path, "2022-04-25-bb")


def test_a_file_that_a_hasty_vacuum_took_is_not_committed(tmp_path, monkeypatch):
    """Vacuum without a grace takes what is written and not committed yet."""
    store = LabelStore(tmp_path, SQLiteMetadataStore(tmp_path / "meta.db"))
    run_job(tmp_path)
    interrupted(monkeypatch, lambda: store.vacuum(retention_hours=0))
    assert compact(store) == []
    check_complete(tmp_path)


def test_a_source_that_went_meanwhile_is_left_out(tmp_path, monkeypatch):
    store = LabelStore(tmp_path, SQLiteMetadataStore(tmp_path / "meta.db"))
    run_job(tmp_path)
    real = compaction._bins

    def bins(*arguments):
        found = list(real(*arguments))
        take_out(store, VERSION)
        store.vacuum(retention_hours=0)
        return found

    monkeypatch.setattr(compaction, "_bins", bins)
    assert compact(store) == []
    monkeypatch.undo()
    run_job(tmp_path)
    next((tmp_path / "labels").rglob("*lane-00001*.parquet")).unlink()
    with pytest.raises(LabelError, match="missing label file"):
        compact(store)


def test_writers_and_compactions_side_by_side_lose_nothing(tmp_path):
    versions, errors, stop = [f"2022-04-25-{i}" for i in range(3)], [], threading.Event()

    def guarded(work, *arguments):
        try:
            work(*arguments)
        except BaseException as error:
            errors.append(error)

    def write_lanes(version):
        for kind, lane, labels in all_lanes():
            LabelStore(tmp_path).commit([write(tmp_path, lane, labels, kind=kind, version=version)])

    def compact_on():
        while not stop.is_set():
            compact(LabelStore(tmp_path))

    writers = [threading.Thread(target=guarded, args=(write_lanes, version)) for version in versions]
    compactors = [threading.Thread(target=guarded, args=(compact_on,)) for _ in range(2)]
    for thread in (*writers, *compactors):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in compactors:
        thread.join()
    assert errors == []
    compact(LabelStore(tmp_path))
    for version in versions:
        check_complete(tmp_path, version)
    assert len(data_files(tmp_path)) == len(versions)


def test_an_empty_store_has_nothing_to_compact(tmp_path):
    assert compact(LabelStore(tmp_path)) == []
