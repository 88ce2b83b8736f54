from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable
from example_store import write_store

from rayfm.config import DataError, LabelError
from rayfm.data.store import ExampleStore
from rayfm.labels import LabelStore, compact, coverage, lane_file
from rayfm.schema import Task

TASKS = (Task(name="click"), Task(name="watch", kind="regression"))
P1, P2, A, B = "2026-01-01", "2026-01-02", "2025-12-30-aa", "2025-12-31-bb"


@pytest.fixture
def examples(tmp_path) -> ExampleStore:
    return write_store(tmp_path, [P1, P2], impressions=230, considerations=101, lanes=3)


@pytest.fixture(autouse=True)
def small_row_groups(monkeypatch):
    monkeypatch.setattr(lane_file, "row_group_rows", lambda schema: 16)


def label(root: Path, examples: ExampleStore, teacher: str, version: str, period: str, lanes, share: float) -> None:
    """Labels of a share of the rows of some lanes; of those, some lack a task, some both."""
    parts = []
    for kind, lane in lanes:
        ids = examples.open_lane(period, kind, lane).read(["example_id"])["example_id"].to_numpy()
        rng = np.random.default_rng(lane + len(teacher))
        rows = np.flatnonzero(rng.random(len(ids)) < share)
        table = {"example_id": ids[rows], "row": rows}
        for task in TASKS:
            table[task.name] = pa.array(rng.random(len(rows)), mask=rng.random(len(rows)) < 0.3)
        parts.append((kind, lane, pa.table(table)))
    LabelStore(root).label(teacher, version, None, period, parts, TASKS)


def by_hand(root: Path, examples: ExampleStore, tasks: tuple[str, ...], every: bool) -> dict:
    """(teacher, version, period, kind, traffic) -> (labelled, total), row by row."""
    labels = DeltaTable(str(root / "labels")).to_pyarrow_table().to_pylist()
    counts: dict = {}
    for teacher, version, period in {(row["teacher"], row["version"], row["period"]) for row in labels}:
        good = {
            (row["kind"], row["example_id"])
            for row in labels
            if (row["teacher"], row["version"], row["period"]) == (teacher, version, period)
            and (all if every else any)(row[f"task_{task}"] is not None for task in tasks)
        }
        hits, totals = Counter(), Counter()
        for kind in ("impression", "consideration"):
            for lane in range(3):
                for row in examples.open_lane(period, kind, lane).read(["example_id", "traffic"]).to_pylist():
                    totals[kind, row["traffic"]] += 1
                    hits[kind, row["traffic"]] += (kind, row["example_id"]) in good
        counts |= {(teacher, version, period, *what): (hits[what], total) for what, total in totals.items()}
    return counts


def counted(found) -> dict:
    return {(row.teacher, row.version, row.period, row.kind, row.traffic): (row.labelled, row.total) for row in found}


@pytest.fixture
def labelled(tmp_path, examples) -> Path:
    every = [(kind, lane) for kind in ("impression", "consideration") for lane in range(3)]
    label(tmp_path, examples, "fm", A, P1, every, 0.8)
    label(tmp_path, examples, "fm", B, P1, every[:3], 1.0)
    label(tmp_path, examples, "fm", B, P2, every[1:], 0.5)
    label(tmp_path, examples, "large", A, P1, every[2:4], 0.9)
    return tmp_path


@pytest.mark.parametrize("tasks", [None, ("click",), ("click", "watch")])
@pytest.mark.parametrize("compacted", ["not", "here", "by delta"])
def test_coverage_is_what_counting_by_hand_gives(labelled, examples, tasks, compacted):
    store = LabelStore(labelled)
    expected = by_hand(labelled, examples, tasks or ("click", "watch"), every=tasks is not None)
    assert len(expected) == 4 * 2 * 2
    assert 0 < sum(hit for hit, _ in expected.values()) < sum(total for _, total in expected.values())
    if compacted == "here":
        compact(store)
    elif compacted == "by delta":
        DeltaTable(str(labelled / "labels")).optimize.compact()
    assert counted(coverage(store, examples, tasks=tasks)) == expected


def test_coverage_of_one_teacher_version_or_period(labelled, examples):
    store, everything = LabelStore(labelled), coverage(LabelStore(labelled), examples)
    assert coverage(store, examples, "fm", B) == [row for row in everything if (row.teacher, row.version) == ("fm", B)]
    assert coverage(store, examples, period=P2) == [row for row in everything if row.period == P2]
    assert coverage(store, examples, "nobody") == []
    first = everything[0]
    assert (first.teacher, first.version, first.period, first.kind, first.traffic) == (
        "fm",
        A,
        P1,
        "impression",
        "feed",
    )
    assert first.share == first.labelled / first.total
    # It agrees with what the store says by kind.
    totals = {kind: examples.manifest(P1).rows(kind) for kind in ("impression", "consideration")}
    for kind, share in store.coverage("fm", A, P1, totals).items():
        rows = [row for row in everything if (row.teacher, row.version, row.period, row.kind) == ("fm", A, P1, kind)]
        assert sum(row.labelled for row in rows) / sum(row.total for row in rows) == share


def test_coverage_at_a_pinned_table_version(labelled, examples):
    store = LabelStore(labelled)
    then, number = coverage(store, examples), store.open().version()
    label(labelled, examples, "fm", A, P2, [("impression", 0)], 1.0)
    assert len(coverage(store, examples)) == len(then) + 4
    assert coverage(store, examples, table_version=number) == then


def test_lanes_dealt_anew_are_joined_by_id(labelled, examples):
    """The examples of a lane moved: what counts is the example, not its place."""
    before = coverage(LabelStore(labelled), examples, "fm", A)
    for lane in range(3):
        path = examples.lane_path(P1, "impression", lane)
        import pyarrow.parquet as pq

        table = pq.read_table(path)
        pq.write_table(table.take(pa.array(np.arange(table.num_rows)[::-1])), path)
    assert coverage(LabelStore(labelled), examples, "fm", A) == before


def test_an_empty_lane_is_a_label_of_nothing(tmp_path, examples):
    label(tmp_path, examples, "fm", A, P1, [("impression", 0)], 0.0)
    rows = coverage(LabelStore(tmp_path), examples)
    assert {(row.version, row.kind, row.traffic) for row in rows} == {
        (A, kind, traffic) for kind in ("impression", "consideration") for traffic in ("feed", "search")
    }
    assert all(row.labelled == 0 < row.total for row in rows)


def test_what_cannot_be_counted_is_said(labelled, examples, tmp_path_factory):
    store = LabelStore(labelled)
    with pytest.raises(LabelError, match="did you mean 'click'"):
        coverage(store, examples, tasks=("clik",))
    elsewhere = ExampleStore(tmp_path_factory.mktemp("empty"))
    with pytest.raises(DataError, match=f"period {P1} is not in the store"):
        coverage(store, elsewhere)
    assert coverage(LabelStore(elsewhere.root), examples) == []
