"""The summary as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from rayfm.metrics.summary import TEACHER
from rayfm.report.headline import HeadlineRow, Interval, headline_rows, rests_on, task_kind

MARKS = {"better": "↓", "worse": "↑", "": " "}


def short(value: float | None, digits: int) -> str:
    """A number without the zero before its point (``.902``); empty where there is none."""
    if value is None:
        return ""
    text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text


def _plus_minus(interval: Interval) -> str:
    half = interval.half
    return short(interval.value, 4) + ("" if half is None else f"±{short(half, 4)}")


def _transfer(interval: Interval) -> str:
    if interval.value is None or interval.lo is None or interval.hi is None:
        return ""
    return f"{short(interval.value, 2)} [{short(interval.lo, 2)},{short(interval.hi, 2)}]"


def summary_table(summary: Mapping[str, Any], task: str | None = None, width: int = 80) -> Table:
    """One row per model and variant; the best of each model is bold.

    Args:
        summary: content of ``summary.json``.
        task: by default the first.
        width: columns of the terminal; names give way, numbers do not.

    Raises:
        DataError: nothing was evaluated, or not this task.
    """
    task, kind = task_kind(summary, task)
    rows = headline_rows(summary, task)
    binary = kind == "binary"
    reference = summary["reference_variant"]
    marked = (
        f"{MARKS['better']}{MARKS['worse']}: below, above {reference!r}, the interval of the difference excludes 0."
    )
    columns = "cal.: mean prediction / mean label on impressions, on considerations."
    caption = Text(f"{rests_on(summary, rows)}\n{marked}\n{columns}", style="dim", justify="left")
    periods = summary["periods"]
    span = periods[0] if len(periods) == 1 else f"{periods[0]} to {periods[-1]}"
    table = Table(
        box=SIMPLE_HEAD,
        padding=0,
        show_edge=False,
        width=width,
        title=Text(f"{task}, test periods {span}", style="bold"),
        title_justify="left",
        caption=caption,
        caption_justify="left",
    )
    # Only the names may be folded: numbers that do not fit would be lost.
    table.add_column("model", overflow="fold")
    table.add_column("variant", overflow="fold")
    headers = ["NE", "AUC", "log\nloss"] if binary else ["RMSE"]
    for header in [*headers, "cal.\nimp.", "cal.\ncons.", *(["transfer\nratio"] if binary else [])]:
        table.add_column(header, justify="right", no_wrap=True)
    previous: HeadlineRow | None = None
    for row in rows:
        new = previous is not None and (row.model != previous.model or previous.variant == TEACHER)
        if new:
            table.add_section()
        main = _plus_minus(row.ne if binary else row.rmse) + MARKS[row.verdict]
        cells = [row.model if new or previous is None else "", row.variant, main]
        if binary:
            cells += [short(row.auc, 4), short(row.logloss, 4)]
        cells += [short(row.calibration, 3), short(row.consideration, 3)]
        if binary:
            cells.append(_transfer(row.transfer))
        table.add_row(*(Text(cell, style="bold" if row.best else "") for cell in cells))
        previous = row
    return table
