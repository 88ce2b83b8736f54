"""A filled table on a terminal, 80 columns wide."""

from __future__ import annotations

import math
import textwrap

from rich.console import Console
from rich.table import Table as RichTable

from rayfm.metrics.intervals import Estimate
from rayfm.reproduce.table import Judged, Result

MARKS = {"held": "held", "not": "NOT HELD", "open": "undecided"}
"""Verdict -> how it is said."""


SMALLEST_P = 1e-6
"""Below it a p value says no more than that."""


def number(value: float | None) -> str:
    """A metric, or a dash."""
    return "-" if value is None or math.isnan(value) else f"{value:.4f}".replace("0.", ".", 1 if abs(value) < 1 else 0)


def ours(value: Estimate | None) -> str:
    """A metric with half the width of its interval."""
    if value is None or math.isnan(value.value):
        return "-"
    half = (value.hi - value.lo) / 2
    return number(value.value) + ("" if math.isnan(half) else f"±{number(half)}")


def counted(result: Result) -> str:
    """How many of the paper's signs held, where it reports any."""
    if not result.claims:
        return "none of this is a sign that the paper reports"
    count = result.counted()
    held = f"{count['held']} of the paper's {len(result.claims)} signs held"
    return f"{held}; {count['open']} undecided, {count['not']} the other way"


def claim_line(judged: Judged) -> str:
    """A claim with its difference and verdict."""
    claim, found = judged.claim, judged.estimate
    if found is None:
        return f"undecided  {claim.text} (not measured)"
    interval = f"[{found.lo:+.4f}, {found.hi:+.4f}]"
    p = f"p {judged.p:.2g}" if judged.p >= SMALLEST_P else f"p < {SMALLEST_P:g}"
    return f"{MARKS[judged.verdict]:<9}  {claim.text}: {claim.metric} {found.value:+.4f} {interval}, {p}"


def show(result: Result, title: str, console: Console) -> None:
    """Print the table, the claims and the count."""
    console.print(f"[bold]{result.name}[/bold]  {title}", soft_wrap=True)
    table = RichTable(box=None, pad_edge=False, header_style="bold")
    paper = [i for i in range(len(result.metrics)) if any(row.paper[i] is not None for row in result.rows)]
    for label in result.labels:
        table.add_column(label, overflow="fold")
    for i, metric in enumerate(result.metrics):
        table.add_column(metric, justify="right")
        if i in paper:
            table.add_column("paper", justify="right")
    before: tuple[str, ...] = ()
    for row in result.rows:
        cells = ["" if row.labels[: i + 1] == before[: i + 1] else label for i, label in enumerate(row.labels)]
        for i in range(len(result.metrics)):
            cells.append(ours(row.ours[i]))
            cells += [number(row.paper[i])] if i in paper else []
        table.add_row(*cells)
        before = row.labels[:-1]
    console.print(table)
    _show_claims(result.claims, console)
    if result.apart:
        console.print("Beside the paper's signs, corrected among themselves and not counted:", highlight=False)
        _show_claims(result.apart, console)
    for note in result.notes:
        console.print(textwrap.fill(note, 78), highlight=False)
    console.print(f"[bold]{counted(result)}[/bold]\n", highlight=False)


def _show_claims(claims: list[Judged], console: Console) -> None:
    for judged in claims:
        lines = textwrap.wrap(claim_line(judged), width=78, subsequent_indent=" " * 11)
        console.print("\n".join(lines), style="dim" if judged.verdict == "open" else None, highlight=False)
