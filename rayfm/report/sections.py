"""What each section of the page shows, worked out from a run: tables as rows of text, figures as SVG."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from rayfm.metrics.summary import ALL_TRAFFIC, TEACHER
from rayfm.report.figures import PALETTE, calibration_panel, grouped_bars, over_periods, stacked_parts
from rayfm.report.headline import headline_rows, rests_on
from rayfm.report.run import Row, Run
from rayfm.report.table import short

KIND_NAMES = {"impression": "impressions", "consideration": "considerations"}
PARTS = ("wait", "read", "predict", "forward", "backward", "optimizer", "checkpoint", "publish", "metrics")
MOST_TRAFFICS = 8
COVERAGE = "/coverage "
"""In the name of a term that is a share of rows, not a loss."""


@dataclasses.dataclass
class Grid:
    """Small figures side by side under one legend."""

    title: str
    figures: list[str]
    legend: list[tuple[str, str]]
    """(name, colour)."""
    note: str = ""
    wide: bool = False


@dataclasses.dataclass
class Listing:
    """A table of text; a cell is a string, or (string, class)."""

    title: str
    header: list[str]
    rows: list[list[Any]]
    note: str = ""
    folded: bool = False


@dataclasses.dataclass
class Section:
    """A part of the page; ``empty`` says why there is nothing in it."""

    title: str
    parts: list[Grid | Listing] = dataclasses.field(default_factory=list)
    empty: str = ""
    intro: str = ""


def _colours(names: Sequence[str], first: str | None = None) -> dict[str, str]:
    """A colour for each name, the same wherever it comes up; grey for ``first``."""
    others = [name for name in names if name != first]
    colours = {name: PALETTE[1 + i % (len(PALETTE) - 1)] for i, name in enumerate(others)}
    if first is not None and first in names:
        colours[first] = PALETTE[0]
    return colours


def variant_colours(run: Run) -> dict[str, str]:
    """A colour for each variant of a run, grey for the one that the others are compared with."""
    rows = [*run.summary.get("metrics", []), *run.metrics]
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    return _colours(variants, run.summary.get("reference_variant", "none"))


def _task_names(run: Run, kind: str | None = "binary") -> list[str]:
    return [task["name"] for task in run.summary.get("tasks", []) if kind in (None, task["kind"])]


def number(value: float | None, digits: int = 4) -> str:
    """A number for a table; a dash where there is none."""
    return "-" if value is None else f"{value:,.{digits}f}"


def headline(run: Run) -> Section:
    """The headline table of each task."""
    section = Section("Results")
    if not run.summary.get("metrics"):
        section.empty = "No test period has been scored yet: summary.json is missing or empty."
        return section
    for index, task in enumerate(_task_names(run, None)):
        rows = headline_rows(run.summary, task)
        binary = task in _task_names(run)
        main = "NE" if binary else "RMSE"
        header = ["model", "variant", main, *(["AUC", "logloss"] if binary else [])]
        header += ["calibration, impressions", "calibration, considerations", *(["transfer ratio"] if binary else [])]
        body: list[list[Any]] = []
        for row in rows:
            interval = row.ne if binary else row.rmse
            half = "" if interval.half is None else f" ± {short(interval.half, 4)}"
            mark = {"better": " ↓", "worse": " ↑", "": ""}[row.verdict]
            style = " ".join(word for word, on in (("best", row.best), (row.verdict, bool(row.verdict))) if on)
            cells: list[Any] = [(row.model, "name"), (row.variant, "name")]
            cells.append((f"{number(interval.value)}{half}{mark}", style))
            if binary:
                cells += [number(row.auc), number(row.logloss)]
            cells += [number(row.calibration, 3), number(row.consideration, 3)]
            if binary:
                ratio = row.transfer
                text = f"{number(ratio.value, 2)} [{number(ratio.lo, 2)}, {number(ratio.hi, 2)}]"
                cells.append((row.transfer_reason, "reason") if row.transfer_reason else text if ratio.value else "")
            body.append(cells)
        reference = run.summary["reference_variant"]
        note = (
            f"{rests_on(run.summary, rows)} Bold: the lowest {main} of a model. ↓ ↑: below or above the model's "
            f"“{reference}” variant, where the interval of the paired difference excludes zero."
        )
        section.parts.append(Listing(f"Task {task}", header, body, note, folded=index > 0))
    return section


def ne_over_periods(run: Run) -> Section:
    """NE of each period, predicted before it was trained on: one panel a model, one line a variant."""
    tested = run.summary.get("periods", [])
    scored = (
        f" The summary is over {tested[0]} to {tested[-1]}; their values set the axes, earlier ones may be cut off."
        if tested
        else ""
    )
    section = Section("NE over periods", intro=f"Each period is predicted before it is trained on.{scored}")
    colours = variant_colours(run)
    tasks = list(dict.fromkeys(line["task"] for line in run.metrics if line["metric"] == "ne"))
    for task in tasks:
        for kind, kind_name in KIND_NAMES.items():
            values: dict[str, dict[str, dict[str, list[float]]]] = defaultdict(
                lambda: defaultdict(lambda: defaultdict(list))
            )
            wanted = ("ne", task, kind, ALL_TRAFFIC)
            for line in run.metrics:
                if (line["metric"], line["task"], line["kind"], line["traffic"]) == wanted and line[
                    "value"
                ] is not None:
                    values[line["model"]][line["variant"]][line["period"]].append(line["value"])
            if not values:
                continue
            periods = sorted({p for variants in values.values() for series in variants.values() for p in series})
            teachers = {model: series[TEACHER] for model, series in values.items() if TEACHER in series}
            alone = next(iter(teachers.values())) if len(teachers) == 1 else {}
            figures = []
            students = {m: {v: s for v, s in series.items() if v != TEACHER} for m, series in values.items()}
            for model, series in students.items():
                if series:
                    series |= {TEACHER: alone} if alone else {}
                    figures.append(over_periods(model, periods, series, colours, dashed=[TEACHER], focus=tested))
            figures = figures or [
                over_periods(model, periods, {TEACHER: series}, colours) for model, series in teachers.items()
            ]
            shown = list(dict.fromkeys(variant for series in values.values() for variant in series))
            note = (
                "The band is the range over seeds."
                if any(len(v) > 1 for s in values.values() for t in s.values() for v in t.values())
                else ""
            )
            legend = [(name, colours[name]) for name in shown]
            section.parts.append(Grid(f"Task {task}, on {kind_name}", figures, legend, note))
    if not section.parts:
        section.empty = "No period has been scored yet: metrics.jsonl has no NE."
    return section


def calibration(run: Run) -> Section:
    """Calibration curves on impressions and on considerations."""
    intro = (
        "Mean label against mean prediction in groups of equal weight, over all test periods and seeds; dotted: "
        "calibrated. On considerations the label is the next stage's prediction."
    )
    section = Section("Calibration", intro=intro)
    colours = variant_colours(run)
    curves = run.summary.get("calibration_curves", [])
    for task in _task_names(run)[:1]:
        for kind, kind_name in KIND_NAMES.items():
            panels: dict[str, dict[str, Row]] = defaultdict(dict)
            for curve in curves:
                if (curve["task"], curve["kind"]) == (task, kind) and curve["prediction"]:
                    panels[curve["model"]][curve["variant"]] = curve
            title = f"Task {task}, on {kind_name}"
            if not panels:
                section.parts.append(Grid(title, [], [], f"No {kind_name} were scored."))
                continue
            figures = [calibration_panel(model, found, colours) for model, found in panels.items()]
            shown = list(dict.fromkeys(variant for found in panels.values() for variant in found))
            section.parts.append(Grid(title, figures, [(name, colours[name]) for name in shown]))
    if not section.parts:
        section.empty = "No test period has been scored yet."
    return section


def labels(run: Run) -> Section:
    """Coverage and teacher version per period."""
    section = Section(
        "Labels", intro="A teacher labels a period with a version that was trained through an earlier one."
    )
    events = run.events("labelled", "period", "teacher")
    if not events:
        section.empty = (
            "No label job has committed: the run has no teacher, or its first period is still being trained."
        )
        return section
    rows: list[list[Any]] = []
    for event in events:
        coverage = event.get("coverage", {})
        seconds = event.get("seconds") or 0.0
        cells = [
            (number(100 * coverage[kind], 1), "worse" if coverage[kind] < 1 else "") if kind in coverage else "-"
            for kind in KIND_NAMES
        ]
        names = [(str(event.get(key, "-")), "name") for key in ("period", "teacher", "version", "trained_through")]
        rate = number(event.get("labelled", 0) / seconds, 0) if seconds else "-"
        rows.append([*names, f"{event.get('labelled', 0):,} of {event.get('rows', 0):,}", *cells, rate])
    header = ["period", "teacher", "version", "trained through", "rows labelled"]
    header += ["coverage of impressions, %", "of considerations, %", "rows/s"]
    section.parts.append(Listing("Coverage and teacher version per period", header, rows))
    return section


def training(run: Run) -> Section:
    """Throughput, where a step's time goes, the losses, what was published."""
    section = Section("Training")
    events = run.events("trained", "period", "trainer")
    if not events:
        section.empty = "No trainer has finished a period."
        return section
    trainers = list(dict.fromkeys(str(event["trainer"]) for event in events))
    periods = sorted({event["period"] for event in events})
    colours = _colours(trainers)
    rates: dict[str, dict[str, list[float]]] = {name: {} for name in trainers}
    parts: dict[str, dict[str, float]] = {name: defaultdict(float) for name in trainers}
    for event in events:
        if event.get("seconds"):
            rates[event["trainer"]][event["period"]] = [event["examples"] / event["seconds"]]
        for part, seconds in event.get("parts", {}).items():
            parts[event["trainer"]][part] += seconds
    figure = over_periods("Examples per second", periods, rates, colours, from_zero=True)
    note = "Over the whole period: waiting, scoring, checkpoints and publishing included."
    section.parts.append(Grid("Throughput", [figure], [(name, colours[name]) for name in trainers], note))
    known = [part for part in PARTS if any(part in found for found in parts.values())]
    known += sorted({part for found in parts.values() for part in found} - set(PARTS))
    if known:
        shades = _colours(known, "wait")
        ordered = {name: {part: found[part] for part in known if part in found} for name, found in parts.items()}
        legend = [(part, shades[part]) for part in known]
        section.parts.append(Grid("Where the time goes", [stacked_parts(ordered, shades)], legend, wide=True))
    terms: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for event in events:
        for term, value in event.get("losses", {}).items():
            terms[f"{event['trainer']}: {term}"].append((event["period"], value))
    for title, what, coverage in (("Losses", "loss", False), ("Where supervision is from", "share of rows", True)):
        body = [
            [
                (name, "name"),
                (values[0][0], "name"),
                number(values[0][1]),
                (values[-1][0], "name"),
                number(values[-1][1]),
            ]
            for name, values in sorted(terms.items())
            if (COVERAGE in name) == coverage
        ]
        if body:
            header = ["term", "first period", what, "last period", what]
            section.parts.append(Listing(title, header, body, folded=True))
    newest = {event["trainer"]: event for event in events if event.get("ids")}
    body = [
        [
            (trainer, "name"),
            (table, "name"),
            f"{ids['known']:,}",
            f"{ids['admitted']:,}",
            f"{ids['evicted']:,}",
            f"{ids['candidates']:,}",
            f"{ids['refused']:,}",
            f"{ids['coverage']:.1%}",
        ]
        for trainer, event in newest.items()
        for table, ids in event["ids"].items()
    ]
    if body:
        header = ["trainer", "table", "own row", "admitted", "evicted", "candidates", "no row left", "look-ups covered"]
        note = "As of the newest period that each trainer trained on; admitted and evicted in it."
        section.parts.append(Listing("Ids with rows of their own", header, body, note))
    behind = run.events("lag", "trainer")
    if behind:
        delays: dict[str, float] = {e["trainer"]: e["delay_s"] for e in events if "delay_s" in e}
        body = [
            [
                (str(event["trainer"]), "name"),
                (str(event["newest"]), "name"),
                (str(event["trained"] or "-"), "name"),
                str(event["periods"]),
                number(event["seconds"], 0),
                number(delays.get(event["trainer"]), 1),
            ]
            for event in behind
        ]
        header = ["trainer", "newest complete", "newest published", "periods behind", "seconds behind", "took (s)"]
        note = (
            "Seconds behind: from the end of the newest published period to that of the newest complete one, in the "
            "data's time. Took: from when the run saw the newest published period to be complete to its record."
        )
        section.parts.append(Listing("Behind the stream", header, body, note))
    published = run.events("published", "model", "version")
    if published:
        body = [
            [
                *((str(event.get(key, "-")), "name") for key in ("period", "model", "version")),
                number(event.get("seconds"), 2),
            ]
            for event in published
        ]
        section.parts.append(
            Listing("Published snapshots", ["period", "model", "version", "seconds"], body, folded=True)
        )
    return section


