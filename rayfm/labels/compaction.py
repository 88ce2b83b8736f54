"""Compaction: the many small files of a period become few large ones, with the same rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import pyarrow as pa

from rayfm.config import LabelError
from rayfm.labels.delta import Change, apply, taking_turns
from rayfm.labels.index import LabelFile, label_files, open_file
from rayfm.labels.rewrite import Rewritten, rewrite
from rayfm.labels.store import LabelStore

TARGET_BYTES = 128 << 20
"""Size of a compacted file, about. A file of at least half of it is left as it is."""


@dataclasses.dataclass(frozen=True)
class Compacted:
    """What a compaction did to a teacher's period."""

    teacher: str
    period: str
    files_before: int
    """Files that were replaced."""

    files_after: int
    rows: int
    """Rows that they hold, all of which stayed."""

    table_version: int


def compact(
    store: LabelStore,
    teacher: str | None = None,
    period: str | None = None,
    target_bytes: int = TARGET_BYTES,
) -> list[Compacted]:
    """Rewrite small files into large ones, one commit a teacher and period.

    Rows, values and representations stay bit by bit, and so does what is known of committed lanes and of application
    transactions. The old files stay for who pinned, or has open, an older version of the table, until vacuum. Other
    writers go on: files are written before the commit, and the commit is repeated until its turn comes. Files that
    somebody else has replaced or expired meanwhile are left alone. A kill leaves the table as it was, and files that
    vacuum takes. Files without rows (of empty lanes), and those of several versions that another program wrote, stay.

    Args:
        store: the store.
        teacher, period: which ones; None: all.
        target_bytes: size of a file.

    Raises:
        LabelError: a file cannot be read or written, or a row stands twice.
    """
    table = store.open()
    if table is None:
        return []
    small = [file for file in label_files(table, teacher, period) if file.rows and 2 * file.bytes < target_bytes]
    parts: dict[tuple[str, str], list[LabelFile]] = {}
    for file in small:
        parts.setdefault((file.teacher, file.period), []).append(file)
    done = (_compact(store, files, target_bytes) for _, files in sorted(parts.items()))
    return [item for item in done if item is not None]


def _compact(store: LabelStore, small: Sequence[LabelFile], target_bytes: int) -> Compacted | None:
    """Compact small files of one teacher and period."""
    written: list[tuple[list[LabelFile], Rewritten]] = []
    for version, sources in _bins(store, small, target_bytes):
        try:
            written.append((sources, rewrite(store.files, sources, version)))
        except LabelError:
            if _stands(store, sources):
                raise  # else another writer took the files out, and vacuum deleted them

    def attempt() -> Compacted | None:
        table = store.open()
        assert table is not None
        paths = {file.path for file in label_files(table, small[0].teacher, small[0].period)}
        there = {file.path for file in store.written([new for _, new in written])}  # vacuum takes old orphans
        ours = [
            (sources, new)
            for sources, new in written
            if new.path in there and all(file.path in paths for file in sources)
        ]
        if not ours:
            return None
        replaced = [file for sources, _ in ours for file in sources]
        new = [file for _, file in ours]
        version = apply(table, Change(add=new, remove=replaced, same_rows=True))
        rows = sum(file.rows for file in new)
        return Compacted(small[0].teacher, small[0].period, len(replaced), len(new), rows, version)

    return taking_turns(store.storage, attempt, "compact") if written else None


def _stands(store: LabelStore, sources: Sequence[LabelFile]) -> bool:
    table = store.open()
    paths = (
        set() if table is None else {file.path for file in label_files(table, sources[0].teacher, sources[0].period)}
    )
    return all(file.path in paths for file in sources)


def _bins(store: LabelStore, small: Sequence[LabelFile], target_bytes: int) -> Iterator[tuple[str, list[LabelFile]]]:
    """Version and files to be made one: of the same columns, so that a task or representation that a file lacks does
    not become one that is null, and neighbours by kind and lane.
    """
    alike: dict[tuple[str, pa.Schema], list[LabelFile]] = {}
    for file in small:
        if file.version.only is not None:
            schema = _columns(store, file)
            if schema is not None:
                alike.setdefault((file.version.only, schema), []).append(file)
    for (version, _), files in alike.items():
        bins: list[list[LabelFile]] = [[]]
        for file in sorted(files, key=lambda file: (str(file.kind.low), file.lane.low or 0, file.path)):
            if bins[-1] and sum(other.bytes for other in bins[-1]) + file.bytes > target_bytes:
                bins.append([])
            bins[-1].append(file)
        yield from ((version, sources) for sources in bins if len(sources) > 1)


def _columns(store: LabelStore, file: LabelFile) -> pa.Schema | None:
    """The file's columns; None where another writer took it out, and vacuum deleted it."""
    try:
        return open_file(store.files, file.path).schema_arrow.remove_metadata()
    except LabelError:
        if _stands(store, [file]):
            raise
        return None
