"""The truth: users and ads with latents that drift, and what makes a user click, watch and stay.

Shape letters: N rows, U users, A live ads, L latent dimensions, H hidden units, S traffics, C context latents.
"""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from rayfm.simulator.config import SimulatorConfig

Floats: TypeAlias = npt.NDArray[np.float32]
Ints: TypeAlias = npt.NDArray[np.int64]

HOURS, DEVICES = 24, 3
LONG_VIEW_SECONDS = 20.0
"""A view that lasts at least this long is a long one."""

_CONTEXT_DIM = 4
_GAIN = 1.6
"""Standard deviation of what the user's, or the ad's, latents bring to a hidden unit."""

_HIDDEN_SPREAD = 0.75
"""Standard deviation of a hidden unit, which scales the output weights."""

_OWN = 0.3
"""What user and ad bring to a hidden unit by themselves, against their product."""

_BID_SPREAD = 0.25
"""Standard deviation of the logarithm of a bid."""

_WATCH_NOISE = 0.7
"""Standard deviation of the logarithm of the watch time, given user, ad and context."""

_STREAMS = ("world", "users", "ads", "trend", "observe", "requests", "explore", "labels", "log", "train")


def stream(seed: int, name: str, period: int = -1) -> np.random.Generator:
    """The random numbers of one purpose in one period.

    One generator a purpose: drawing more of one thing does not move another, so that what the models show can never
    change how the world moves on. ``period`` counts from the first bootstrap period; -1 is before all.
    """
    return np.random.default_rng([seed, _STREAMS.index(name), period + 1])


def _normal(rng: np.random.Generator, *shape: int) -> Floats:
    return rng.standard_normal(shape, dtype=np.float32)


def _project(rows: Floats, weight: Floats) -> Floats:
    # einsum, not BLAS: its sums do not depend on how many threads the machine lends.
    product: Floats = np.einsum("nl,lh->nh", rows, weight)
    return product


@dataclasses.dataclass
class Truth:
    """What the world knows about N (user, ad, context) rows; each ``[N]`` float32."""

    click: Floats
    """Probability of a click."""
    long_view: Floats
    """Probability that the view lasts LONG_VIEW_SECONDS."""
    watch_time: Floats
    """Expected seconds of the view."""
    watch_location: Floats
    """Mean of the logarithm of the watch time."""

    def sample(self, rng: np.random.Generator) -> dict[str, Floats]:
        """Labels of every task, drawn for each row: ``{task: [N]}`` float32."""
        rows = len(self.click)
        watch = np.exp(self.watch_location + _WATCH_NOISE * _normal(rng, rows))
        return {
            "click": (rng.random(rows, dtype=np.float32) < self.click).astype(np.float32),
            "long_view": (watch >= LONG_VIEW_SECONDS).astype(np.float32),
            "watch_time": watch,
        }


