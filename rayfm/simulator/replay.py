"""Requests of a period served once more, with other models in the place of some stages: same world, same requests.

What the cascade would have shown is worth what the truth says of it. Nothing is learned from it: the world and its
production models go on from what was really shown.

Shape letters: R requests, C candidates of a pool, A live ads, N rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayfm.schema import Schema
from rayfm.simulator.cascade import Scorer, run_cascade
from rayfm.simulator.config import STAGES
from rayfm.simulator.log import candidate_rows
from rayfm.simulator.production import single_thread
from rayfm.simulator.simulation import PeriodRecord, Simulation, best_value
from rayfm.simulator.world import Floats, Ints

Bools = npt.NDArray[np.bool_]


class Replay:
    """R requests of a period that ``simulation`` has served and not yet learned from.

    No request explores here: the value is that of what the models pick.

    Args:
        simulation: between its ``serve`` and its ``learn``, so that its production models are those that served.
        record: what it served.
        requests: ``[R]``, positions of the requests.

    Attributes:
        value: true expected CPM of every candidate, ``[R, C]``.
        best: that of the best possible choice, ``[R]`` float64.
        user: ``[R]``.
    """

    def __init__(self, simulation: Simulation, record: PeriodRecord, requests: Ints) -> None:
        self.config, self.record, self.requests = simulation.config, record, requests
        self.pool = record.outcome.pool[requests]
        self.user = record.observation.requests.user[requests]
        self.value = simulation.true_value(record, requests)
        self._bid = simulation.world.ad_bid
        self._production = dict(zip(STAGES, simulation.scorers(record.observation, requests), strict=True))
        widths = self.config.widths
        self._widths = (widths.retrieval, widths.early, widths.ranking)
        self.best = best_value(self.value, widths.ranking).sum(1, dtype=np.float64)

    def rows(self, schema: Schema, features: Collection[str], wanted: Bools) -> pa.Table:
        """The candidates where ``wanted`` ``[R, C]`` is true, as the log would have them; see `candidate_rows`."""
        row, column = np.nonzero(wanted)
        return candidate_rows(self.record, schema, features, self.requests[row], column)

    def passed(self, click: Floats) -> Bools:
        """What retrieval passes on where it predicts ``click`` ``[R, C]``: bool ``[R, C]``."""
        outcome = run_cascade(self.pool, self._bid, [self._stand_in(click)], self._widths[:1])
        kept = np.zeros(self.pool.shape, np.bool_)
        np.put_along_axis(kept, outcome.shown, True, axis=1)
        return kept

    def predicted(self, stage: str) -> Floats:
        """What the production model of a stage predicts of every candidate, ``[R, C]``."""
        with single_thread(self.config.seed):
            return self._production[stage](self.pool)

    def served(self, stand_ins: Mapping[str, Floats]) -> npt.NDArray[np.float64]:
        """True expected CPM of what the cascade shows each request, ``[R]``.

        Args:
            stand_ins: stage -> predictions ``[R, C]`` of the model in its place, NaN where it never has to say
                anything; the other stages keep their production models.

        Raises:
            ValueError: a stage is asked for a prediction that is NaN.
        """
        scorers = [self._stand_in(stand_ins[s]) if s in stand_ins else self._production[s] for s in STAGES]
        with single_thread(self.config.seed):
            outcome = run_cascade(self.pool, self._bid, scorers, self._widths)
        value: npt.NDArray[np.float64] = np.take_along_axis(self.value, outcome.shown, axis=1).sum(1, dtype=np.float64)
        return value

    def _stand_in(self, click: Floats) -> Scorer:
        by_ad = np.full((len(self.pool), len(self._bid)), np.nan, np.float32)
        np.put_along_axis(by_ad, self.pool, click, axis=1)

        def scorer(ads: Ints) -> Floats:
            found: Floats = np.take_along_axis(by_ad, ads, axis=1)
            if np.isnan(found).any():
                raise ValueError("a stage is asked for candidates that its model has not scored")
            return found

        return scorer
