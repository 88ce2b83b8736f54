"""``rayfm reproduce``: from names of tables to filled tables."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

from rayfm.config import ConfigError, nearest
from rayfm.reproduce.runner import Runner, Watch
from rayfm.reproduce.scope import SIMULATOR, open_scope
from rayfm.reproduce.study import Study, merge
from rayfm.reproduce.table import TABLES, Result, Table

ALL = "all"


@dataclasses.dataclass(frozen=True)
class Reproduced:
    """What a call of ``reproduce`` gives."""

    results: list[Result]
    left_out: dict[str, str]
    """Table -> why it could not be run on this source."""
    seconds: float
    """Spent on training; 0 where all was trained before."""


def reproduce(
    names: list[str],
    source: str | None = None,
    data: str | None = None,
    quick: bool = False,
    seeds: tuple[int, ...] = (1, 2, 3),
    folder: str | Path = "runs/reproduce",
    watch: Watch | None = None,
) -> Reproduced:
    """Reproduce tables. Tables on one source share teachers and readers, and nothing is trained twice.

    Args:
        names: tables, or ``all``.
        source: a source's name or a pipeline's YAML file; by default each table's own.
        data: folder of the source's files, for tables that read files. The simulator's tables need none.
        quick: everything small, to see that it works; the numbers mean nothing.
        seeds: student seeds.
        folder: where data and runs lie.
        watch: called twice a second while studies run.

    Raises:
        ConfigError: an unknown table or source, or one table alone that the source cannot fill.
    """
    known = list(TABLES)
    for name in names:
        if name != ALL and name not in known:
            raise ConfigError(f"unknown table {name!r}{nearest(name, known)}")
    tables = {name: TABLES[name]() for name in (known if ALL in names else names)}
    by_source: dict[str, dict[str, Table]] = {}
    for name, table in tables.items():
        by_source.setdefault(source or table.source, {})[name] = table
    results: dict[str, Result] = {}
    left_out: dict[str, str] = {}
    seconds = 0.0
    for each, members in by_source.items():
        scope = open_scope(each, None if each == SIMULATOR else data, seeds, quick)
        runner = Runner(scope, folder)
        wanted: dict[str, list[Study]] = {}
        with contextlib.ExitStack() as session:
            for name, table in members.items():
                try:
                    selection = table.selection(scope, str(runner.folder))
                    if selection is not None:
                        table.lists, took = runner.select(selection, session)
                        seconds += took
                    wanted[name] = table.studies(scope)
                except ConfigError as error:
                    if len(tables) == 1:
                        raise
                    left_out[name] = str(error)
            seconds += runner.run(merge(study for studies in wanted.values() for study in studies), watch)
        results |= {name: members[name].fill(scope, runner) for name in wanted}
    return Reproduced([results[name] for name in tables if name in results], left_out, seconds)