class World:
    """Users, ads and contexts with latents; moves on one period at a time.

    The log-odds of a click are the surface's base plus a random two-layer network of the user's, the ad's and the
    context's latents, plus products of user and ad latents, plus the ad's appeal, the user's readiness, the global
    trend and the ad's fatigue. The network's output weights and the weights of the products differ between surfaces.
    A hidden unit bends (tanh) the product of what the user and the ad bring to it, so neither an FM nor two towers can
    represent the log-odds, however well they know the latents.

    Attributes:
        period: counts from the first bootstrap period; -1 before the first ``advance``.
        user_latent: ``[U, L]``; ``ad_latent``: ``[A, L]``; ``ad_id``, ``ad_campaign``, ``ad_born``: ``[A]`` int64;
            ``ad_bid``: ``[A]`` float32, money for one click.
    """

    def __init__(self, config: SimulatorConfig) -> None:
        self.config, self.period = config, -1
        world, rng = config.world, stream(config.seed, "world")
        latent, hidden, surfaces = world.latent_dim, world.hidden_dim, len(config.traffics)

        # The fixed network: the gain drives the hidden units well into their bend; the context adds a little.
        self._user_weight = _normal(rng, latent, hidden) * np.float32(_GAIN / np.sqrt(latent))
        self._ad_weight = _normal(rng, latent, hidden) * np.float32(_GAIN / np.sqrt(latent))
        self._context_weight = _normal(rng, _CONTEXT_DIM, hidden) * np.float32(np.sqrt(0.2 / _CONTEXT_DIM))
        self._hidden_bias = _normal(rng, hidden) * np.float32(0.5)
        shared, own = _normal(rng, hidden), _normal(rng, surfaces, hidden)
        self._output = np.float32(world.network_scale) * _unit(0.8 * shared + 0.6 * own) / np.float32(_HIDDEN_SPREAD)
        self._watch_output = _unit(_normal(rng, 1, hidden)) / np.float32(_HIDDEN_SPREAD)
        tilt = np.exp(0.5 * _normal(rng, surfaces, latent))
        sign = np.where(rng.random(latent) < 0.5, -1.0, 1.0).astype(np.float32)
        self._product = np.float32(world.product_scale) * _unit(tilt) * sign
        self._base = np.array([traffic.base_logit for traffic in config.traffics], np.float32)
        self._hour_latent = _normal(rng, HOURS, _CONTEXT_DIM)
        self._device_latent = _normal(rng, DEVICES, _CONTEXT_DIM)

        self.advertiser_of = rng.integers(0, config.advertisers, config.campaigns)
        self.category_of = rng.integers(0, config.categories, config.campaigns)
        category_latent = _normal(rng, config.categories, latent)
        self._campaign_latent = 0.7 * category_latent[self.category_of] + 0.45 * _normal(rng, config.campaigns, latent)

        self.user_latent = _normal(rng, config.users, latent)
        self._user_readiness = np.float32(world.user_scale) * _normal(rng, config.users)
        self.user_activity = np.exp(0.8 * _normal(rng, config.users))
        self._trend = np.zeros(latent, np.float32)

        self._next_ad = 0
        self.ad_id = np.zeros(config.ads, np.int64)
        self.ad_born = np.zeros(config.ads, np.int64)
        self.ad_campaign = np.zeros(config.ads, np.int64)
        self.ad_bid = np.zeros(config.ads, np.float32)
        self._ad_quality = np.zeros(config.ads, np.float32)
        self.ad_latent = np.zeros((config.ads, latent), np.float32)
        self._give_birth(np.arange(config.ads), rng)
        # Taken off, so that a surface's base rate is what the config says in every world.
        self._network_mean = self._mean_network(rng)
        # The first catalogue is of mixed age, as a later one is.
        self.ad_born -= rng.geometric(max(world.turnover, 0.05), config.ads)

    def _mean_network(self, rng: np.random.Generator, rows: int = 1 << 14) -> Floats:
        """Mean output of the network on each surface ``[S]``, over random users, ads and contexts."""
        limits = (self.config.users, self.config.ads, HOURS, DEVICES)
        user, ad, hour, device = (rng.integers(0, limit, rows) for limit in limits)
        hidden = self._hidden(*self._projections(), user, ad, hour * DEVICES + device)
        mean: Floats = np.einsum("h,sh->s", hidden.mean(0), self._output)
        return mean

    def _projections(self) -> tuple[Floats, Floats, Floats]:
        """What users, ads and contexts bring to the hidden units: ``[U, H]``, ``[A, H]``, ``[HOURS * DEVICES, H]``."""
        context = (self._hour_latent[:, None] + self._device_latent[None]).reshape(-1, _CONTEXT_DIM)
        return (
            _project(self.user_latent, self._user_weight),
            _project(self.ad_latent, self._ad_weight),
            _project(context, self._context_weight) + self._hidden_bias,
        )

    @staticmethod
    def _hidden(of_users: Floats, of_ads: Floats, of_contexts: Floats, user: Ints, ad: Ints, context: Ints) -> Floats:
        """The network's hidden layer ``[N, H]``."""
        of_user, of_ad = of_users[user], of_ads[ad]
        hidden: Floats = of_user * of_ad
        hidden += np.float32(_OWN) * (of_user + of_ad)
        hidden += of_contexts[context]
        return np.tanh(hidden, out=hidden)

    def _give_birth(self, slots: Ints, rng: np.random.Generator) -> None:
        """New ads at these positions of the catalogue."""
        count, config = len(slots), self.config
        self.ad_id[slots] = self._next_ad + np.arange(count)
        self._next_ad += count
        self.ad_born[slots] = self.period
        self.ad_campaign[slots] = rng.integers(0, config.campaigns, count)
        noise = 0.55 * _normal(rng, count, config.world.latent_dim)
        self.ad_latent[slots] = self._campaign_latent[self.ad_campaign[slots]] + noise
        self._ad_quality[slots] = np.float32(config.world.quality_scale) * _normal(rng, count)
        self.ad_bid[slots] = np.exp(_BID_SPREAD * _normal(rng, count))

    def advance(self) -> Ints:
        """Move to the next period: users and the trend drift, ads end and new ones begin.

        Returns:
            The positions in the catalogue that hold new ads.
        """
        self.period += 1
        world, seed = self.config.world, self.config.seed
        if self.period == 0:
            return np.arange(self.config.ads)
        fresh = _normal(stream(seed, "users", self.period), *self.user_latent.shape)
        keep = np.float32(np.sqrt(1 - world.user_drift))
        self.user_latent = keep * self.user_latent + np.float32(np.sqrt(world.user_drift)) * fresh
        step = _normal(stream(seed, "trend", self.period), world.latent_dim)
        self._trend = self._trend + np.float32(world.trend_drift / np.sqrt(world.latent_dim)) * step
        rng = stream(seed, "ads", self.period)
        ended = np.flatnonzero(rng.random(self.config.ads) < world.turnover)
        self._give_birth(ended, rng)
        return ended

    @property
    def ad_age(self) -> Ints:
        """Periods since each live ad began: ``[A]`` int64."""
        return self.period - self.ad_born

    def truth(self, user: Ints, ad: Ints, traffic: Ints, hour: Ints, device: Ints, chunk: int = 1 << 16) -> Truth:
        """The truth of N rows in this period; each argument ``[N]`` (``ad`` is a position in the catalogue).

        Rows go through in chunks, so that a million of them need little memory.
        """
        projections = self._projections()
        fatigue = np.float32(self.config.world.fatigue) * np.minimum(self.ad_age, 20).astype(np.float32)
        ad_own = self._ad_quality - fatigue + _project(self.ad_latent, self._trend[:, None])[:, 0]
        logit = np.empty(len(user), np.float32)
        location = np.empty(len(user), np.float32)
        for start in range(0, len(user), chunk):
            rows = slice(start, start + chunk)
            u, a, s = user[rows], ad[rows], traffic[rows]
            hidden = self._hidden(*projections, u, a, hour[rows] * DEVICES + device[rows])
            network = np.einsum("nh,nh->n", hidden, self._output[s]) - self._network_mean[s]
            product = np.einsum("nl,nl,nl->n", self.user_latent[u], self.ad_latent[a], self._product[s])
            score = network + product + ad_own[a] + self._user_readiness[u]
            logit[rows] = self._base[s] + score
            location[rows] = 2.0 + 0.35 * score + 0.4 * np.einsum("nh,h->n", hidden, self._watch_output[0])
        standard = torch.from_numpy((location - np.float32(np.log(LONG_VIEW_SECONDS))) / np.float32(_WATCH_NOISE))
        return Truth(
            click=torch.sigmoid(torch.from_numpy(logit)).numpy(),
            # The normal distribution function by erfc: as 1 + erf, ndtr is 0 in float32 from five deviations down.
            long_view=(0.5 * torch.special.erfc(standard * -(0.5**0.5))).numpy(),
            watch_time=np.exp(location + np.float32(_WATCH_NOISE**2 / 2)),
            watch_location=location,
        )


def _unit(weight: Floats) -> Floats:
    """Rows scaled to length one."""
    unit: Floats = (weight / np.linalg.norm(weight, axis=-1, keepdims=True)).astype(np.float32)
    return unit
