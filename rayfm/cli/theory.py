"""``rayfm simulate`` on a terminal."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from rayfm.cli.display import console
from rayfm.theory.experiments import simulate


def simulate_and_show(names: list[str], folder: Path, quick: bool, seed: int) -> None:
    """Run the experiments, print what they found and where their figures are.

    Raises:
        ConfigError: an unknown name.
    """
    for finding, path in simulate(tuple(name for name in names if name != "all"), folder, quick, seed):
        table = Table(title=finding.title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for column in finding.columns:
            table.add_column(column, justify="right")
        for row in finding.rows:
            table.add_row(*row)
        console.print(table)
        console.print(f"{finding.says}\n[dim]{path}[/dim]\n")
