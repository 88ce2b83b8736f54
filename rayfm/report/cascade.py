"""The section on stages: each model against the next stage's predictions, pooled and over periods (UKDSL 4.1.2)."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from rayfm.metrics.stages import AGAINST_NEXT
from rayfm.metrics.summary import ALL_TRAFFIC
from rayfm.report.figures import over_periods
from rayfm.report.run import Row, Run
from rayfm.report.sections import KIND_NAMES, Grid, Listing, Section, number, variant_colours
from rayfm.report.table import short

INTRO = (
    "Each model against its reference, the next stage's prediction as a rule: calibration is its mean prediction over "
    "the reference's mean, NE takes the reference as label. A stage that overestimates what it passed on is above 1 on "
    "considerations."
)


def stages(run: Run) -> Section:
    """Calibration and NE of each stage against the next, on impressions and on considerations."""
    section = Section("Between stages", intro=INTRO)
    rows: list[Row] = run.summary.get("stages", [])
    if not rows:
        section.empty = "No model has a reference: nothing says what the next stage predicted."
        return section
    found: dict[tuple[str, ...], dict[tuple[str, str], Row]] = defaultdict(dict)
    for row in rows:
        place = tuple(str(row[name]) for name in ("model", "against", "task", "variant"))
        found[place][row["metric"], row["kind"]] = row
    columns = [(metric, kind) for metric in ("calibration", "ne") for kind in KIND_NAMES]
    body: list[list[Any]] = [
        [*((name, "name") for name in place), *(_cell(values.get(column)) for column in columns)]
        for place, values in found.items()
    ]
    header = ["model", "against", "task", "variant"]
    header += [f"{'NE' if metric == 'ne' else metric}, {KIND_NAMES[kind]}" for metric, kind in columns]
    section.parts.append(Listing("Against the next stage", header, body, "± is half the interval."))
    section.parts += _over_periods(run, list(dict.fromkeys((place[0], place[2]) for place in found)))
    return section


def _cell(row: Row | None) -> str:
    if row is None or row["value"] is None:
        return "-"
    half = "" if row["lo"] is None else f" ± {short((row['hi'] - row['lo']) / 2, 4)}"
    return f"{number(row['value'])}{half}"


def _over_periods(run: Run, models: list[tuple[str, str]]) -> list[Grid]:
    """Calibration against the next stage in each period: a panel a model, a line a variant, a grid a kind."""
    colours = variant_colours(run)
    grids = []
    for scored, kind in AGAINST_NEXT.items():
        values: dict[tuple[str, str], dict[str, dict[str, list[float]]]] = {
            model: defaultdict(lambda: defaultdict(list)) for model in models
        }
        for line in run.metrics:
            wanted = (line["metric"], line["kind"], line["traffic"]) == ("calibration", scored, ALL_TRAFFIC)
            if wanted and line["value"] is not None and (line["model"], line["task"]) in values:
                values[line["model"], line["task"]][line["variant"]][line["period"]].append(line["value"])
        panels = {model: series for model, series in values.items() if series}
        if not panels:
            continue
        periods = sorted({p for series in panels.values() for by_period in series.values() for p in by_period})
        focus = run.summary.get("periods", [])
        figures = [
            over_periods(f"{model}, {task}", periods, series, colours, focus=focus)
            for (model, task), series in panels.items()
        ]
        shown = list(dict.fromkeys(variant for series in panels.values() for variant in series))
        legend = [(variant, colours[variant]) for variant in shown]
        grids.append(Grid(f"Calibration against the next stage, on {KIND_NAMES[kind]}", figures, legend))
    return grids
