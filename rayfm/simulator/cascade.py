"""The cascade: every stage ranks what the one before it passed on, and passes on its own best.

UKDSL section 3.2 and 4.1: S_0 is the pool, S_j what stage j passes on; only S_N is shown and gets labels.

Shape letters: R requests, K candidates that a stage scores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from rayfm.simulator.world import Floats, Ints

Scorer: TypeAlias = Callable[[Ints], Floats]
"""Probabilities of a click ``[R, K]`` of candidates ``[R, K]`` (positions in the catalogue); row r is request r."""


@dataclasses.dataclass
class StageOutcome:
    """What one stage saw and said."""

    column: Ints
    """Which candidates of the pool it scored ``[R, K]``, its best first."""
    click: Floats
    """Its predictions for them ``[R, K]``."""


@dataclasses.dataclass
class Outcome:
    """What the cascade did with R requests."""

    pool: Ints
    """Positions in the catalogue ``[R, C]``."""
    stages: list[StageOutcome]
    """Each stage scored what the one before it passed on."""
    shown: Ints
    """Columns of the pool that were shown ``[R, k]``, the best first."""

    def passed(self, stage: int) -> Ints:
        """Columns of the pool that ``stage`` passed on ``[R, k]`` (UKDSL's S_j), its best first."""
        return self.shown if stage == len(self.stages) - 1 else self.stages[stage].column[:, : self._width(stage)]

    def _width(self, stage: int) -> int:
        return int(self.stages[stage + 1].column.shape[1])

    def grid(self, stage: int) -> Floats:
        """A stage's predictions by column of the pool ``[R, C]``; NaN where it did not see the candidate."""
        grid = np.full(self.pool.shape, np.nan, np.float32)
        np.put_along_axis(grid, self.stages[stage].column, self.stages[stage].click, axis=1)
        return grid

    def said(self, stage: int, column: Ints) -> Floats:
        """A stage's predictions for columns of the pool: ``[R, K] -> [R, K]``."""
        return np.take_along_axis(self.grid(stage), column, axis=1)

    def ads(self, column: Ints) -> Ints:
        """Positions in the catalogue of columns of the pool: ``[R, K] -> [R, K]``."""
        return np.take_along_axis(self.pool, column, axis=1)


def run_cascade(
    pool: Ints,
    bid: Floats,
    scorers: Sequence[Scorer],
    widths: Sequence[int],
    explored: Floats | None = None,
) -> Outcome:
    """Pass the pools of R requests through the stages; each ranks by probability times bid (expected CPM).

    Args:
        pool: ``[R, C]`` positions in the catalogue.
        bid: money for a click, by position in the catalogue.
        scorers: one a stage, first to last.
        widths: how many candidates each stage passes on; the last is what is shown.
        explored: ``[R, C]`` random numbers that replace the CPM in requests where they are not NaN.
    """
    column = np.broadcast_to(np.arange(pool.shape[1]), pool.shape)
    stages = []
    for scorer, width in zip(scorers, widths, strict=True):
        ads = np.take_along_axis(pool, column, axis=1)
        click = scorer(ads)
        value = click * bid[ads]
        if explored is not None:
            chance = np.take_along_axis(explored, column, axis=1)
            value = np.where(np.isnan(chance), value, chance)
        order = np.argsort(-value, axis=1, kind="stable")
        column = np.take_along_axis(column, order, axis=1)
        stages.append(StageOutcome(column, np.take_along_axis(click, order, axis=1)))
        column = column[:, :width]
    return Outcome(pool, stages, column)
