"""Coverage: labelled examples over all, by period, kind and traffic.

The label store knows no traffic; the example store does. The two are joined by example within a lane.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rayfm.config import DataError
from rayfm.data.store import ExampleStore
from rayfm.labels.columns import EXAMPLE_ID, KIND, LANE, VERSION, check_task, task_column
from rayfm.labels.delta import table_tasks
from rayfm.labels.index import LabelFile, RowGroup, label_files, open_file, predicted, read_columns, row_groups
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
        makers, parts = _makers(store, files, version)
        counts: dict[tuple[str, str, str, str], list[int]] = {}
        for kind, lane, ids, traffics, codes in _lanes(examples, name):
            totals = np.bincount(codes, minlength=len(traffics))
            labelled = _labelled(store, parts, version, kind, lane, counted, every=tasks is not None)
            for maker, made in makers:
                known = np.isin(ids, labelled[maker, made]) if (maker, made) in labelled else np.zeros(len(ids), bool)
                hits = np.bincount(codes[known], minlength=len(traffics))
                for traffic, hit, total in zip(traffics, hits.tolist(), totals.tolist(), strict=True):
                    count = counts.setdefault((maker, made, kind, traffic), [0, 0])
                    count[0], count[1] = count[0] + hit, count[1] + total
        for (maker, made, kind, traffic), (hit, total) in counts.items():
            rows.append(Coverage(maker, made, name, kind, traffic, hit, total))
    order: dict[str, int] = {kind: number for number, kind in enumerate(KINDS)}
    return sorted(rows, key=lambda row: (row.teacher, row.period, row.version, order.get(row.kind, 9), row.traffic))


def _makers(
    store: LabelStore, files: Sequence[LabelFile], version: str | None
) -> tuple[list[tuple[str, str]], list[tuple[str, RowGroup]]]:
    """Teachers and versions that have labelled a period, and the row groups with what they said, by teacher."""
    makers: set[tuple[str, str]] = set()
    parts: list[tuple[str, RowGroup]] = []
    for file in files:
        if file.version.only is not None:  # also a file without rows: of a lane without
            makers.add((file.teacher, file.version.only))
        for group in row_groups(open_file(store.files, file.path), file.path):
            if group.may_hold(version):
                parts.append((file.teacher, group))
                if group.version.only is None:
                    held = pc.unique(read_columns(store.files, group, [VERSION])[VERSION]).to_pylist()
                else:
                    held = [group.version.only]
                makers |= {(file.teacher, made) for made in held}
    return sorted(maker for maker in makers if version in (None, maker[1])), parts


def _labelled(
    store: LabelStore,
    parts: Sequence[tuple[str, RowGroup]],
    version: str | None,
    kind: str,
    lane: int,
    tasks: tuple[str, ...],
    every: bool,
) -> dict[tuple[str, str], Int64]:
    """(teacher, version) -> ids of the examples of a lane that are labelled."""
    found: dict[tuple[str, str], list[Int64]] = {}
    for teacher, group in parts:
        if not group.may_hold(version, kind, lane):
            continue
        place = () if group.place is not None else (VERSION, KIND, LANE)
        table = read_columns(store.files, group, [EXAMPLE_ID, *map(task_column, tasks), *place])
        table = table.filter(predicted(table, every))
        if group.place is not None:
            found.setdefault((teacher, group.place[0]), []).append(table[EXAMPLE_ID].to_numpy())
            continue
        table = table.filter(pc.and_(pc.equal(table[KIND], kind), pc.equal(table[LANE], lane)))
        for made in pc.unique(table[VERSION]).to_pylist():  # one turn a version
            ours = table.filter(pc.equal(table[VERSION], made))
            found.setdefault((teacher, made), []).append(ours[EXAMPLE_ID].to_numpy())
    return {maker: np.concatenate(ids) for maker, ids in found.items()}


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
