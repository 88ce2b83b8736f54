"""Filled tables as one self-contained page."""

from __future__ import annotations

import math
from pathlib import Path

from rayfm import __version__
from rayfm.report.figures import PALETTE, with_intervals
from rayfm.report.html import write_page
from rayfm.report.sections import Grid, Listing, Section
from rayfm.reproduce import study
from rayfm.reproduce.show import MARKS, SMALLEST_P, counted, number, ours
from rayfm.reproduce.table import TABLES, Figure, Judged, Result

_CLASSES = {"held": "better", "not": "worse", "open": ""}


def write_tables(results: list[Result], facts: dict[str, str], path: Path) -> Path:
    """Write the page, with ``facts`` and the code that the numbers are of at its top; returns its path."""
    facts = {**facts, "code": f"rayfm {__version__}, numbers {study.NUMBERS}"}
    write_page(path, "The papers' tables, reproduced", facts, [_section(result) for result in results])
    return path


def _section(result: Result) -> Section:
    section = Section(result.name, intro=f"{TABLES[result.name].title}. {counted(result)}.")
    if result.figure is not None:
        section.parts.append(_grid(result.figure))
    header = [*result.labels]
    paper = [any(row.paper[i] is not None for row in result.rows) for i in range(len(result.metrics))]
    for metric, known in zip(result.metrics, paper, strict=True):
        header += [f"{metric}, paper", f"{metric}, ours"] if known else [metric]
    rows = []
    for row in result.rows:
        cells: list[object] = [(label, "name") for label in row.labels]
        for known, theirs, found in zip(paper, row.paper, row.ours, strict=True):
            cells += [number(theirs), ours(found)] if known else [ours(found)]
        rows.append(cells)
    note = " ".join(["± is half the 95 % interval over users and seeds.", *result.notes])
    title = "The paper's numbers beside ours" if any(paper) else "Our numbers"
    section.parts.append(Listing(title, header, rows, note))
    if result.claims:
        section.parts.append(_claims("The paper's claims", result.claims))
    if result.apart:
        note = "The paper has no such claims; they are corrected among themselves, and not counted."
        section.parts.append(_claims("Tested beside them", result.apart, note))
    return section


def _claims(title: str, claims: list[Judged], note: str = "") -> Listing:
    rows: list[list[object]] = []
    for judged in claims:
        found = judged.estimate
        numbers = ("-", "-", "-") if found is None else tuple(f"{v:+.4f}" for v in (found.value, found.lo, found.hi))
        p = "-" if math.isnan(judged.p) else f"{judged.p:.2g}" if judged.p >= SMALLEST_P else f"< {SMALLEST_P:g}"
        verdict = (MARKS[judged.verdict], _CLASSES[judged.verdict])
        rows.append([(judged.claim.text, "name"), judged.claim.metric, *numbers, p, verdict])
    header = ["claim", "metric", "difference", "lo", "hi", "p, Holm", "verdict"]
    return Listing(title, header, rows, note)


def _grid(figure: Figure) -> Grid:
    colours = {line.name: PALETTE[1 + i % (len(PALETTE) - 1)] for i, line in enumerate(figure.series)}
    series = {
        line.name: [(x, y.value, y.lo, y.hi) for x, y in zip(line.x, line.y, strict=True)] for line in figure.series
    }
    zero = any(lo <= 0 <= hi for points in series.values() for _, _, lo, hi in points)
    drawn = with_intervals(figure.title, figure.x, figure.y, series, colours, figure.ticks, zero)
    return Grid(figure.title, [drawn], list(colours.items()), wide=True)
