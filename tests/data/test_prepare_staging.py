"""The external merge sort and the dealing to lanes, without Ray."""

from __future__ import annotations

import datetime
import errno
import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from example_store import DAY_US, every_feature_rows, every_feature_schema

from rayfm.config import CapacityError, DataError
from rayfm.data import lanes as lanes_module
from rayfm.data import staging
from rayfm.data.prepare import write_period
from rayfm.data.sources.base import Period
from rayfm.data.staging import duplicated_ids, merge_sorted, stage_rows, time_order
from rayfm.data.store import ExampleStore, PeriodManifest
from rayfm.data.validate import DUPLICATE

SCHEMA = every_feature_schema()
LANES = 4
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
PERIODS = [
    Period(
        name=(EPOCH + datetime.timedelta(days=day)).date().isoformat(),
        start=EPOCH + datetime.timedelta(days=day),
        end=EPOCH + datetime.timedelta(days=day + 1),
    )
    for day in (1, 2)
]
NAMES = frozenset(period.name for period in PERIODS)


def examples(rows: int = 1000, considerations: int = 300) -> pa.Table:
    """Two days of rows, shuffled, with a truth column."""
    parts = []
    for day in (1, 2):
        for kind, count in (("impression", rows), ("consideration", considerations)):
            if not count:
                continue
            part = every_feature_rows(count, 2 * day + (kind == "consideration"), kind, start=day * DAY_US)
            part = part.append_column("kind", pa.repeat(kind, count))
            parts.append(part.append_column("truth/click", pa.array(np.linspace(0, 1, count, dtype=np.float32))))
    table = pa.concat_tables(parts)
    return table.take(pa.array(np.random.default_rng(0).permutation(table.num_rows)))


def stage(table: pa.Table, folder: Path, blocks: int) -> list[staging.Fragment]:
    cuts = np.linspace(0, table.num_rows, blocks + 1).astype(int)
    return [
        fragment
        for start, stop in itertools.pairwise(cuts)
        for fragment in stage_rows(table.slice(start, stop - start), SCHEMA, PERIODS, NAMES, folder, batch_rows=32)
    ]


def write(table: pa.Table, root: Path, blocks: int = 3, window_rows: int = 100) -> list[PeriodManifest]:
    store = ExampleStore(root)
    fragments = stage(table, root / ".staging", blocks)
    return [
        write_period(
            period, [f for f in fragments if f.period == period.name], SCHEMA, store, LANES, "hash", window_rows
        )
        for period in PERIODS
    ]


