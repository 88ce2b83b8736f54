"""``rayfm reproduce`` on a terminal: progress per study, tables, the page."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from rayfm.cli.display import console
from rayfm.config import ConfigError
from rayfm.quiet import quiet_libraries

if TYPE_CHECKING:
    from rayfm.reproduce.runner import Progress


class Ended:
    """A line for each study that has ended, with the seconds since the start: in a log, where no bar can move."""

    def __init__(self, console: Console) -> None:
        self._console, self._start = console, time.monotonic()
        self._said: set[str] = set()

    def update(self, studies: list[Progress]) -> None:
        """As `rayfm.reproduce.runner.Watch`."""
        for study in studies:
            if study.done >= study.total and study.study not in self._said:
                self._said.add(study.study)
                seconds = time.monotonic() - self._start
                self._console.print(f"{seconds:7.0f} s  {study.study} ({study.models} models)", highlight=False)


def reproduce_and_show(
    names: list[str], source: str | None, data: str | None, quick: bool, seeds: str, folder: Path
) -> None:
    """Reproduce tables, print them, write the page and say where it is.

    Raises:
        ConfigError: seeds that are no numbers, an unknown table or source.
    """
    quiet_libraries()
    from rayfm.reproduce.html import write_tables
    from rayfm.reproduce.run import reproduce
    from rayfm.reproduce.show import show
    from rayfm.reproduce.table import TABLES

    try:
        numbers = tuple(int(seed) for seed in seeds.split(","))
    except ValueError:
        raise ConfigError(f"--seeds {seeds!r}: give whole numbers separated by commas, e.g. 1,2,3") from None
    console.print(f"reproducing in {folder} (starting Ray takes a while)")
    bars = Bars(
        TextColumn("{task.description:<34}"), BarColumn(bar_width=22), TaskProgressColumn(), TimeElapsedColumn(),
        console=console, refresh_per_second=2,
    )  # fmt: skip
    tasks: dict[str, TaskID] = {}
    ended = Ended(console)

    def watch(studies: list[Progress]) -> None:
        if not console.is_terminal:
            ended.update(studies)
            return
        for study in studies:
            if study.study not in tasks:
                tasks[study.study] = bars.add_task(f"{study.study} ({study.models} models)", total=study.total)
            bars.update(tasks[study.study], completed=study.done)

    with bars:
        done = reproduce(names, source, data, quick, numbers, folder, watch)
    for result in done.results:
        show(result, TABLES[result.name].title, console)
    for name, reason in done.left_out.items():
        console.print(f"left out: {name}: {reason}", highlight=False)
    held = sum(result.counted()["held"] for result in done.results)
    claims = sum(len(result.claims) for result in done.results)
    facts = {
        "tables": str(len(done.results)),
        "signs held": f"{held} of {claims}",
        "seeds": ", ".join(map(str, numbers[:1] if quick else numbers)),
        "size": "quick: shows that it works, not what holds" if quick else "full",
    }
    page = write_tables(done.results, facts, folder / ("quick.html" if quick else "tables.html"))
    trained = f"trained in {done.seconds:.0f} s" if done.seconds > 1 else "trained before"
    console.print(
        f"{held} of {claims} signs held in {len(done.results)} tables, {trained}. Report: {page}", soft_wrap=True
    )
