"""``rayfm augment`` on a terminal."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

_TOTALS = {
    "joined": "labelled examples",
    "late_dropped": "late feedback, dropped",
    "corrections": "corrections",
    "duplicate_impressions": "duplicate impressions",
    "duplicate_events": "duplicate events",
    "orphans": "orphans: no impression came",
    "late_impressions": "late impressions",
    "before_impression": "feedback before its impression",
    "after_window": "feedback after its window",
    "bad": "rows that cannot be read",
}
"""Counts of a batch that are summed, and what they are called."""


def augment(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The join's YAML file.", show_default=False)],
    through: Annotated[
        datetime.datetime | None,
        typer.Option(
            "--through",
            formats=["%Y-%m-%d", "%Y-%m-%dT%H", "%Y-%m-%dT%H:%M", "%Y-%m-%dT%H:%M:%S"],
            help="Every row with an earlier event time is in the logs (UTC), whatever the streams say.",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. --set late=correct.")
    ] = None,
) -> None:
    """Join impressions with their feedback, and let teachers score what becomes complete."""
    from rich.console import Console

    from rayfm.augment.config import load_augment
    from rayfm.augment.join import FeedbackJoin
    from rayfm.augment.random_logs import write_random_logs

    console = Console(soft_wrap=True, highlight=False)
    loaded = load_augment(config, set_)
    if write_random_logs(loaded):
        console.print(f"random logs -> {loaded.impressions.path} and {len(loaded.feedback)} streams of feedback")
    totals: dict[str, int] = dict.fromkeys(_TOTALS, 0)
    rows: dict[str, int] = {}
    complete: list[str] = []
    last: dict[str, Any] = {}

    def watch(counts: dict[str, Any]) -> None:
        for key in totals:
            totals[key] += counts[key]
        for stream, number in counts["rows"].items():
            rows[stream] = rows.get(stream, 0) + number
        complete.extend(counts["complete"])
        last.update(counts)

    with FeedbackJoin(loaded) as join, console.status("joining"):
        batches = join.run(through, watch)
    read = ", ".join(f"{number:,} {stream}" for stream, number in rows.items()) or "nothing new"
    console.print(f"[bold]{loaded.root}[/bold]  {batches} {'batch' if batches == 1 else 'batches'}: {read}")
    if batches:
        for key, text in _TOTALS.items():
            if totals[key]:
                console.print(f"  {totals[key]:>10,}  {text}")
        console.print(f"  {last['open']:>10,}  impressions wait for their windows; watermark {last['watermark']}")
    if complete:
        console.print(f"  complete: {', '.join(complete)}")
    if loaded.labelling is not None:
        _score(loaded, console)


def _score(loaded: Any, console: Any) -> None:
    from rayfm.quiet import quiet_libraries

    quiet_libraries()
    from rayfm.augment.labelling import label_windows

    scored: dict[tuple[str, str, str], int] = {}

    def watch(counts: dict[str, Any]) -> None:
        place = (counts["teacher"], counts["version"], counts["period"])
        scored[place] = scored.get(place, 0) + counts["scored"]

    with console.status("scoring"):
        label_windows(loaded, watch=watch)
    for (teacher, version, period), rows in scored.items():
        console.print(f"  {rows:>10,}  examples of {period} scored by {teacher}@{version}")
