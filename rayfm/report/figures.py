"""Figures as inline SVG: text and axes take the page's colour, so that they read on light and on dark.

matplotlib is imported inside the functions: importing the report costs nothing until one is drawn.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PALETTE = ("#8a8f98", "#0b84d8", "#e07b00", "#12a06f", "#c4529b", "#7a5fd0", "#b59a00", "#d64545", "#8c5a3c", "#00a3ad")
"""Told apart on white and on near-black, also with the common colour blindnesses. The first is for the reference."""

_INK = "#010203"
"""Stands for the page's text colour while matplotlib draws."""


def svg(draw: Callable[[Axes], None], size: tuple[float, float], label: str) -> str:
    """Draw on one pair of axes; ``label`` is what a screen reader says."""
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": label,
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.formatter.useoffset": False,
        # A name with dollar signs is a name, not a formula.
        "text.parse_math": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    # Names of groups repeat from figure to figure; only clip paths and markers are referred to, and have no "_".
    text = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", text)
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", text, count=1)
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)


def _ticks(axes: Axes, periods: Sequence[str]) -> None:
    """Periods on the x axis: at most six labels, without the year and month that all share."""
    prefix = _common_prefix(periods)
    step = -(-len(periods) // 6)
    places = list(range(0, len(periods), step))
    axes.set_xticks(places, [periods[i][len(prefix) :] for i in places])
    if prefix:
        axes.set_xlabel(f"{prefix.rstrip('-T:')}-…")


def _common_prefix(periods: Sequence[str]) -> str:
    if len(periods) < 2:
        return ""
    first, last = min(periods), max(periods)
    size = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 0)
    cut = max(first.rfind("-", 0, size), first.rfind("T", 0, size)) + 1
    return first[:cut]


def over_periods(
    title: str,
    periods: Sequence[str],
    series: Mapping[str, Mapping[str, Sequence[float]]],
    colours: Mapping[str, str],
    dashed: Sequence[str] = (),
    from_zero: bool = False,
    focus: Sequence[str] = (),
) -> str:
    """Lines over periods: name -> period -> one value a seed; the line is their mean, the band their range.

    The values of the periods in ``focus`` set the axis; what lies far outside of it is cut off.
    """

    def draw(axes: Axes) -> None:
        for name, values in series.items():
            known = [i for i, period in enumerate(periods) if values.get(period)]
            means = [float(np.mean(values[periods[i]])) for i in known]
            style = "--" if name in dashed else "-"
            axes.plot(known, means, style, marker="o", markersize=3, linewidth=1.6, color=colours[name])
            if any(len(values[periods[i]]) > 1 for i in known):
                lo, hi = ([float(f(values[periods[i]])) for i in known] for f in (min, max))
                axes.fill_between(known, lo, hi, color=colours[name], alpha=0.2, linewidth=0)
        axes.grid(axis="y", alpha=0.25, linewidth=0.5)
        axes.margins(x=0.04)
        axes.set_title(title)
        if from_zero:
            axes.set_ylim(bottom=0)
        held = [v for values in series.values() for period in focus for v in values.get(period, ())]
        if held:
            lowest, highest = min(held), max(held)
            room = max(highest - lowest, 1e-3)
            axes.set_ylim(lowest - 0.15 * room, highest + 0.6 * room)
        _ticks(axes, periods)

    return svg(draw, (3.7, 2.5), f"{title} over periods")


