"""Rewriting data files: the same rows of one teacher version, in fewer files, still sorted as the lanes are."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayfm.config import LabelError
from rayfm.labels.columns import EXAMPLE_ID, KIND, LANE, REPRESENTATION, ROW, VERSION
from rayfm.labels.files import Files
from rayfm.labels.index import LabelFile, RowGroup, open_file, row_groups, unreadable
from rayfm.labels.lane_file import data_path, parquet_writer, row_group_rows


@dataclasses.dataclass(frozen=True)
class Rewritten:
    """A data file that holds rows of others, and that no commit has named yet."""

    teacher: str
    period: str
    path: str
    bytes: int
    modified_ms: int
    stats: str
    rows: int


def rewrite(data: Files, sources: Sequence[LabelFile], version: str) -> Rewritten:
    """Write the rows of one version that some files hold to a new one, which stays invisible until a commit.

    Rows lie by kind, lane and position. A row group holds rows of one lane, so that a look-up reads only its own; it
    is as large as a lane file's, however small the sources' are. Values and representations are not touched. At most a
    row group of the sources and one of the new file are in memory, or a lane, where its row groups overlap.

    Args:
        data: the table's files.
        sources: files of one teacher and period, with the same columns.
        version: the teacher's; other versions' rows are left out.

    Raises:
        LabelError: a source is missing or corrupt, or a row stands twice; nothing is visible.
    """
    teacher, period = sources[0].teacher, sources[0].period
    schema = open_file(data, sources[0].path).schema_arrow.remove_metadata()
    path, statistics = data_path(teacher, period, f"{version}-compacted"), _Statistics(version)

    def write(file: Any) -> None:
        with parquet_writer(file, schema) as writer:
            for table in _row_groups(data, sources, version, row_group_rows(schema)):
                statistics.add(table)
                writer.write_table(table.cast(schema), row_group_size=table.num_rows)

    size, modified_ms = data.write(path, write)
    return Rewritten(teacher, period, path, size, modified_ms, statistics.json(), statistics.rows)


def _row_groups(data: Files, sources: Sequence[LabelFile], version: str, rows: int) -> Iterator[pa.Table]:
    """The rows by kind, lane and position, in tables of one lane and at most ``rows`` rows."""
    pieces: dict[tuple[str, int], list[RowGroup]] = {}
    for source in sources:
        for group in row_groups(open_file(data, source.path), source.path):
            for kind, lane in _lanes(data, group, version):
                pieces.setdefault((kind, lane), []).append(group)
    for (kind, lane), groups in sorted(pieces.items()):
        yield from _chunks(_lane(data, groups, version, kind, lane), rows)


def _lanes(data: Files, group: RowGroup, version: str) -> list[tuple[str, int]]:
    """Kind and lane of the version's rows in a row group."""
    if not group.may_hold(version):
        return []
    if group.place is not None:
        return [group.place[1:]]
    table = _read(data, group, [VERSION, KIND, LANE])
    table = table.filter(pc.equal(table[VERSION], version)).group_by([KIND, LANE]).aggregate([])
    return list(zip(table[KIND].to_pylist(), table[LANE].to_pylist(), strict=True))  # one item a lane


def _lane(data: Files, groups: list[RowGroup], version: str, kind: str, lane: int) -> Iterator[pa.Table]:
    """A lane's rows in the order of their positions."""

    def read(group: RowGroup) -> pa.Table:
        table = _read(data, group, None)
        if group.place is None:
            ours = pc.and_(pc.equal(table[KIND], kind), pc.equal(table[LANE], lane))
            table = table.filter(pc.and_(ours, pc.equal(table[VERSION], version)))
        return table

    if _apart(groups):
        yield from (read(group) for group in sorted(groups, key=lambda group: group.row.low or 0))
        return
    table = pa.concat_tables([read(group) for group in groups])
    row = table[ROW].to_numpy()
    order = np.argsort(row, kind="stable")
    twice = np.flatnonzero(np.diff(row[order]) == 0)
    if len(twice):
        raise LabelError(
            f"labels of {version} for {kind}/lane {lane}: row {row[order][twice[0]]} is labelled twice; expire the "
            "version, label again"
        )
    yield table.take(pa.array(order))


def _apart(groups: Sequence[RowGroup]) -> bool:
    """Whether row groups hold one lane's rows alone, at positions that do not overlap."""
    if any(group.place is None for group in groups):
        return False
    bounds = sorted(
        (group.row.low, group.row.high) for group in groups if group.row.low is not None and group.row.high is not None
    )
    return len(bounds) == len(groups) and all(before[1] < after[0] for before, after in itertools.pairwise(bounds))


def _chunks(tables: Iterator[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of ``rows`` rows, and a smaller one at the end."""
    kept: list[pa.Table] = []
    count = 0
    for table in tables:
        kept.append(table)
        count += table.num_rows
        while count >= rows:
            whole = pa.concat_tables(kept)
            yield whole.slice(0, rows)
            kept, count = [whole.slice(rows)], count - rows
    if count:
        yield pa.concat_tables(kept)


def _read(data: Files, group: RowGroup, columns: list[str] | None) -> pa.Table:
    file = open_file(data, group.path)
    try:
        return file.read_row_group(group.index, columns, use_threads=False).replace_schema_metadata(None)
    except (OSError, pa.ArrowInvalid) as error:
        raise unreadable(group.path, error) from None


class _Statistics:
    """What the log says of a file: row count, null counts, and the bounds of what look-ups prune by."""

    def __init__(self, version: str) -> None:
        self.rows = 0
        self._nulls: dict[str, int] = {}
        self._low: dict[str, Any] = {VERSION: version}
        self._high: dict[str, Any] = {VERSION: version}

    def add(self, table: pa.Table) -> None:
        self.rows += table.num_rows
        for name in table.column_names:
            if name != REPRESENTATION:
                self._nulls[name] = self._nulls.get(name, 0) + table[name].null_count
        for name in (KIND, LANE, ROW, EXAMPLE_ID):
            low, high = (pc.min_max(table[name])[end].as_py() for end in ("min", "max"))
            self._low[name] = min(low, self._low.get(name, low))
            self._high[name] = max(high, self._high.get(name, high))

    def json(self) -> str:
        return json.dumps(
            {"numRecords": self.rows, "nullCount": self._nulls, "minValues": self._low, "maxValues": self._high}
        )
