"""Coverage: labelled examples over all, by period, kind and traffic.

The label store knows no traffic; the example store does. The two are joined by example within a lane.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rayfm.config import DataError
from rayfm.data.store import ExampleStore
from rayfm.labels.columns import EXAMPLE_ID, KIND, LANE, VERSION, check_task, task_column
from rayfm.labels.delta import table_tasks
from rayfm.labels.index import LabelFile, label_files, open_file, predicted, read_columns, row_groups
from rayfm.labels.store import LabelStore
from rayfm.schema import KINDS, TRAFFIC

Int64 = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Coverage:
    """How much of the examples of one period, kind and traffic a teacher version has labelled."""

    teacher: str
    version: str
    period: str
    kind: str
    traffic: str
    labelled: int
    """Examples with a prediction."""

    total: int
    """Examples, at least 1."""

    @property
    def share(self) -> float:
        """Labelled over total."""
        return self.labelled / self.total


def coverage(
    store: LabelStore,
    examples: ExampleStore,
    teacher: str | None = None,
    version: str | None = None,
    period: str | None = None,
    tasks: Sequence[str] | None = None,
    table_version: int | None = None,
) -> list[Coverage]:
    """Coverage by teacher, version, period, kind and traffic, sorted so.

    Of a period without a label of any version nothing is said. Kinds that a version has not labelled at all are
    listed, with 0 labelled. One lane's ids are in memory at a time.

    Args:
        store: the labels.
        examples: the examples that they are of.
        teacher, version, period: which; None: all.
        tasks: an example counts if it has a prediction for each of these; None: for any task.
        table_version: the version of the label table to count in, such as a pin's; None: the newest.

    Raises:
        LabelError: a task that has no column, or a label file that cannot be read.
        DataError: a labelled period is not in the example store, or a lane of it cannot be read.
    """
    table = store.open(table_version)
    if table is None:
        return []
    all_tasks = table_tasks(table)
    for task in tasks or ():
        check_task(task, all_tasks, store.storage.table)
    counted = tuple(all_tasks if tasks is None else tasks)
    by_period: dict[str, list[LabelFile]] = {}
    for file in label_files(table, teacher, period):
        if file.may_hold(version):
            by_period.setdefault(file.period, []).append(file)
    rows = []
    for name, files in sorted(by_period.items()):
        labelled = _labelled(store, files, version, counted, every=tasks is not None)
        counts: dict[tuple[str, str, str, str], list[int]] = {}
        for kind, lane, ids, traffics, codes in _lanes(examples, name):
            totals = np.bincount(codes, minlength=len(traffics))
            for (maker, made), lanes in labelled.items():
                known = lanes.get((kind, lane))
                hits = np.zeros(len(traffics), np.int64)
                if known is not None:
                    hits = np.bincount(codes[np.isin(ids, known)], minlength=len(traffics))
                for traffic, hit, total in zip(traffics, hits.tolist(), totals.tolist(), strict=True):
                    count = counts.setdefault((maker, made, kind, traffic), [0, 0])
                    count[0], count[1] = count[0] + hit, count[1] + total
        for (maker, made, kind, traffic), (hit, total) in counts.items():
            rows.append(Coverage(maker, made, name, kind, traffic, hit, total))
    order: dict[str, int] = {kind: number for number, kind in enumerate(KINDS)}
    return sorted(rows, key=lambda row: (row.teacher, row.period, row.version, order.get(row.kind, 9), row.traffic))


def _labelled(
    store: LabelStore, files: Sequence[LabelFile], version: str | None, tasks: tuple[str, ...], every: bool
) -> dict[tuple[str, str], dict[tuple[str, int], Int64]]:
    """(teacher, version) -> kind and lane -> ids of the examples that are labelled."""
    found: dict[tuple[str, str], dict[tuple[str, int], list[Int64]]] = {}
    for file in files:
        if file.rows == 0 and file.place is not None:
            found.setdefault((file.teacher, file.place[0]), {})
            continue
        for group in row_groups(open_file(store.files, file.path), file.path):
            if not group.may_hold(version):
                continue
            columns = [
                EXAMPLE_ID,
                *map(task_column, tasks),
                *(() if group.place is not None else (VERSION, KIND, LANE)),
            ]
            table = read_columns(store.files, group, columns)
            ids, flag = table[EXAMPLE_ID].to_numpy(), predicted(table, every).to_numpy()
            for (made, kind, lane), rows in _places(group.place, table):
                if version is None or made == version:
                    lanes = found.setdefault((file.teacher, made), {})
                    lanes.setdefault((kind, lane), []).append(ids[rows][flag[rows]])
    return {maker: {place: np.concatenate(parts) for place, parts in lanes.items()} for maker, lanes in found.items()}


def _places(place: tuple[str, str, int] | None, table: pa.Table) -> Iterator[tuple[tuple[str, str, int], Any]]:
    """Version, kind and lane, and which rows of a row group are theirs."""
    if place is not None:
        yield place, slice(None)
        return
    names = (VERSION, KIND, LANE)
    keys = table.select(names).group_by(list(names)).aggregate([])
    for values in zip(*(keys[name].to_pylist() for name in names), strict=True):  # one turn a lane
        same = [pc.equal(table[name], value).to_numpy() for name, value in zip(names, values, strict=True)]
        yield values, same[0] & same[1] & same[2]


def _lanes(examples: ExampleStore, period: str) -> Iterator[tuple[str, int, Int64, list[str], Int64]]:
    """Kind and lane, ids ``[n]``, traffics, and each row's position among them ``[n]``, of a period's lanes."""
    for file in examples.manifest(period).files:
        lane = examples.open_lane(period, file.kind, file.lane)
        try:
            table = lane.read([EXAMPLE_ID, TRAFFIC], use_threads=False)
        except (OSError, pa.ArrowInvalid) as error:
            path = examples.lane_path(period, file.kind, file.lane)
            raise DataError(f"{path}: corrupt Parquet file ({error}); prepare period {period} again") from None
        codes = table[TRAFFIC].combine_chunks().dictionary_encode()
        traffics = codes.dictionary.to_pylist()
        yield file.kind, file.lane, table[EXAMPLE_ID].to_numpy(), traffics, codes.indices.to_numpy().astype(np.int64)
