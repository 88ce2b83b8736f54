"""Figures of saved results: ``python -m benchmarks.figures RESULT.json FOLDER`` (docs/figures)."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.collectives import closed_form
from benchmarks.data import BATCH, EMBEDDING_DIM, SPARSE
from rayfm.report.figures import PALETTE, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GREY, BLUE, ORANGE, GREEN, PINK, VIOLET, *_ = PALETTE
COLOURS = {
    "read, encode": GREY,
    "dense forward": "#7cc0f0",
    "dense backward": BLUE,
    "look-up": "#7fd0b3",
    "table update": GREEN,
    "ids": "#f2b469",
    "vectors forward": ORANGE,
    "vectors backward": "#a85a00",
    "gradients": "#d64545",
    "optimiser": VIOLET,
    "other": "#c9ccd1",
}
"""Part of a step -> colour: dense parts are blue, tables green, what goes between workers orange to red."""

MODEL_NAMES = {"dlrm": "DLRM", "dcnv2": "DCNv2", "deepfm": "DeepFM"}
KIND_NAMES = {"table_wise": "table-wise", "row_wise": "row-wise"}


def draw(path: Path, label: str, size: tuple[float, float], paint: Callable[[Axes], None]) -> Path:
    """One figure as SVG."""
    path.write_text(svg(paint, size, label) + "\n")
    return path


def scaling_time(rows: Sequence[dict[str, Any]], axes: Axes) -> None:
    """Critical path by part: a bar for each number of workers, a group for each model and sharding."""
    groups = list(dict.fromkeys((row["model"], row["sharding"]) for row in rows))
    workers = sorted({row["workers"] for row in rows})
    places, names = [], []
    for row in rows:
        place = groups.index((row["model"], row["sharding"])) * (len(workers) + 1) + workers.index(row["workers"])
        places.append(place)
        names.append(str(row["workers"]))
        bottom = 0.0
        for part, colour in COLOURS.items():
            axes.bar(place, row["critical_ms"][part], bottom=bottom, width=0.85, color=colour)
            bottom += row["critical_ms"][part]
        axes.text(place, bottom + 2, f"{row['speed_up']:.1f}x", ha="center", size=7)
    axes.set_xticks(places, names)
    for position, (model, sharding) in enumerate(groups):
        middle = position * (len(workers) + 1) + (len(workers) - 1) / 2
        text = f"{MODEL_NAMES[model]}, {KIND_NAMES[sharding]}"
        axes.annotate(
            text, (middle, 0), (0, -24), xycoords=("data", "axes fraction"), textcoords="offset points", ha="center"
        )
    axes.set_xlabel("workers", labelpad=18)
    axes.set_ylabel("CPU milliseconds")
    axes.set_title("Critical path of a step of 4,096 examples")
    handles = [axes.bar(0, 0, color=colour) for colour in COLOURS.values()]
    axes.legend(handles[::-1], list(COLOURS)[::-1], loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)


def scaling_bytes(rows: Sequence[dict[str, Any]], axes: Axes) -> None:
    """Counted bytes of a step as marks, closed forms as lines."""
    styles = {
        ("ids", "table_wise", None): (GREY, "ids, table-wise"),
        ("ids", "row_wise", None): ("#4a4e55", "ids, row-wise"),
        ("vectors forward", "table_wise", None): (BLUE, "vectors each way, table-wise"),
        ("vectors forward", "row_wise", None): (ORANGE, "vectors each way, row-wise"),
        ("gradients", "table_wise", "dlrm"): (GREEN, "gradients, DLRM"),
        ("gradients", "table_wise", "dcnv2"): (PINK, "gradients, DCNv2"),
    }
    for (kind, sharding, model), (colour, name) in styles.items():
        chosen = [
            row
            for row in rows
            if row["sharding"] == sharding and row["model"] == (model or rows[0]["model"]) and row["workers"] > 1
        ]
        x = [row["workers"] for row in chosen]
        dense = chosen[0]["dense_parameters"]
        forms = [closed_form(sharding, w, BATCH, SPARSE, EMBEDDING_DIM, dense)[kind] / 1e6 for w in x]
        axes.plot(x, forms, color=colour, linewidth=1.4, label=name)
        axes.plot(x, [row["bytes"][kind]["mean"] / 1e6 for row in chosen], "o", color=colour, markersize=5)
        wire = [row["bytes"][kind]["wire"] / 1e6 for row in chosen]
        axes.plot(x, wire, "x", color=colour, markersize=6)
    axes.plot([], [], "o", color=GREY, label="counted", markersize=5)
    axes.plot([], [], "x", color=GREY, label="on gloo's sockets", markersize=6)
    axes.plot([], [], color=GREY, label="closed form", linewidth=1.4)
    axes.set_xscale("log", base=2)
    axes.set_xticks(x, [str(w) for w in x])
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(axis="y", alpha=0.25, linewidth=0.5)
    axes.set(xlabel="workers", ylabel="MB a worker and step", title="What a worker sends")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)


def line_axis(found: dict[str, dict[str, Any]], x: str, title: str, unit: float, axes: Axes, base: float = 0.0) -> None:
    """Points with their lines: name -> series; ``base`` is below all of them."""
    for (name, one), colour in zip(found.items(), (BLUE, ORANGE), strict=False):
        at = [p["x"] / unit for p in one["points"]]
        cpu = [base + p["cpu"] for p in one["points"]]
        line = one["line"]
        if line is not None:
            fitted = [base + line["intercept"] + line["slope"] * v * unit for v in (0, at[-1])]
            off = f"line: furthest point {line['residual']:.1%} off"
            label = f"{name}, {off}" if name else off
            axes.plot([0, at[-1]], fitted, color=colour, linewidth=1.2, label=label)
        axes.plot(at, cpu, "o", color=colour, markersize=5)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.grid(axis="y", alpha=0.25, linewidth=0.5)
    axes.set(xlabel=x, ylabel="CPU-seconds", title=title)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.2), frameon=False, fontsize=8)


def cost_students(found: dict[str, Any], axes: Axes) -> None:
    """The group's cost on top of the teacher's, which is paid once."""
    teacher = sum(found["teacher"].values())
    most = found["points"][-1]["x"]
    axes.axhspan(0, teacher, color=GREY, alpha=0.35, linewidth=0, label="the teacher: trains, labels, once")
    line_axis({"": found}, "students in the group", "Cost of students", 1, axes, base=teacher)
    slope = teacher + found["line"]["slope"]
    x = [0, most]
    axes.plot(x, [found["line"]["intercept"] + slope * v for v in x], "--", color=ORANGE, linewidth=1.2)
    axes.lines[-1].set_label("if each student had a teacher of its own")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.2), frameon=False, fontsize=8)


def draw_result(result: dict[str, Any], folder: Path) -> list[Path]:
    """All figures that a saved result gives."""
    drawn = []
    if "cases" in result:
        rows = result["cases"]
        drawn += [
            draw(folder / "scaling-time.svg", "Critical path by part", (7.6, 3.6), lambda a: scaling_time(rows, a)),
            draw(folder / "scaling-bytes.svg", "Bytes a worker sends", (6.2, 3.4), lambda a: scaling_bytes(rows, a)),
        ]
    if "rows" in result:
        found = {"": result["rows"]}
        drawn.append(
            draw(
                folder / "cost-rows.svg",
                "CPU-seconds over rows",
                (4.2, 3.2),
                lambda a: line_axis(found, "million rows", "Cost of rows (DLRM)", 1e6, a),
            )
        )
    if "students" in result:
        students = result["students"]
        drawn.append(
            draw(
                folder / "cost-students.svg",
                "CPU-seconds over students",
                (4.2, 3.4),
                lambda a: cost_students(students, a),
            )
        )
    if "features" in result:
        named = {MODEL_NAMES[model]: one for model, one in result["features"].items()}
        rows = result["features"]["deepfm"]["points"][0]["rows"]
        drawn.append(
            draw(
                folder / "cost-features.svg",
                "CPU-seconds over features",
                (4.2, 3.2),
                lambda a: line_axis(named, "sparse features", f"Cost of features ({rows:,} rows)", 1, a),
            )
        )
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("result", type=Path, nargs="+", help="files that --save wrote")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    for path in arguments.result:
        for drawn in draw_result(json.loads(path.read_text()), arguments.folder):
            print(f"drew {drawn}")


if __name__ == "__main__":
    main()
