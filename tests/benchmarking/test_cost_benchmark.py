"""`benchmarks.cost` and `benchmarks.memory`: lines, ratios, and the processes' work on a small period."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from benchmarks import memory, period
from benchmarks.cost import fit_line, series
from benchmarks.data import BATCH, LANES, write_store
from benchmarks.figures import draw_result
from benchmarks.period import Result, Task, status_bytes
from rayfm.data.store import ExampleStore


def result(**changes: object) -> Result:
    """A process that took 2 s and 100 MB for 1,000 rows."""
    base = Result(rows=1000, cpu=2.0, whole=5.0, peak=100_000_000, anonymous=1, after=1, parts={})
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def test_a_line_through_points_on_a_line():
    line = fit_line([1, 2, 4, 8], [5.0, 7.0, 11.0, 19.0])
    assert (line.intercept, line.slope, line.residual) == pytest.approx((3, 2, 0))


def test_the_furthest_point_is_a_share_of_itself():
    """The line of least relative squares through (1, 1), (2, 2), (3, 6) by hand: its normal equations."""
    x, y = (1.0, 2.0, 3.0), (1.0, 2.0, 6.0)
    w = [1 / v**2 for v in y]
    s, sx, sxx = (sum(a * b**k for a, b in zip(w, x, strict=True)) for k in (0, 1, 2))
    sy, sxy = (sum(a * b**k * c for a, b, c in zip(w, x, y, strict=True)) for k in (0, 1))
    slope = (s * sxy - sx * sy) / (s * sxx - sx**2)
    intercept = (sy - slope * sx) / s
    furthest = max(abs(intercept + slope * a - b) / b for a, b in zip(x, y, strict=True))
    line = fit_line(x, y)
    assert (line.intercept, line.slope, line.residual) == pytest.approx((intercept, slope, furthest))
    assert furthest > 0.1


def test_two_points_have_no_line():
    assert series([{"x": 1, "cpu": 2.0}, {"x": 2, "cpu": 3.0}])["line"] is None


def test_memory_is_a_ratio_of_peaks_beside_one_of_seconds_a_row():
    found = memory.outcome(result(), result(rows=10_000, cpu=30.0, peak=125_000_000))
    assert (found.ratio, found.cpu) == pytest.approx((1.25, 1.5))
    assert (found.ours, found.theirs) == ("125 MB", "100 MB")


def test_status_is_read_in_bytes():
    assert status_bytes("VmHWM", "VmPeak:\t 9 kB\nVmHWM:\t      12 kB\n") == 12 * 1024
    assert status_bytes("RssAnon") > 0
    with pytest.raises(KeyError):
        status_bytes("VmHWM", "VmPeak:\t 9 kB\n")


def test_students_learn_from_labels_of_one_teacher(tmp_path: Path):
    store, snapshots, labels = (str(tmp_path / name) for name in ("store", "teacher", "labels"))
    seen, taught = "2025-01-01", "2025-01-02"
    write_store(Path(store), {seen: BATCH, taught: 2 * BATCH}, sparse=3)
    common = {"store": store, "sparse": 3, "precision": "fp32"}
    trained = period.train(Task(period=seen, model="fm", snapshots=snapshots, **common), tmp_path / "one")
    assert trained.rows == BATCH
    labelled = period.label(
        Task(period=taught, model="fm", what="label", snapshots=snapshots, label_store=labels, **common)
    )
    assert labelled.rows == 2 * BATCH
    assert labelled.labels is not None
    assert labelled.labels.version.startswith(seen)
    students = period.train(
        Task(period=taught, model="fm", students=2, labels=labelled.labels, **common), tmp_path / "two"
    )
    assert students.rows == 2 * BATCH
    assert 0 < students.anonymous <= students.peak


def test_a_predicted_period_is_not_trained(tmp_path: Path):
    write_store(tmp_path / "store", {"2025-01-01": BATCH}, sparse=2)
    found = period.train(
        Task(str(tmp_path / "store"), "2025-01-01", model="fm", sparse=2, what="predict"), tmp_path / "run"
    )
    assert "predict" in found.parts
    assert "backward" not in found.parts


def test_a_period_written_anew_has_the_same_rows_in_time_order(tmp_path: Path):
    store = write_store(tmp_path / "store", {"2025-01-01": BATCH}, sparse=2)
    found = period.prepare(Task(str(tmp_path / "store"), "2025-01-01", sparse=2, what="prepare"), tmp_path / "run")
    assert found.rows == BATCH
    again = ExampleStore(tmp_path / "run" / "store")
    for lane in range(LANES):
        was, is_now = (s.open_lane("2025-01-01", "impression", lane).read() for s in (store, again))
        assert is_now["example_id"].to_pylist() == was["example_id"].to_pylist()


def test_a_failed_process_is_an_error(tmp_path: Path):
    """With what it did, and what it said last."""
    with pytest.raises(RuntimeError, match=r"period='2025-01-01'.*: no such store$"):
        period.run(Task(str(tmp_path), "2025-01-01"), under="sh -c 'echo no such store >&2; exit 3'")


def test_saved_costs_are_drawn(tmp_path: Path):
    points = [{"x": x, "cpu": 2.0 * x + 1, "rows": 10, "whole": 1.0, "peak": 1} for x in (1, 2, 4)]
    axis = series(points)
    drawn = draw_result(
        {
            "rows": axis,
            "students": {**axis, "teacher": {"trained": 3.0, "labelled": 1.0}},
            "features": {"deepfm": axis, "dlrm": axis},
        },
        tmp_path,
    )
    assert [path.name for path in drawn] == ["cost-rows.svg", "cost-students.svg", "cost-features.svg"]
    assert all("furthest point 0.0% off" in path.read_text() for path in drawn)