def data(run: Run) -> Section:
    """Rows, rejects and marginals of the prepared periods."""
    section = Section("Data")
    events = run.events("prepared", "period")
    if not events:
        section.empty = "No period has been prepared."
        return section
    periods = [event["period"] for event in events]
    colours = _colours(list(KIND_NAMES))
    rows = {kind: [event.get("rows", {}).get(kind, 0) for event in events] for kind in KIND_NAMES}
    rows = {kind: counts for kind, counts in rows.items() if any(counts)}
    note = "" if "consideration" in rows else "The source has no considerations."
    legend = [(KIND_NAMES[kind], colours[kind]) for kind in rows]
    section.parts.append(Grid("Rows per period", [grouped_bars("Rows", periods, rows, colours)], legend, note))
    section.parts += [_rejects(events), *_marginals(run, events, periods)]
    return section


def _rejects(events: list[Row]) -> Listing:
    reasons: dict[str, dict[str, int]] = defaultdict(dict)
    for event in events:
        for reason, count in event.get("rejected", {}).items():
            reasons[reason][event["period"]] = count
    body = [
        [
            (reason, "name"),
            f"{sum(counts.values()):,}",
            str(len(counts)),
            (max(counts, key=lambda p: counts[p]), "name"),
        ]
        for reason, counts in sorted(reasons.items(), key=lambda item: -sum(item[1].values()))
    ]
    note = "Rejected rows are kept in the store's rejects/ folder." if body else "No row was rejected."
    return Listing("Rejected rows", ["reason", "rows", "periods", "most in"] if body else [], body, note)


