"""``rayfm select`` on a terminal: progress of the training and of Algorithm 1, the ranked table, the lists."""

from __future__ import annotations

import time
from pathlib import Path

from rich.table import Table

from rayfm.cli.display import Display, console
from rayfm.pipeline.config import PipelineConfig
from rayfm.pipeline.select import SelectResult, select, select_folder
from rayfm.selection.combine import WAYS
from rayfm.selection.result import FIGURE, LISTS, Selection

LETTERS = {
    "impressions_only": "I",
    "considerations_only": "C",
    "average_rank": "r",
    "average_importance": "a",
    "intersection": "n",
    "union": "u",
}
"""Way -> how the table says that its list has a feature."""

ROWS = 60
"""Features that the table shows, the best of either ranking; the CSV has all."""


class SelectDisplay(Display):
    """A run's progress, with a bar more for the work items that are scored."""

    def __enter__(self) -> SelectDisplay:
        console.print(
            f"select [bold]{self.config.name}[/bold] -> {select_folder(self.config)}  (starting Ray takes a while)",
            soft_wrap=True,
        )
        if console.is_terminal:
            self._progress.start()
        return self

    def scored(self, done: int, total: int) -> None:
        """Show how many work items are scored."""
        self._show("score", "score features", done, total, "")
        if not console.is_terminal and time.monotonic() - self._logged >= self.interval_s:
            self._log()


def select_and_show(config: PipelineConfig, resume: bool, overwrite: bool) -> None:
    """Select, print the ranking, and say where the lists are.

    Raises:
        RayfmError: as `rayfm.pipeline.select.select`.
    """
    with SelectDisplay(config) as display:
        result = select(config, resume, overwrite, display.update, display.scored)
    print_selection(result)


def print_selection(result: SelectResult) -> None:
    """The ranking, the lists and their files."""
    selection = result.selection
    console.print(
        "Change of the loss when a feature is shuffled, %: mean ± deviation.\n"
        f"Measured on {', '.join(selection.withheld)}:",
        highlight=False,
    )
    for kind, found in selection.measured.items():
        console.print(f"  {found.rows:,} {kind}s in {found.batches} batches, loss {found.loss:.4f}", highlight=False)
    console.print(importance_table(selection))
    left_out = len(selection.candidates) - ROWS
    if left_out > 0:
        console.print(f"[dim]and {left_out} more in selection.csv[/dim]")
    console.print()
    console.print(list_table(selection))
    console.print(f"{result.seconds:.0f} s. Figure: {_short(result.folder / FIGURE)}", soft_wrap=True)
    console.print(f"Lists: {_short(result.folder / LISTS)}/<list>.yaml", soft_wrap=True)
    console.print("A model takes one with [bold]features: {include: FILE}[/bold]", highlight=False)


def importance_table(selection: Selection) -> Table:
    """Rank, loss change and deviation of each feature on both kinds; 80 columns wide."""
    kinds = selection.measured
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("feature", overflow="ellipsis", no_wrap=True, max_width=24)
    for kind in kinds:
        table.add_column("#", justify="right")
        table.add_column(f"{kind}s", justify="right", no_wrap=True)
    table.add_column("lists", no_wrap=True)
    for name in selection.by_rank()[:ROWS]:
        cells = [name]
        for found in kinds.values():
            feature = found.features[name]
            text = f"{100 * feature.mean / found.loss:+.3f} ±{100 * feature.deviation / found.loss:.3f}"
            cells += [str(feature.rank), text if feature.matters else f"[dim]{text}[/dim]"]
        chosen = selection.chosen_by(name)
        cells.append("".join(letter if way in chosen else "·" for way, letter in LETTERS.items()))
        table.add_row(*cells)
    return table


def list_table(selection: Selection) -> Table:
    """How many features each list has."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    table.add_column("list")
    table.add_column("features", justify="right")
    table.add_column("what it is")
    for way, features in selection.lists.items():
        what = WAYS.get(way, f"a union of at most {selection.top_k}")
        table.add_row(LETTERS.get(way, ""), way, str(len(features)) if features else "none", what)
    return table


def _short(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
