"""A Ray Data task that reads a run of steps. Imports no torch: a task's process would spend seconds on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayfm.config import RayfmError
from rayfm.data.steps import (
    KIND,
    REPRESENTATION,
    REPRESENTATION_MASK,
    STEP,
    SUPERVISION,
    SUPERVISION_MASK,
    LaneCache,
    ReadPlan,
    read_steps,
)
from rayfm.data.task_errors import error_block


def rank_lanes(lanes: int, rank: int, world: int) -> list[int]:
    """Lanes of a rank: ``rank, rank + world, ...``."""
    return list(range(rank, lanes, world))


class ReadSpan:
    """Reads spans of steps for one rank, each into one Arrow block; keeps lane boundaries between them.

    Args:
        plan: what to read. Its look-ups travel along.
        spans: (period, first step, last step exclusive); the tasks' input names one by its place here.
        lanes: lanes of each span's period.
        rank, world: which lanes are ours.
    """

    def __init__(
        self, plan: ReadPlan, spans: Sequence[tuple[str, int, int]], lanes: Sequence[int], rank: int, world: int
    ) -> None:
        self.plan, self.spans, self.lanes, self.rank, self.world = plan, spans, lanes, rank, world
        self._cache: LaneCache | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": None}

    def __call__(self, block: pa.Table) -> pa.Table:
        """The rows of the span that a block of one row, ``span``, names; what is refused, as an error's block."""
        try:
            return self._read(block["span"][0].as_py())
        except RayfmError as error:
            return error_block(error)

    def _read(self, position: int) -> pa.Table:
        if self._cache is None:
            self._cache = LaneCache(self.plan)
        period, first, last = self.spans[position]
        lanes = rank_lanes(self.lanes[position], self.rank, self.world)
        rows = read_steps(self.plan, self._cache, period, lanes, first, last)
        table = (
            rows.ordered()
            .append_column(STEP, pa.array(rows.step))
            .append_column(KIND, pa.array(rows.kind))
            .append_column(SUPERVISION, matrix_column(rows.supervision))
            .append_column(SUPERVISION_MASK, matrix_column(rows.supervision_mask.astype(np.uint8)))
        )
        if rows.representation is not None and rows.representation_mask is not None:
            table = table.append_column(REPRESENTATION, matrix_column(rows.representation)).append_column(
                REPRESENTATION_MASK, matrix_column(rows.representation_mask.astype(np.uint8))
            )
        return table


def matrix_column(values: npt.NDArray[Any]) -> pa.Array:
    """``[N, S]`` as an Arrow column of fixed-size lists (an all-null column where S is 0)."""
    rows, width = values.shape
    if width == 0:
        return pa.nulls(rows)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), width)
