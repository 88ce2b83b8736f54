"""The simulator's parameters. The defaults are frozen: they were fixed before any distillation ran on these worlds."""

from __future__ import annotations

import datetime
from typing import Literal

from pydantic import Field, model_validator

from rayfm.config import Config
from rayfm.data.sources.base import SourceConfig

STAGES = ("retrieval", "early", "ranking")
"""The cascade's production models, first to last."""

SHOWN = "shown"
"""``stage_reached`` of an impression."""


class TrafficConfig(Config):
    """One surface."""

    name: str
    share: float = Field(gt=0)
    """Share of the requests, relative to the other surfaces'."""
    base_logit: float
    """Log-odds of a click before user, ad and context add theirs."""


class WidthsConfig(Config):
    """How many candidates of a request each stage passes on."""

    retrieval: int = Field(40, gt=0)
    early: int = Field(20, gt=0)
    ranking: int = Field(3, gt=0)
    """The ads that are shown."""


class ConsiderationShareConfig(Config):
    """Share of the considerations that the log keeps, by the last stage that scored them (``stage_reached``).

    A kept row's ``sampling_weight`` is the inverse of its share. Rows that retrieval dropped are many, and have no
    prediction of a later stage: by default none is logged.
    """

    retrieval: float = Field(0.0, ge=0, le=1)
    early: float = Field(0.2, ge=0, le=1)
    ranking: float = Field(0.2, ge=0, le=1)


class WorldConfig(Config):
    """The truth: how strongly each factor moves the log-odds of a click, and how well the log observes the latents."""

    latent_dim: int = Field(8, gt=1)
    hidden_dim: int = Field(24, gt=0)
    network_scale: float = Field(1.1, ge=0)
    """Standard deviation, in log-odds, of the random two-layer network of user, ad and context latents."""
    product_scale: float = Field(0.8, ge=0)
    """Standard deviation of the sum of the products of user and ad latents."""
    quality_scale: float = Field(0.5, ge=0)
    """Standard deviation of an ad's own appeal."""
    user_scale: float = Field(0.5, ge=0)
    """Standard deviation of a user's readiness to click."""
    fatigue: float = Field(0.05, ge=0)
    """Log-odds that an ad loses with every period it is old."""
    user_drift: float = Field(0.2, ge=0, le=1)
    """Share of the variance of a user's latents that is drawn anew each period."""
    trend_drift: float = Field(0.15, ge=0)
    """Step per period of the global trend, a random walk in the space of the ads' latents, in log-odds."""
    turnover: float = Field(0.08, ge=0, le=1)
    """Share of the ads that end each period; new ads take their places."""
    fine_noise: float = Field(0.4, ge=0)
    """Noise of the fine observation of a latent (dense features that only a teacher can afford)."""
    coarse_noise: float = Field(1.0, ge=0)
    """Noise of the coarse observation of a latent (buckets, segments)."""


class ProductionConfig(Config):
    """The production models and how they are trained after each period."""

    embedding_dim: int = Field(4, gt=0)
    tower_dim: int = Field(8, gt=1)
    """Width of the two towers of retrieval."""
    early_hidden: int = Field(16, gt=0)
    ranking_hidden: tuple[int, int] = (64, 32)
    learning_rate: float = Field(1.5e-3, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    batch_size: int = Field(256, gt=0)
    window: int = Field(4, gt=0)
    """Newest periods whose impressions a model trains on after each period, bootstrap periods included."""
    passes: int = Field(1, gt=0)
    """Passes over the window's impressions."""
    calibration_window: int = Field(1, gt=0)
    """Newest periods (of the window) whose held-out impressions fit the calibrator."""
    held_out: float = Field(0.3, gt=0, lt=1)
    """Share of the impressions that a model is not trained on: they fit its calibrator."""


class SimulatorConfig(SourceConfig):
    """A world, its requests, its cascade and its log. Equal configurations give equal rows, bit for bit."""

    type: Literal["simulator"] = "simulator"
    seed: int = Field(0, ge=0)
    """Another seed is another world."""
    periods: int = Field(10, gt=0)
    start: datetime.date = datetime.date(2025, 1, 1)
    """Day of the first period, which starts at midnight UTC."""
    period_hours: int = Field(24, gt=0)
    bootstrap_periods: int = Field(2, gt=0)
    """Periods before the first one that are not logged: the first shows random candidates, so that the production
    models have something to learn from; the others run the cascade."""
    users: int = Field(2000, gt=0)
    ads: int = Field(1200, gt=0)
    """Ads that are live in a period."""
    advertisers: int = Field(40, gt=0)
    campaigns: int = Field(120, gt=0)
    categories: int = Field(16, gt=0)
    segments: int = Field(12, gt=0)
    requests_per_period: int = Field(5000, gt=0)
    candidates: int = Field(200, gt=0)
    """Ads in the pool of one request."""
    widths: WidthsConfig = WidthsConfig()
    exploration: float = Field(0.05, ge=0, le=1)
    """Share of the requests in which every stage passes on random candidates."""
    consideration_share: ConsiderationShareConfig = ConsiderationShareConfig()
    history_length: int = Field(20, gt=0)
    """Newest clicks of a user that the log's sequences hold."""
    traffics: tuple[TrafficConfig, ...] = Field(
        (
            TrafficConfig(name="feed", share=0.5, base_logit=-3.8),
            TrafficConfig(name="video", share=0.3, base_logit=-3.3),
            TrafficConfig(name="sidebar", share=0.2, base_logit=-4.4),
        ),
        min_length=1,
    )
    world: WorldConfig = WorldConfig()
    production: ProductionConfig = ProductionConfig()

    @model_validator(mode="after")
    def _fits(self) -> SimulatorConfig:
        widths = (self.ads, self.candidates, self.widths.retrieval, self.widths.early, self.widths.ranking)
        if sorted(widths, reverse=True) != list(widths):
            raise ValueError(
                "the cascade must narrow: ads >= candidates >= widths.retrieval >= widths.early >= widths.ranking, "
                f"but these are {', '.join(map(str, widths))}"
            )
        if self.requests_per_period * self.candidates >= 2**40:
            raise ValueError("requests_per_period * candidates must stay below 2**40")
        names = [traffic.name for traffic in self.traffics]
        if len(set(names)) < len(names):
            raise ValueError("traffics: a name stands twice")
        return self
