"""The rows of the headline table, for the terminal and for the page alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from rayfm.config import DataError, nearest
from rayfm.metrics.summary import TEACHER

Verdict = Literal["better", "worse", ""]


@dataclasses.dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval; None where undefined."""

    value: float | None
    lo: float | None = None
    hi: float | None = None

    @property
    def half(self) -> float | None:
        return None if self.lo is None or self.hi is None else (self.hi - self.lo) / 2


@dataclasses.dataclass(frozen=True)
class HeadlineRow:
    """One model and variant on one task. A regression has ``rmse`` where a binary task has the three others."""

    model: str
    variant: str
    seeds: int
    ne: Interval
    auc: float | None
    logloss: float | None
    rmse: Interval
    calibration: float | None
    """On impressions."""
    consideration: float | None
    """Calibration on considerations; None where there are none."""
    transfer: Interval
    transfer_reason: str | None
    """Why there is no transfer ratio, for a distilled variant that has none."""
    best: bool
    """Lowest NE (or RMSE) of the model's variants, where it has several."""
    verdict: Verdict
    """Whether the 95 % interval of the paired difference from the reference variant excludes 0, and to which side."""


def task_kind(summary: Mapping[str, Any], task: str | None) -> tuple[str, str]:
    """Name and kind of ``task``, by default the first.

    Raises:
        DataError: the summary has no tasks, or not this one.
    """
    kinds = {item["name"]: item["kind"] for item in summary.get("tasks", [])}
    if not kinds:
        raise DataError("the summary has no tasks: nothing was evaluated yet; run the test periods first")
    if task is None:
        return next(iter(kinds.items()))
    if task not in kinds:
        raise DataError(f"unknown task {task!r}{nearest(task, list(kinds))}")
    return task, kinds[task]


def headline_rows(summary: Mapping[str, Any], task: str | None = None) -> list[HeadlineRow]:
    """Rows in the order to show them: teachers, then each model with the reference variant first."""
    task, kind = task_kind(summary, task)
    main = "ne" if kind == "binary" else "rmse"
    reference = summary["reference_variant"]
    metrics = {(r["model"], r["variant"], r["kind"], r["metric"]): r for r in summary["metrics"] if r["task"] == task}
    differences = {
        (r["model"], r["variant"]): r
        for r in summary["differences"]
        if (r["task"], r["kind"], r["metric"]) == (task, "impression", main)
    }
    transfers = {
        (r["model"], r["variant"]): r
        for r in summary["transfer_ratio"]
        if (r["task"], r["kind"]) == (task, "impression")
    }
    names = list(dict.fromkeys(key[:2] for key in metrics))
    models = list(dict.fromkeys(model for model, _ in names))
    names.sort(key=lambda name: (name[1] != TEACHER, models.index(name[0]), name[1] != reference))

    def value(name: tuple[str, str], metric: str, of: str = "impression") -> float | None:
        number: float | None = metrics.get((*name, of, metric), {}).get("value")
        return number

    def interval(row: Mapping[str, Any]) -> Interval:
        return Interval(row.get("value"), row.get("lo"), row.get("hi"))

    def verdict(row: Mapping[str, Any]) -> Verdict:
        lo, hi = row.get("lo"), row.get("hi")
        if lo is None or hi is None or lo <= 0 <= hi:
            return ""
        return "better" if hi < 0 else "worse"

    rows = []
    for name in names:
        rivals = [value(other, main) for other in names if other[0] == name[0] and other[1] != TEACHER]
        known = [rival for rival in rivals if rival is not None]
        transfer = transfers.get(name, {})
        first = metrics.get((*name, "impression", main)) or metrics.get((*name, "consideration", main)) or {}
        rows.append(
            HeadlineRow(
                *name,
                seeds=first.get("seeds", 0),
                ne=interval(metrics.get((*name, "impression", "ne"), {})),
                auc=value(name, "auc"),
                logloss=value(name, "logloss"),
                rmse=interval(metrics.get((*name, "impression", "rmse"), {})),
                calibration=value(name, "calibration"),
                consideration=value(name, "calibration", "consideration"),
                transfer=interval(transfer),
                transfer_reason=transfer.get("reason"),
                best=len(known) > 1 and name[1] != TEACHER and value(name, main) == min(known),
                verdict=verdict(differences.get(name, {})),
            )
        )
    return rows


def rests_on(summary: Mapping[str, Any], rows: list[HeadlineRow]) -> str:
    """One sentence on what the intervals are over."""
    seeds = sorted({row.seeds for row in rows if row.variant != TEACHER} or {row.seeds for row in rows})
    level = f"{100 * summary['confidence']:.0f} %"
    if not summary["replicates"]:
        return "No intervals: the run gathered no bootstrap replicates."
    if seeds == [1]:
        return f"± is half the {level} interval over users; one seed, so the spread of training is not in it."
    if len(seeds) == 1:
        return f"± is half the {level} interval over users and {seeds[0]} seeds."
    return f"± is half the {level} interval over users and seeds ({seeds[0]} to {seeds[-1]} a row)."
