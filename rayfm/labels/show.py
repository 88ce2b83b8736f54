"""Looking into what is stored: statistics and rows of one teacher version and period, for people."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from rayfm.config import LabelError
from rayfm.labels.columns import EXAMPLE_ID, KIND, LANE, ROW, TASK_PREFIX, VERSION
from rayfm.labels.index import label_files, open_file, read_columns, row_groups
from rayfm.labels.store import LabelStore


@dataclasses.dataclass(frozen=True)
class TaskStatistics:
    """Predictions of one kind and task. Mean and the rest are of rows that have one; None where there are none."""

    kind: str
    task: str
    rows: int
    labelled: int
    mean: float | None
    std: float | None
    """Of these predictions, not an estimate for others."""

    low: float | None
    high: float | None


@dataclasses.dataclass
class _Moments:
    """Count, mean, squared deviations and bounds, gathered part by part (Chan et al. 1979)."""

    rows: int = 0
    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    low: float = math.inf
    high: float = -math.inf

    def add(self, rows: int, values: npt.NDArray[np.float64]) -> None:
        """Add ``rows`` rows with these predictions among them."""
        self.rows += rows
        if not len(values):
            return
        count, mean = len(values), float(values.mean())
        apart, total = mean - self.mean, self.count + count
        self.squares += float(((values - mean) ** 2).sum()) + apart * apart * self.count * count / total
        self.mean += apart * count / total
        self.count = total
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))


def statistics(store: LabelStore, teacher: str, version: str, period: str) -> list[TaskStatistics]:
    """What a teacher version says of a period, by kind and task. A row group is in memory at a time.

    Raises:
        LabelError: there is no such thing (naming what there is), or a file cannot be read.
    """
    moments: dict[tuple[str, str], _Moments] = {}
    for table in _tables(store, teacher, version, period, [KIND]):
        for kind in pc.unique(table[KIND]).to_pylist():  # at most two
            part = table.filter(pc.equal(table[KIND], kind))
            for task, name in _task_columns(table):
                values = part[name].drop_null().to_numpy().astype(np.float64)
                moments.setdefault((kind, task), _Moments()).add(part.num_rows, values)
    found = []
    for (kind, task), item in sorted(moments.items()):
        known = (item.mean, math.sqrt(item.squares / item.count), item.low, item.high) if item.count else (None,) * 4
        found.append(TaskStatistics(kind, task, item.rows, item.count, *known))
    return found


def sample(store: LabelStore, teacher: str, version: str, period: str, rows: int) -> pd.DataFrame:
    """The first ``rows`` rows of each lane: kind, lane, row, example_id, and a column per task.

    Raises:
        LabelError: as `statistics`.
    """
    place = [KIND, LANE, ROW]
    kept = pd.DataFrame(columns=[*place, EXAMPLE_ID])
    for table in _tables(store, teacher, version, period, [*place, EXAMPLE_ID]):
        names = {name: task for task, name in _task_columns(table)}
        part = table.to_pandas().rename(columns=names)
        both = pd.concat([kept, part]) if len(kept) else part
        kept = both.sort_values(place).groupby([KIND, LANE]).head(rows)
    return kept.reset_index(drop=True)


def _task_columns(table: pa.Table) -> list[tuple[str, str]]:
    """(task, column) of a table's predictions."""
    return [(name.removeprefix(TASK_PREFIX), name) for name in table.column_names if name.startswith(TASK_PREFIX)]


def _tables(store: LabelStore, teacher: str, version: str, period: str, columns: list[str]) -> Iterator[pa.Table]:
    """A version's rows of a period by row group, with the predictions that each file has."""
    table = store.open()
    if table is None:
        raise LabelError(f"{store.storage.table}: no labels yet; run `rayfm label` first")
    store.check_stored(table, teacher, version, period)
    for file in label_files(table, teacher, period):
        if not file.may_hold(version):
            continue
        opened = open_file(store.files, file.path)
        tasks = [name for name in opened.schema_arrow.names if name.startswith(TASK_PREFIX)]
        for group in row_groups(opened, file.path):
            if group.may_hold(version):
                part = read_columns(store.files, group, [VERSION, *columns, *tasks])
                yield part.filter(pc.equal(part[VERSION], version)).drop_columns([VERSION])
