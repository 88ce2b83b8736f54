"""What training costs as it grows: ``python -m benchmarks.cost [rows] [students] [features]`` (``--save``).

CPU-seconds against rows of a period, against students taught by one teacher's labels, and against sparse features; each
with a straight line through the points and the point that is furthest from it. Every point is a process of its own that
reads a store on disk in the layout that `prepare` writes, and trains on it with a batch of 4,096, in float32, on one
thread. Writing the data is not counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data import describe
from benchmarks.period import Result, Task, run
from benchmarks.saved import save

ROWS = (1_000_000, 2_000_000, 5_000_000, 10_000_000, 20_000_000)
STUDENTS = (1, 2, 4, 8)
FEATURES = (10, 25, 50, 100, 200)
FEATURE_MODELS = ("deepfm", "dlrm")
"""The work of DeepFM's layers grows with the features, that of DLRM's interaction with their pairs."""

FEATURE_ROWS = 65_536
TEACHER_ROWS, TAUGHT_ROWS = 262_144, 524_288
"""What the teacher trains on, and what it labels for the students."""


@dataclasses.dataclass(frozen=True)
class Line:
    """``y = intercept + slope * x``."""

    intercept: float
    slope: float
    residual: float
    """Distance of the furthest point from the line, as a share of the point."""


def fit_line(x: Sequence[float], y: Sequence[float]) -> Line:
    """The line with the least squares of relative distances, so that small points count as much as large ones.

    Example::

        >>> fit_line([1, 2, 4], [3.0, 5.0, 9.0])
        Line(intercept=1.0, slope=2.0, residual=0.0)
    """
    values = np.asarray(y, float)
    slope, intercept = np.polyfit(np.asarray(x, float), values, 1, w=1 / values)
    off = np.abs(intercept + slope * np.asarray(x, float) - values) / values
    return Line(round(float(intercept), 9), round(float(slope), 9), round(float(off.max()), 9))


def point(x: int, result: Result) -> dict[str, Any]:
    """A point of a plot, with the memory that it took."""
    return {"x": x, "cpu": result.cpu, "whole": result.whole, "rows": result.rows, "peak": result.peak}


def series(points: list[dict[str, Any]]) -> dict[str, Any]:
    """Points with their line; none through fewer than three."""
    line = fit_line([p["x"] for p in points], [p["cpu"] for p in points]) if len(points) > 2 else None
    return {"points": points, "line": line and dataclasses.asdict(line)}


def rows_axis(folder: Path, under: str, rows: Iterable[int] = ROWS) -> dict[str, Any]:
    """DLRM on periods of more and more rows."""
    from benchmarks.data import write_store

    points = []
    for count in rows:
        with tempfile.TemporaryDirectory(dir=folder) as store:
            write_store(Path(store), {"2025-01-01": count})
            points.append(point(count, run(Task(store, "2025-01-01"), under)))
        _say("rows", points[-1])
    return series(points)


def students_axis(folder: Path, under: str, students: Iterable[int] = STUDENTS) -> dict[str, Any]:
    """More and more DLRMs in one group, all taught by one DCNv2, which trains and labels once."""
    from benchmarks.data import write_store

    store, snapshots, labels = (str(folder / name) for name in ("store", "teacher", "labels"))
    seen, taught = "2025-01-01", "2025-01-02"
    write_store(Path(store), {seen: TEACHER_ROWS, taught: TAUGHT_ROWS})
    trained = run(Task(store, seen, model="dcnv2", snapshots=snapshots), under)
    task = Task(store, taught, model="dcnv2", what="label", snapshots=snapshots, label_store=labels)
    labelled = run(task, under)
    teacher = {"trained": trained.cpu, "labelled": labelled.cpu}
    print(f"teacher: {teacher}", file=sys.stderr, flush=True)
    points = []
    for count in students:
        points.append(point(count, run(Task(store, taught, students=count, labels=labelled.labels), under)))
        _say("students", points[-1])
    return {"teacher": teacher, "rows": {"trained": TEACHER_ROWS, "labelled": TAUGHT_ROWS}, **series(points)}


def features_axis(folder: Path, under: str, features: Iterable[int] = FEATURES) -> dict[str, Any]:
    """More and more sparse features, beside the 13 dense ones."""
    from benchmarks.data import write_store

    points: dict[str, list[dict[str, Any]]] = {model: [] for model in FEATURE_MODELS}
    for count in features:
        with tempfile.TemporaryDirectory(dir=folder) as store:
            write_store(Path(store), {"2025-01-01": FEATURE_ROWS}, sparse=count)
            for model in FEATURE_MODELS:
                points[model].append(point(count, run(Task(store, "2025-01-01", model=model, sparse=count), under)))
                _say(f"features, {model}", points[model][-1])
    return {model: series(found) for model, found in points.items()}


AXES = {"rows": rows_axis, "students": students_axis, "features": features_axis}


def _say(name: str, found: dict[str, Any]) -> None:
    print(
        f"{name} {found['x']:,}: {found['cpu']:.1f} CPU-seconds, {1e6 * found['cpu'] / found['rows']:.1f} us a row, "
        f"peak {found['peak'] / 1e6:,.0f} MB",
        file=sys.stderr,
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("axes", nargs="*", metavar="AXIS", help="rows, students, features; by default all")
    parser.add_argument("--save", action="store_true", help="keep the figures under benchmarks/results/")
    parser.add_argument("--under", default="", metavar="COMMAND", help="runs each point's process, e.g. 'taskset -c 0'")
    parser.add_argument("--folder", help="where the data are written for a while: up to 6 GB")
    arguments = parser.parse_args()
    unknown = [axis for axis in arguments.axes if axis not in AXES]
    if unknown:
        parser.error(f"there is no axis {unknown[0]!r}; there are {', '.join(AXES)}")
    found = {}
    for axis in arguments.axes or AXES:
        with tempfile.TemporaryDirectory(prefix="rayfm-bench-", dir=arguments.folder) as folder:
            found[axis] = AXES[axis](Path(folder), arguments.under)
    for axis, content in found.items():
        lines = {"": content} if "points" in content else content
        for name, one in lines.items():
            line = one["line"]
            print(
                f"{axis} {name}: {line['intercept']:.3g} + {line['slope']:.3g} x CPU-seconds; "
                f"furthest point {line['residual']:.1%} off"
            )
    if arguments.save:
        save("cost", {"case": describe(), **found})


if __name__ == "__main__":
    main()
