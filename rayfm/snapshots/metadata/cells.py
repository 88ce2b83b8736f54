"""What `Tree` reads of ZooKeeper: cells, and which of a cell's children is the cell."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from kazoo.client import KazooClient
from kazoo.exceptions import NoNodeError

CELL = "="  # no key has such a part

_K = TypeVar("_K")


@dataclasses.dataclass(frozen=True)
class Stamp:
    """When the servers carried out a write."""

    zxid: int
    """Of the transaction: grows with every write to the ensemble."""

    seconds: float
    """Since 1970 on the server's clock."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """What a key's cell held when it was read."""

    path: str
    value: bytes
    version: int
    """How often `Tree.touch` changed it."""

    created: int
    """Transaction that put this value there."""

    seconds: float
    """When it was made or last touched, on the server's clock."""


def result(pending: Any, deadline: float) -> Any:
    """What a request gives, waited for up to ``deadline`` (`time.monotonic`)."""
    return pending.get(timeout=max(0.001, deadline - time.monotonic()))


def stamp_of(stat: Any) -> Stamp:
    """When the znode of ``stat`` was last written."""
    return Stamp(int(stat.mzxid), stat.mtime / 1e3)


def _cell(path: str, found: tuple[bytes, Any]) -> Cell:
    """A cell from the value and stat of its child."""
    value, stat = found
    return Cell(path, value, int(stat.version), int(stat.czxid), stat.mtime / 1e3)


def read_cells(client: KazooClient, paths: Iterable[str], deadline: float) -> list[Cell]:
    """Those that are there of a cell's children, the one that was written last at the end."""
    pending = [(path, client.get_async(path)) for path in paths]
    return sorted((_cell(path, found) for path, found in _present(pending, deadline)), key=lambda cell: cell.created)


def cells_below(client: KazooClient, base: str, prefix: str, deadline: float) -> dict[str, Cell]:
    """Key -> cell of the tree ``base`` below a prefix; level by level, each level's requests in flight together."""
    homes: list[str] = []
    level = [f"{base}/{prefix}".rstrip("/")]
    while level:
        below = [(path, client.get_children_async(path)) for path in level]
        level = []
        for path, names in _present(below, deadline):
            level += [f"{path}/{name}" for name in names if name != CELL]
            if CELL in names and path != f"{base}/{prefix}".rstrip("/"):
                homes.append(f"{path}/{CELL}")
    inner = [(home, client.get_children_async(home)) for home in homes]
    children = [(f"{home}/{name}", home) for home, names in _present(inner, deadline) for name in names]
    values = [((path, home), client.get_async(path)) for path, home in children]
    start, end = len(base) + 1, len(CELL) + 1
    cells = [(home[start:-end], _cell(path, found)) for (path, home), found in _present(values, deadline)]
    return dict(sorted(cells, key=lambda item: item[1].created))  # of several of one key, the one written last


def _present(pending: Iterable[tuple[_K, Any]], deadline: float) -> Iterator[tuple[_K, Any]]:
    """Results of those requests whose znode is there."""
    for key, awaited in pending:
        with contextlib.suppress(NoNodeError):
            yield key, result(awaited, deadline)
