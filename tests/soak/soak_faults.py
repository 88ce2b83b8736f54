"""What is killed, when: everything follows from the seed."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence

KINDS = ("teacher", "endpoints", "consumer", "updater", "labels", "zookeeper", "redis")
"""Replicas of the teacher's service, of the endpoints, the near-line consumer, an updater, the label job's process, and
the two servers; each with kill -9."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """One kill."""

    number: int
    kind: str
    wait_s: float
    """After the fault before it."""
    down_s: float
    """How long a server stays away."""
    pick: float
    """In [0, 1): which of several processes."""


def schedule(seed: int, count: int, mean_s: float, kinds: Sequence[str] = KINDS) -> Iterator[Fault]:
    """``count`` faults, all ``kinds`` about as often, at random times ``mean_s`` seconds apart on average.

    Some come at once after the one before, so that two parts are away together.
    """
    draw = random.Random(seed)
    deck: list[str] = []
    for number in range(count):
        if not deck:
            deck = list(kinds)
            draw.shuffle(deck)
        yield Fault(
            number,
            deck.pop(),
            wait_s=0.0 if draw.random() < 0.15 else draw.expovariate(1 / mean_s),
            down_s=draw.uniform(0.0, 3.0),
            pick=draw.random(),
        )
