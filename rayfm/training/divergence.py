"""Noticing that a training has diverged: a loss that is not finite, or one that has exploded."""

from __future__ import annotations

import collections
import math
import re

from rayfm.config import RayfmError
from rayfm.training.config import DivergenceConfig

NEWEST_WEIGHT = 1000.0
"""Weight (of rows) that a term's mean is taken over at least before it may count as exploded: the one click among a
handful of rows is no explosion."""
SMALLEST_MEAN = 0.01
"""A term's mean below this counts as this: what has almost vanished may come back."""

_TABLE = re.compile(r"\.(?:embedding_bags|embeddings)\.([^.]+)\.weight")


class DivergenceError(RayfmError):
    """A loss, or the state, is no longer finite, or a loss has exploded."""


def table_of(name: str) -> str:
    """How a message names a tensor of a checkpoint: by its table where it is of one.

    >>> table_of("fm.none.1.model.model.collection.embedding_bags.ad.weight")
    "table 'ad' (fm.none.1.model.model.collection.embedding_bags.ad.weight)"
    """
    found = _TABLE.search(name)
    return f"table {found[1]!r} ({name})" if found else name


class LossWatch:
    """Compares each term of a loss with what it was.

    Args:
        config: when it has exploded; None: never.
    """

    def __init__(self, config: DivergenceConfig | None) -> None:
        self.config = config
        self._terms: dict[str, _Term] = {}

    def exploded(self, name: str, total: float, weight: float) -> float | None:
        """Take in a step's term; how many times its former mean it has become, where it has exploded.

        Args:
            name: the term's.
            total, weight: its weighted sum and weight over all ranks.
        """
        if self.config is None or weight <= 0:
            return None
        term = self._terms.setdefault(name, _Term(self.config.window))
        return term.exploded(total, weight, self.config.factor)


class _Sums:
    """Steps of a term, first in first out, with their sums."""

    def __init__(self) -> None:
        self.steps: collections.deque[tuple[float, float]] = collections.deque()
        self.weight = 0.0

    def push(self, step: tuple[float, float]) -> None:
        self.steps.append(step)
        self.weight += step[1]

    def pop(self) -> tuple[float, float]:
        step = self.steps.popleft()
        self.weight -= step[1]
        return step

    def mean(self) -> float:
        return math.fsum(total for total, _ in self.steps) / math.fsum(weight for _, weight in self.steps)


class _Term:
    def __init__(self, window: int) -> None:
        self.window = window
        self.newest, self.before = _Sums(), _Sums()

    def exploded(self, total: float, weight: float, factor: float) -> float | None:
        self.newest.push((total, weight))
        while self.newest.weight - self.newest.steps[0][1] >= NEWEST_WEIGHT:
            self.before.push(self.newest.pop())
        while len(self.before.steps) > self.window:
            self.before.pop()
        if len(self.before.steps) < self.window or self.newest.weight < NEWEST_WEIGHT:
            return None
        was = max(self.before.mean(), SMALLEST_MEAN)
        ratio = self.newest.mean() / was
        return ratio if ratio > factor else None
