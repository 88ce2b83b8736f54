"""The requests of a period: who comes, when, where, and which ads could be shown.

Shape letters: R requests, C candidates of a request.
"""

from __future__ import annotations

import dataclasses
import datetime

import numpy as np

from rayfm.simulator.config import SimulatorConfig
from rayfm.simulator.world import DEVICES, HOURS, Ints, World, stream

_NIGHT, _EVENING = 4, 20
"""Hours with the fewest and the most requests."""

_OWN_DEVICE = 0.8
"""Share of a user's requests that come from the user's usual device."""

_DEVICE_SHARES = (0.6, 0.3, 0.1)


@dataclasses.dataclass
class Requests:
    """R requests in time order, one row each."""

    time: Ints
    """Microseconds since 1970-01-01 UTC ``[R]``, strictly rising."""
    user: Ints
    """``[R]``."""
    traffic: Ints
    """Position in the config's traffics ``[R]``."""
    hour: Ints
    """Hour of the day, UTC ``[R]``."""
    device: Ints
    """``[R]``."""
    pool: Ints
    """Candidates as positions in the catalogue ``[R, C]``, each at most once in a request."""

    def __len__(self) -> int:
        return len(self.user)


def period_start(config: SimulatorConfig, number: int) -> datetime.datetime:
    """Start of the ``number``-th logged period; the bootstrap periods have negative numbers."""
    first = datetime.datetime.combine(config.start, datetime.time(), datetime.UTC)
    return first + number * datetime.timedelta(hours=config.period_hours)


def draw_requests(world: World) -> Requests:
    """The requests of the world's period; they depend on the seed and the period alone."""
    config = world.config
    rng = stream(config.seed, "requests", world.period)
    count = config.requests_per_period

    start = period_start(config, world.period - config.bootstrap_periods)
    seconds_of_hour = 3_600_000_000
    hours = start.hour + np.arange(config.period_hours)
    busy = 1.1 - np.cos((hours - _NIGHT) * np.pi / (_EVENING - _NIGHT)) * np.where(hours % HOURS >= _NIGHT, 1.0, 0.9)
    slot = rng.choice(config.period_hours, count, p=busy / busy.sum())
    offset = slot * seconds_of_hour + rng.integers(0, seconds_of_hour - count, count)
    # Sorted offsets leave room for this: no two requests share a microsecond, and none leaves the period.
    time = round(start.timestamp()) * 1_000_000 + np.sort(offset) + np.arange(count)

    user = rng.choice(config.users, count, p=world.user_activity / world.user_activity.sum(dtype=np.float64))
    shares = np.array([traffic.share for traffic in config.traffics])
    usual = np.random.default_rng([config.seed, config.users]).choice(DEVICES, config.users, p=_DEVICE_SHARES)
    other = rng.choice(DEVICES, count, p=_DEVICE_SHARES)
    return Requests(
        time=time,
        user=user,
        traffic=rng.choice(len(shares), count, p=shares / shares.sum()),
        hour=time // seconds_of_hour % HOURS,
        device=np.where(rng.random(count) < _OWN_DEVICE, usual[user], other),
        pool=_draw_pools(rng, count, config.candidates, config.ads),
    )


def _draw_pools(rng: np.random.Generator, requests: int, candidates: int, ads: int) -> Ints:
    """Distinct candidates for each request: ``[R, C]``.

    A request walks through a shuffled catalogue with a step that has no common divisor with its length, so that no
    ad comes twice, at a cost that does not grow with the catalogue.
    """
    shuffled = rng.permutation(ads)
    steps = np.flatnonzero(np.gcd(np.arange(1, ads + 1), ads) == 1) + 1
    step = rng.choice(steps, requests)
    first = rng.integers(0, ads, requests)
    pool: Ints = shuffled[(first[:, None] + step[:, None] * np.arange(candidates)) % ads]
    return pool