def with_intervals(
    title: str,
    x: str,
    y: str,
    series: Mapping[str, Sequence[tuple[float, float, float, float]]],
    colours: Mapping[str, str],
    ticks: Sequence[str] = (),
    zero: bool = False,
) -> str:
    """Points with their intervals, joined by lines: name -> (x, value, lo, hi).

    Args:
        title: above the axes.
        x: under them.
        y: beside them.
        series: the points; an interval of NaN is left out.
        colours: name -> colour.
        ticks: names of x = 0, 1, ..., where they are not numbers.
        zero: draw the line y = 0.
    """

    def draw(axes: Axes) -> None:
        for name, points in series.items():
            at, value, lo, hi = np.array(sorted(points), dtype=float).reshape(-1, 4).T
            axes.plot(at, value, marker="o", markersize=4, linewidth=1.6, color=colours[name])
            axes.vlines(at, lo, hi, color=colours[name], alpha=0.6, linewidth=1.4)
        if zero:
            axes.axhline(0, color=_INK, linewidth=0.8, alpha=0.5)
        axes.grid(axis="y", alpha=0.25, linewidth=0.5)
        axes.margins(x=0.08)
        axes.set(title=title, xlabel=x, ylabel=y)
        if ticks:
            axes.set_xticks(range(len(ticks)), ticks)

    return svg(draw, (4.6, 3.0), title)


def calibration_panel(
    title: str, curves: Mapping[str, Mapping[str, Sequence[float]]], colours: Mapping[str, str]
) -> str:
    """Mean label against mean prediction; on the diagonal a model is calibrated."""

    def draw(axes: Axes) -> None:
        pairs = {name: (np.array(curve["prediction"]), np.array(curve["label"])) for name, curve in curves.items()}
        values = np.concatenate([part for pair in pairs.values() for part in pair])
        values = values[values > 0]
        if not len(values):
            return
        lo, hi = float(values.min()), float(values.max())
        log = hi / lo > 30
        span = (lo / 1.3, hi * 1.3) if log else (0.0, hi * 1.06)
        axes.plot(span, span, ":", color=_INK, linewidth=1)
        for name, (prediction, label) in pairs.items():
            known = label > 0 if log else np.ones(len(label), dtype=bool)
            axes.plot(prediction[known], label[known], marker="o", markersize=2.5, linewidth=1.3, color=colours[name])
        if log:
            axes.set_xscale("log")
            axes.set_yscale("log")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(lambda value, _: f"{value:g}")
                axis.set_minor_formatter(lambda *_: "")
        axes.set_xlim(span)
        axes.set_ylim(span)
        axes.set_box_aspect(1)
        axes.grid(alpha=0.2, linewidth=0.5)
        axes.set_title(title)
        axes.set_xlabel("mean prediction")
        axes.set_ylabel("mean label")

    return svg(draw, (3.1, 3.1), f"Calibration of {title}")


def stacked_parts(parts: Mapping[str, Mapping[str, float]], colours: Mapping[str, str]) -> str:
    """Where each trainer's time goes: one bar a trainer, shares of its seconds."""

    def draw(axes: Axes) -> None:
        names = list(parts)
        for row, name in enumerate(names):
            total, left = sum(parts[name].values()) or 1.0, 0.0
            for part, seconds in parts[name].items():
                share = 100 * seconds / total
                axes.barh(row, share, left=left, height=0.62, color=colours[part])
                if share >= 8:
                    axes.text(left + share / 2, row, f"{share:.0f}", ha="center", va="center", color="white", size=8)
                left += share
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel("% of the trainer's time")

    return svg(draw, (5.6, 0.75 + 0.42 * len(parts)), "Where a trainer's time goes")


def grouped_bars(
    title: str, periods: Sequence[str], series: Mapping[str, Sequence[float]], colours: Mapping[str, str]
) -> str:
    """Bars side by side per period, one colour a series."""

    def draw(axes: Axes) -> None:
        width = 0.8 / max(len(series), 1)
        for i, (name, values) in enumerate(series.items()):
            axes.bar(np.arange(len(periods)) + (i - (len(series) - 1) / 2) * width, values, width, color=colours[name])
        axes.yaxis.set_major_formatter(_thousands)
        axes.set_title(title)
        _ticks(axes, periods)

    return svg(draw, (3.7, 2.5), title)


def _thousands(value: float, _: Any) -> str:
    for limit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:g}{letter}"
    return f"{value:g}"