def _marginals(run: Run, events: list[Row], periods: list[str]) -> list[Grid | Listing]:
    """Means of the tasks per traffic over periods; of the columns that both kinds have, over all rows."""
    cells = [(event["period"], cell) for event in events for cell in event.get("marginals", [])]
    size: dict[str, int] = defaultdict(int)
    totals: dict[str, dict[str, list[float]]] = defaultdict(lambda: {kind: [0.0, 0.0] for kind in KIND_NAMES})
    for _, cell in cells:
        size[cell["traffic"]] += cell["rows"]
        for column, mean in cell["means"].items():
            total = totals[column][cell["kind"]]
            total[0] += mean * cell["rows"]
            total[1] += cell["rows"]
    if not totals:
        return [Grid("Marginals", [], [], "The manifests hold no marginals.")]
    traffics = sorted(size, key=lambda name: -size[name])
    shown = traffics[:MOST_TRAFFICS]
    colours = {name: (PALETTE[1:] + PALETTE[:1])[i] for i, name in enumerate(shown)}
    tasks = _task_names(run, None) or [column for column in totals if "/" not in column]
    figures = []
    for task in tasks:
        series: Mapping[str, dict[str, list[float]]] = {name: {} for name in shown}
        for period, cell in cells:
            if cell["kind"] == "impression" and cell["traffic"] in series and task in cell["means"]:
                series[cell["traffic"]][period] = [cell["means"][task]]
        if any(series.values()):
            figures.append(over_periods(f"mean {task}", periods, series, colours, from_zero=True))
    note = f"The {len(shown)} largest of {len(traffics)} traffics." if len(traffics) > len(shown) else ""
    parts: list[Grid | Listing] = []
    if figures:
        legend = [(name, colours[name]) for name in shown]
        parts.append(Grid("Means per traffic, on impressions", figures, legend, note))
    body: list[list[Any]] = []
    for column, kinds in totals.items():
        means = [total / rows if rows else None for total, rows in kinds.values()]
        share = means[0] / means[1] if means[0] is not None and means[1] else None
        body.append([(column, "name"), *(number(mean) for mean in means), number(share, 2)])
    header = ["column", "mean on impressions", "on considerations", "ratio"]
    about = "Labels exist on impressions alone; logged predictions and a simulator's truth on both."
    parts.append(Listing("Impressions against considerations", header, body, about))
    return parts