def test_lanes_dealt_in_turn_give_the_time_order(tmp_path):
    table = examples()
    store = ExampleStore(tmp_path)
    for period, manifest in zip(PERIODS, write(table, tmp_path), strict=True):
        store.verify(period.name)
        store.check_schema(period.name, SCHEMA)
        for kind, rows in (("impression", 1000), ("consideration", 300)):
            mask = pc.and_(
                pc.equal(table["kind"], kind),
                pc.equal(pc.divide(table["time"], DAY_US), period.start_us // DAY_US),
            )
            expected = table.filter(mask).sort_by([("time", "ascending"), ("example_id", "ascending")])
            assert expected.num_rows == rows == manifest.rows(kind)
            for lane in range(LANES):
                found = pq.read_table(store.lane_path(period.name, kind, lane))
                want = expected.take(pa.array(np.arange(lane, rows, LANES)))
                assert found.num_rows == manifest.lane_rows(kind, lane)
                assert not [name for name in found.column_names if name.startswith("truth/") or name == "kind"]
                assert found.equals(want.select(found.column_names).cast(found.schema))
                truth = pq.read_table(store.truth_path(period.name, kind, lane))
                assert truth.equals(want.select(["truth/click"]))
        assert manifest.truth == ("truth/click",)
        assert "truth/click" not in manifest.columns
        assert manifest.columns["logged/ranking/click"] == "float"
        assert manifest.columns["request_id"] == "int64"


def test_bytes_do_not_depend_on_blocks_or_windows(tmp_path, monkeypatch):
    monkeypatch.setattr(lanes_module, "ROW_GROUP", 64)
    table = examples()
    doubled = pa.concat_tables([table, table.slice(0, 50).set_column(3, "age", pa.array([1.5] * 50, pa.float32()))])
    first = write(doubled, tmp_path / "a", blocks=1, window_rows=10_000)
    second = write(doubled.take(pa.array(np.arange(doubled.num_rows)[::-1])), tmp_path / "b", blocks=7, window_rows=37)
    assert first == second
    assert sum(manifest.rejected[DUPLICATE] for manifest in first) == 50
    file = pq.ParquetFile(ExampleStore(tmp_path / "a").lane_path(PERIODS[0].name, "impression", 0))
    assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [64, 64, 64, 58]


def test_a_log_in_time_order_gives_the_same_bytes(tmp_path):
    table = examples()
    in_order = table.sort_by([("time", "ascending"), ("example_id", "ascending")])
    assert time_order(in_order) is None
    assert write(in_order, tmp_path / "a", blocks=4) == write(table, tmp_path / "b", blocks=4)


def test_order_is_by_time_then_id():
    def order(times: list[int], ids: list[int]) -> list[int] | None:
        found = time_order(pa.table({"time": times, "example_id": ids}))
        return None if found is None else found.tolist()

    assert order([1, 2, 2, 3], [9, 4, 5, 1]) is None
    assert order([1, 2, 2, 3], [9, 5, 4, 1]) == [0, 2, 1, 3]
    assert order([2, 1], [1, 2]) == [1, 0]
    assert order([7, 7], [3, 3]) is None
    assert order([1], [1]) is None
    assert order([], []) is None


def test_marginals_are_means_over_known_values(tmp_path):
    table = examples()
    manifest = write(table, tmp_path)[0]
    day = table.filter(pc.equal(pc.divide(table["time"], DAY_US), 1))
    assert {(entry.kind, entry.traffic) for entry in manifest.marginals} == {
        (kind, traffic) for kind in ("impression", "consideration") for traffic in ("feed", "search")
    }
    for entry in manifest.marginals:
        rows = day.filter(
            pc.and_(pc.equal(day["kind"], entry.kind), pc.equal(day["traffic"], entry.traffic))
        ).to_pandas()
        assert entry.rows == len(rows)
        assert ("click" in entry.means) == (entry.kind == "impression")
        for name, mean in entry.means.items():
            assert mean == pytest.approx(rows[name].mean(), rel=1e-6), name


@pytest.mark.parametrize("in_order", [False, True])
def test_a_merge_holds_a_window_and_a_batch_of_each_fragment(tmp_path, monkeypatch, in_order):
    rng = np.random.default_rng(1)
    sizes = []
    concat = pa.concat_tables
    monkeypatch.setattr(
        staging.pa, "concat_tables", lambda tables: sizes.append(sum(t.num_rows for t in tables)) or concat(tables)
    )
    peaks = {}
    for rows in (2_000, 40_000):
        table = every_feature_rows(rows, 1, start=DAY_US).append_column("kind", pa.repeat("impression", rows))
        order = np.argsort(table["time"].to_numpy()) if in_order else rng.permutation(rows)
        fragments = stage(table.take(pa.array(order)), tmp_path / str(rows), blocks=5)
        sizes.clear()
        merged = list(merge_sorted(fragments, pq_schema(fragments), window_rows=500))
        peaks[rows] = max(sizes)
        times = np.concatenate([window["time"].to_numpy() for window in merged])
        ids = np.concatenate([window["example_id"].to_numpy() for window in merged])
        expected = table["example_id"].to_numpy()[
            np.lexsort((table["example_id"].to_numpy(), table["time"].to_numpy()))
        ]
        np.testing.assert_array_equal(ids, expected)
        assert (np.diff(times) >= 0).all()
        assert max(window.num_rows for window in merged) <= 500 + 6 * 32
    assert peaks[40_000] <= 500 + 6 * 32
    assert peaks[40_000] <= 1.1 * peaks[2_000]


def pq_schema(fragments: list[staging.Fragment]) -> pa.Schema:
    with pa.OSFile(fragments[0].path) as file:
        return pa.ipc.open_file(file).schema


def test_rows_of_one_time_stay_in_one_window(tmp_path):
    table = every_feature_rows(600, 1, start=DAY_US).append_column("kind", pa.repeat("impression", 600))
    table = table.set_column(1, "time", pa.array(np.repeat([DAY_US, DAY_US + 1, DAY_US + 2], 200)))
    fragments = stage(table.take(pa.array(np.random.default_rng(0).permutation(600))), tmp_path, 4)
    windows = list(merge_sorted(fragments, pq_schema(fragments), window_rows=50))
    assert sum(window.num_rows for window in windows) == 600
    times = [set(window["time"].to_pylist()) for window in windows]
    assert sum(len(seen) for seen in times) == 3


def test_more_fragments_than_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "_OPEN_FILES", 2)
    table = every_feature_rows(500, 1, start=DAY_US).append_column("kind", pa.repeat("impression", 500))
    fragments = stage(table.take(pa.array(np.random.default_rng(0).permutation(500))), tmp_path, 9)
    windows = list(merge_sorted(fragments, pq_schema(fragments), window_rows=64))
    assert np.concatenate([w["time"].to_numpy() for w in windows]).tolist() == sorted(table["time"].to_pylist())


@pytest.mark.parametrize("ids_a_pass", [10, 97, 10_000])
def test_duplicates_are_found_in_passes(tmp_path, ids_a_pass):
    table = examples()
    doubled = pa.concat_tables([table, table.slice(10, 5), table.slice(10, 5)])
    fragments = [f for f in stage(doubled, tmp_path, 3) if f.period == PERIODS[0].name]
    own = table.slice(10, 5).filter(pc.less(table.slice(10, 5)["time"], 2 * DAY_US))
    assert duplicated_ids(fragments, ids_a_pass).tolist() == sorted(own["example_id"].to_pylist())


