"""``rayfm reproduce`` on a terminal: progress per study, tables, the page."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from rayfm.cli.display import Display, console
from rayfm.config import ConfigError
from rayfm.config.quiet import quiet_libraries
from rayfm.pipeline.config import PipelineConfig
from rayfm.pipeline.stream import Watch


class Studies:
    """Shows one study after another."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Studies:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def started(self, config: PipelineConfig, number: int, count: int) -> Callable[[Watch], None]:
        """Close the display of the study before, and open this one's."""
        self._stack.close()
        console.print(f"study {number} of {count}")
        return self._stack.enter_context(Display(config)).update


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
    with Studies() as studies:
        done = reproduce(names, source, data, quick, numbers, folder, studies.started)
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
