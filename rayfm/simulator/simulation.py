"""The loop over periods: the world moves, the cascade serves, users react, the production models learn.

Shape letters: N rows of the log, R requests, K candidates of a stage.
"""

from __future__ import annotations

import dataclasses
from collections import deque

import numpy as np

from rayfm.simulator.cascade import Outcome, Scorer, run_cascade
from rayfm.simulator.config import STAGES, SimulatorConfig
from rayfm.simulator.features import (
    Observation,
    Observer,
    production_inputs,
    table_rows,
)
from rayfm.simulator.history import History
from rayfm.simulator.production import Impressions, ProductionModel, single_thread
from rayfm.simulator.requests import draw_requests
from rayfm.simulator.world import Floats, Ints, Truth, World, stream


@dataclasses.dataclass
class PeriodRecord:
    """What happened in a period, before any of it is written as a log."""

    number: int
    """Of the logged periods; negative for the bootstrap ones."""
    observation: Observation
    outcome: Outcome
    explored: Ints
    """Requests that showed random candidates."""
    labels: dict[str, Floats]
    """Task -> ``[R * k]`` labels of what was shown, request by request, best first."""


class Simulation:
    """A world with its cascade, moved on by `step`.

    The production models of a period have learnt from the impressions of earlier periods alone: `step` serves first
    and trains then. Between the two, `serve` and `learn`, other models can be asked what they would have shown.
    """

    def __init__(self, config: SimulatorConfig) -> None:
        self.config = config
        self.world = World(config)
        self.history = History(config)
        self.observer = Observer(self.world)
        self.inputs = production_inputs(config)
        self._unlearned = False
        self._windows: dict[str, deque[tuple[Impressions, ...]]] = {
            stage: deque(maxlen=config.production.window) for stage in STAGES
        }
        production = config.production
        shapes: dict[str, tuple[int, tuple[int, ...]]] = {
            "retrieval": (production.tower_dim, ()),
            "early": (production.early_hidden, (production.early_hidden,)),
            "ranking": (production.ranking_hidden[0], production.ranking_hidden),
        }
        with single_thread(config.seed):
            self.models = {
                stage: ProductionModel(
                    tuple(table_rows(config, name) for name in self.inputs[stage].request_ids),
                    tuple(table_rows(config, name) for name in self.inputs[stage].ad_ids),
                    len(self.inputs[stage].request_dense),
                    len(self.inputs[stage].ad_dense),
                    *shapes[stage],
                    production,
                )
                for stage in STAGES
            }

    @property
    def number(self) -> int:
        """Of the period that was last stepped through."""
        return self.world.period - self.config.bootstrap_periods

    def scorers(self, observation: Observation, requests: Ints | None = None) -> list[Scorer]:
        """The production models as the cascade's stages, as they stand; row r is ``requests[r]``, by default all."""

        def scorer(stage: str) -> Scorer:
            request = observation.side("request", self.inputs[stage])
            if requests is not None:
                request = request[requests]
            ad = observation.side("ad", self.inputs[stage])
            return lambda pool: self.models[stage].predict(request, ad, pool)

        return [scorer(stage) for stage in STAGES]

    def step(self) -> PeriodRecord:
        """The next period: the world moves on, requests are served, users react, the models train on what was shown."""
        record = self.serve()
        self.learn(record)
        return record

    def serve(self) -> PeriodRecord:
        """The first half of `step`: the next period's requests are served, and users react.

        Raises:
            ValueError: nothing has been learned from the period before yet.
        """
        if self._unlearned:
            raise ValueError(f"period {self.number} is served and not learned from; call learn first")
        config = self.config
        new_ads = self.world.advance()
        self.history.forget_ads(new_ads)
        self.observer.meet_ads(new_ads, self.world.period)
        requests = draw_requests(self.world)
        observation = self.observer.observe(self.world, self.history, requests)
        rng = stream(config.seed, "explore", self.world.period)
        # The very first period has no trained model: every request explores.
        share = config.exploration if self.world.period > 0 else 1.0
        explored = np.flatnonzero(rng.random(len(requests)) < share)
        chance = np.full(requests.pool.shape, np.nan, np.float32)
        chance[explored] = rng.random((len(explored), config.candidates), dtype=np.float32)
        with single_thread(config.seed):
            widths = (config.widths.retrieval, config.widths.early, config.widths.ranking)
            outcome = run_cascade(requests.pool, self.world.ad_bid, self.scorers(observation), widths, chance)
            request = np.repeat(np.arange(len(requests)), outcome.shown.shape[1])
            ad = outcome.ads(outcome.shown).reshape(-1)
            labels = self.truth(observation, request, ad).sample(stream(config.seed, "labels", self.world.period))
        self._unlearned = True
        return PeriodRecord(self.number, observation, outcome, explored, labels)

    def learn(self, record: PeriodRecord) -> None:
        """The second half of `step`: the models train on what was shown, and counts take it in.

        Raises:
            ValueError: ``record`` is of another period, or has been learned from.
        """
        self.check_current(record)
        if not self._unlearned:
            raise ValueError(f"period {self.number} has been learned from")
        self._unlearned = False
        requests, click = record.observation.requests, record.labels["click"]
        request = np.repeat(np.arange(len(requests)), record.outcome.shown.shape[1])
        ad = record.outcome.ads(record.outcome.shown).reshape(-1)
        with single_thread(self.config.seed):
            self._train(record.observation, request, ad, click)
        category = self.world.category_of[self.world.ad_campaign[ad]]
        self.history.add(requests.user[request], ad, self.world.ad_id[ad], category, requests.traffic[request], click)

    def truth(self, observation: Observation, request: Ints, ad: Ints) -> Truth:
        """The truth of N (request, position in the catalogue) rows of the current period."""
        asked = observation.requests
        return self.world.truth(
            asked.user[request], ad, asked.traffic[request], asked.hour[request], asked.device[request]
        )

    def served_value(self, record: PeriodRecord) -> tuple[float, float]:
        """True expected value (sum of click probability times bid) of what was shown, and of the best possible choice.

        Raises:
            ValueError: the world has moved on since ``record``.
        """
        value = self.true_value(record)
        served = np.take_along_axis(value, record.outcome.shown, axis=1)
        best = best_value(value, record.outcome.shown.shape[1])
        return float(served.sum(dtype=np.float64)), float(best.sum(dtype=np.float64))

    def true_value(self, record: PeriodRecord, requests: Ints | None = None) -> Floats:
        """True expected CPM (click probability times bid) of the pools ``[R, C]``; of ``requests`` alone if given.

        Raises:
            ValueError: the world has moved on since ``record``.
        """
        self.check_current(record)
        rows = np.arange(len(record.outcome.pool)) if requests is None else requests
        pool = record.outcome.pool[rows]
        flat = pool.reshape(-1)
        click = self.truth(record.observation, np.repeat(rows, pool.shape[1]), flat).click
        value: Floats = (click * self.world.ad_bid[flat]).reshape(pool.shape)
        return value

    def check_current(self, record: PeriodRecord) -> None:
        """Refuse a record of another period than the world's: the truth of that one is gone."""
        if record.number != self.number:
            raise ValueError(f"the world is in period {self.number}; it no longer knows the truth of {record.number}")

    def _train(self, observation: Observation, request: Ints, ad: Ints, click: Floats) -> None:
        """Each model trains on most of the window's impressions; its calibrator on those held out of every period."""
        rng = stream(self.config.seed, "train", self.world.period)
        held_out = rng.random(len(click)) < self.config.production.held_out
        for stage in STAGES:
            requests = observation.side("request", self.inputs[stage])[request]
            ads = observation.side("ad", self.inputs[stage])[ad]
            window, model = self._windows[stage], self.models[stage]
            window.append(tuple(Impressions(requests[rows], ads[rows], click[rows]) for rows in (~held_out, held_out)))
            train, calibrate = (list(parts) for parts in zip(*window, strict=True))
            model.fit(Impressions.join(train), int(rng.integers(2**31)))
            model.calibrate(Impressions.join(calibrate[-self.config.production.calibration_window :]))


def best_value(value: Floats, shown: int) -> Floats:
    """The ``shown`` largest values of each pool: ``[R, C] -> [R, shown]``."""
    best: Floats = -np.partition(-value, shown - 1, axis=1)[:, :shown]
    return best