def test_an_id_may_stand_in_two_periods(tmp_path):
    table = examples(rows=40, considerations=0)
    ids, days = table["example_id"].to_numpy().copy(), table["time"].to_numpy() // DAY_US
    ids[days == 2] = ids[days == 1]
    for manifest in write(table.set_column(0, "example_id", pa.array(ids)), tmp_path):
        assert manifest.rejected == {}
        assert manifest.rows("impression") == 40


def test_a_duplicate_of_another_kind_is_rejected(tmp_path):
    table = examples(rows=40, considerations=10)
    kinds, ids = np.array(table["kind"].to_pylist()), table["example_id"].to_numpy().copy()
    day = table["time"].to_numpy() // DAY_US
    ids[np.flatnonzero((kinds == "consideration") & (day == 1))[0]] = ids[
        np.flatnonzero((kinds == "impression") & (day == 1))[0]
    ]
    manifest = write(table.set_column(0, "example_id", pa.array(ids)), tmp_path)[0]
    assert manifest.rejected == {DUPLICATE: 1}
    assert manifest.rows("impression") + manifest.rows("consideration") == 49


def test_rejects_are_stored_with_reasons_whatever_their_types(tmp_path):
    table = examples()
    user = table["user"].to_numpy(zero_copy_only=False).copy()
    user[:20] = -3
    table = table.set_column(
        table.column_names.index("user"), "user", pa.array(user, from_pandas=True).cast(pa.int64())
    )
    table = pa.concat_tables([table, table.slice(100, 4)])
    manifests = write(table, tmp_path)
    total: dict[str, int] = {}
    for manifest in manifests:
        stored = pq.read_table(ExampleStore(tmp_path).rejects_path(manifest.period))
        counts = stored["reason"].value_counts().to_pylist()
        assert {entry["values"]: entry["counts"] for entry in counts} == manifest.rejected
        for reason, rows in manifest.rejected.items():
            total[reason] = total.get(reason, 0) + rows
    assert total == {"negative id in 'user'": 20, DUPLICATE: 4}
    kept = sum(manifest.rows("impression") + manifest.rows("consideration") for manifest in manifests)
    assert kept == 2600 - 20


def test_rejects_of_types_that_do_not_mix_become_text(tmp_path):
    one, other = examples(rows=50, considerations=0), examples(rows=50, considerations=0)
    position = one.column_names.index("user")
    tags = one.column_names.index("tags")
    huge = pa.array([2**63 if row == 0 else row + 5 for row in range(100)], pa.uint64())
    one = one.set_column(position, "user", huge)
    other = other.set_column(position, "user", pa.array([-1] + [1] * 99))
    lists = pa.array([[2**63]] + [[1]] * 99, pa.list_(pa.uint64()))
    other = other.set_column(0, "example_id", pa.array(np.arange(100) + 10**9)).set_column(tags, "tags", lists)
    fragments = stage(one, tmp_path / ".staging", 1) + stage(other, tmp_path / ".staging", 1)
    store = ExampleStore(tmp_path)
    stored = []
    for period in PERIODS:
        own = [fragment for fragment in fragments if fragment.period == period.name]
        write_period(period, own, SCHEMA, store, LANES, "hash")
        if store.rejects_path(period.name).exists():
            stored += pq.read_table(store.rejects_path(period.name)).select(["user", "reason"]).to_pylist()
    assert sorted(str(entry["user"]) for entry in stored) == ["-1", str(2**63)]


def test_rows_of_no_period_and_of_periods_done_before(tmp_path):
    table = examples(rows=50, considerations=0)
    table = table.set_column(1, "time", pa.array([9 * DAY_US, None, -4, *table["time"].to_pylist()[3:]]))
    only = frozenset([PERIODS[1].name])
    fragments = stage_rows(table, SCHEMA, PERIODS, only, tmp_path)
    by_period = {fragment.period: fragment.rejected for fragment in fragments if fragment.rejected}
    assert by_period == {staging.UNKNOWN_PERIOD: {"time outside every period": 1, "null time": 1, "negative time": 1}}
    assert {fragment.period for fragment in fragments if fragment.first_times} == only


def test_only_considerations_is_an_empty_period(tmp_path):
    table = examples(rows=50, considerations=20).filter(
        pc.equal(examples(rows=50, considerations=20)["kind"], "consideration")
    )
    with pytest.raises(DataError, match=r"period 1970-01-02 has considerations but no impressions"):
        write(table, tmp_path)


def test_a_full_disk_says_so(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(staging.pa, "OSFile", full)
    with pytest.raises(CapacityError, match=r"disk is full; free space"):
        stage(examples(rows=50), tmp_path, 1)


def test_blocks_may_differ_in_optional_columns(tmp_path):
    table = examples()
    half = table.num_rows // 2
    store = ExampleStore(tmp_path)
    fragments = stage(table.slice(0, half), tmp_path / ".staging", 2)
    fragments += stage(table.slice(half).drop_columns(["logged/ranking/click"]), tmp_path / ".staging", 2)
    own = [fragment for fragment in fragments if fragment.period == PERIODS[0].name]
    manifest = write_period(PERIODS[0], own, SCHEMA, store, LANES, "hash")
    assert manifest.columns["logged/ranking/click"] == "float"
    assert manifest.rows("impression") == 1000
