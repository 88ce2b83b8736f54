"""From events to labels, and corrections of labels."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rayfm.augment.rules import Int64, Rules
from rayfm.augment.state import EVENT_ID, STREAM, TASK, VALUE
from rayfm.config import DataError
from rayfm.schema import EXAMPLE_ID, TIME

Float64 = npt.NDArray[np.float64]

PERIOD, LABEL, PREVIOUS = "period", "label", "previous"

CORRECTIONS = pa.schema(
    [
        pa.field(EXAMPLE_ID, pa.int64()),
        pa.field(TIME, pa.int64()),
        pa.field(PERIOD, pa.string()),
        pa.field(TASK, pa.string()),
        pa.field(LABEL, pa.float32()),
        pa.field(PREVIOUS, pa.float32()),
    ]
)
"""``label`` takes the place of ``previous``; ``time`` and ``period`` are the example's."""


def label_columns(rules: Rules, tasks: tuple[int, ...], ids_N: Int64, feedback: pa.Table) -> list[pa.Array]:
    """The labels of the examples ``ids_N`` (unique) for each of ``tasks``: float32 ``[N]``, null where unknown.

    Args:
        rules: the join's.
        tasks: positions of tasks.
        ids_N: the examples.
        feedback: events in their windows; those of other examples are passed over.
    """
    order = np.argsort(ids_N, kind="stable")
    ranked = ids_N[order]
    ids = feedback[EXAMPLE_ID].to_numpy()
    place = np.minimum(np.searchsorted(ranked, ids), max(len(ranked) - 1, 0))
    hit = ranked[place] == ids if len(ranked) else np.zeros(len(ids), np.bool_)
    example = order[place[hit]] if len(ranked) else place[hit]
    # Sums of floats depend on their order: that of the events, not that in which they came.
    events = feedback.filter(pa.array(hit)).append_column("example", pa.array(example, pa.int64()))
    events = events.sort_by([(name, "ascending") for name in ("example", TASK, TIME, STREAM, EVENT_ID)])
    example, task = events["example"].to_numpy(), events[TASK].to_numpy().astype(np.int64)
    values = events[VALUE].to_numpy()
    columns = []
    for number in tasks:
        mine = task == number
        of, value = example[mine], values[mine]
        starts = np.flatnonzero(np.diff(of, prepend=-1))
        default = rules.defaults[number]
        label = np.full(len(ids_N), 0.0 if default is None else default, np.float64)
        unknown = np.full(len(ids_N), default is None)
        if len(of):
            label[of[starts]] = _reduce(rules.labels[number], value, starts)
            unknown[of] = False
        columns.append(pa.array(label.astype(np.float32), pa.float32(), mask=unknown))
    return columns


def _reduce(label: str, values: Float64, starts: Int64) -> Float64:
    """One value for each run of ``values`` that begins at ``starts``."""
    if label == "any":
        return np.ones(len(starts))
    if label == "max":
        return np.asarray(np.maximum.reduceat(values, starts))
    if label == "sum":
        return np.asarray(np.add.reduceat(values, starts))
    ends: Int64 = np.append(starts[1:], len(values)) - 1
    return np.asarray(values[ends])


def apply_corrections(examples: pa.Table, corrections: pa.Table) -> pa.Table:
    """Labelled examples with their corrections: the same rows, the task columns replaced where there is one.

    Args:
        examples: ``example_id`` and the tasks' columns; each example once.
        corrections: as `CORRECTIONS`, in the order of their batches; the last one of an (example, task) holds.

    Raises:
        DataError: a correction's task has no column.
    """
    ids = examples[EXAMPLE_ID].to_numpy()
    order = np.argsort(ids, kind="stable")
    for name in pc.unique(corrections[TASK]).to_pylist():
        if name not in examples.column_names:
            raise DataError(f"corrections of task {name!r}, which the examples lack; give the join's own examples")
        mine = corrections.filter(pc.equal(corrections[TASK], name))
        wanted = mine[EXAMPLE_ID].to_numpy()
        place = np.minimum(np.searchsorted(ids[order], wanted), max(len(ids) - 1, 0))
        hit = ids[order][place] == wanted if len(ids) else np.zeros(len(wanted), np.bool_)
        rows = order[place[hit]] if len(ids) else place[hit]
        # numpy keeps the last of several writes to one place.
        source = np.full(len(ids), -1, np.int64)
        source[rows] = np.flatnonzero(hit)
        new = mine[LABEL].combine_chunks().take(pa.array(source, mask=source < 0))
        old = examples[name].combine_chunks()
        column = pc.if_else(pa.array(source >= 0), new, old)
        examples = examples.set_column(examples.column_names.index(name), name, column)
    return examples