def everything(run: Run) -> Section:
    """Every number of ``summary.json``, folded."""
    section = Section("All metrics")
    rows = run.summary.get("metrics", [])
    if not rows:
        section.empty = "No test period has been scored yet."
        return section
    names = ("model", "variant", "kind", "task", "metric")
    body = [
        [
            *((row[name], "name") for name in names),
            *(number(row[key], 5) for key in ("value", "lo", "hi")),
            f"{row['n']:,}",
            str(row["seeds"]),
        ]
        for row in rows
    ]
    header = [*names, "value", "lo", "hi", "rows", "seeds"]
    section.parts.append(Listing(f"Values ({len(body):,})", header, body, folded=True))
    body = [
        [
            *((row[name], "name") for name in names),
            *(number(row[key], 5) for key in ("difference", "lo", "hi")),
            str(row["seeds"]),
        ]
        for row in run.summary.get("differences", [])
    ]
    if body:
        title = f"Differences from “{run.summary['reference_variant']}” ({len(body):,})"
        section.parts.append(Listing(title, [*names, "difference", "lo", "hi", "seeds"], body, folded=True))
    body = [
        [
            *((row[name], "name") for name in ("model", "variant", "kind", "task", "traffic", "metric")),
            number(row["value"], 5),
            f"{row['n']:,}",
        ]
        for row in run.summary.get("traffic", [])
    ]
    if len(run.summary.get("traffics", [])) > 1 and body:
        header = ["model", "variant", "kind", "task", "traffic", "metric", "value", "rows"]
        section.parts.append(Listing(f"Per traffic ({len(body):,})", header, body, folded=True))
    return section
