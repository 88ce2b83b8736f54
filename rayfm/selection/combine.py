"""UKDSL section 4.2, step 5: two rankings, of impressions and of considerations, become one list of features (Table 2).

Where the paper is silent: every way takes its features from the first k of a ranking, and none that matters on neither
kind; a union may so have up to 2 k features, an intersection fewer than k. `union_of_size` is a union that has no more
features than the other ways, to tell what it gains by having more.

Shape letters: F features.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from rayfm.selection.importance import Float64, Importance

Bool = npt.NDArray[np.bool_]

WAYS = {
    "impressions_only": "IMP importance only",
    "considerations_only": "CD importance only",
    "average_rank": "average rank",
    "average_importance": "average importance",
    "intersection": "intersection of top features",
    "union": "union of top features",
}
"""The six ways of Table 2, and the paper's names of them."""


def shares(importance: Importance) -> Float64:
    """``[F]``: importance as a share of what all features have together; what is not positive counts as nothing.

    The losses of the two kinds have different labels, true and pseudo, and are no common unit; these are.
    """
    positive = np.clip(importance.mean, 0, None)
    total = positive.sum()
    return positive / total if total > 0 else positive


def average_ranks(impressions: Importance, considerations: Importance, weight: float = 0.5) -> Float64:
    """``[F]``: the mean of both ranks, the considerations' with ``weight``; less is better."""
    averages: Float64 = (1 - weight) * impressions.ranks + weight * considerations.ranks
    return averages


def average_importance(impressions: Importance, considerations: Importance, weight: float = 0.5) -> Float64:
    """``[F]``: the mean of both `shares`, the considerations' with ``weight``; more is better."""
    return (1 - weight) * shares(impressions) + weight * shares(considerations)


def first(features: tuple[str, ...], score_F: Float64, allowed_F: Bool, k: int) -> tuple[str, ...]:
    """The k allowed features with the lowest score, best first; of equal ones the first comes first."""
    order = [position for position in np.argsort(score_F, kind="stable").tolist() if allowed_F[position]]
    return tuple(features[position] for position in order[:k])


def top(importance: Importance, matter_F: Bool, k: int) -> tuple[str, ...]:
    """The k most important features that matter."""
    return first(importance.features, importance.ranks.astype(np.float64), matter_F, k)


def intersection(one: tuple[str, ...], other: tuple[str, ...]) -> tuple[str, ...]:
    """What both have, in the order of the first."""
    return tuple(name for name in one if name in other)


def union(one: tuple[str, ...], other: tuple[str, ...]) -> tuple[str, ...]:
    """What either has: in turn one of each, best first."""
    longest = max(len(one), len(other))
    dealt = [names[place] for place in range(longest) for names in (one, other) if place < len(names)]
    return tuple(dict.fromkeys(dealt))


def union_of_size(one: tuple[str, ...], other: tuple[str, ...], size: int) -> tuple[str, ...]:
    """The union of the first m of both for the largest m at which it has ``size`` features or fewer."""
    found: tuple[str, ...] = ()
    for depth in range(1, max(len(one), len(other)) + 1):
        deeper = union(one[:depth], other[:depth])
        if len(deeper) > size:
            break
        found = deeper
    return found


def combine(
    impressions: Importance,
    considerations: Importance,
    matter_on_impressions_F: Bool,
    matter_on_considerations_F: Bool,
    k: int,
    weight: float = 0.5,
) -> dict[str, tuple[str, ...]]:
    """The six ways of Table 2: way -> features, best first.

    Args:
        impressions, considerations: of the same features.
        matter_on_impressions_F, matter_on_considerations_F: what may be taken by each ranking; the averages may take
            what either may.
        k: features that a ranking gives.
        weight: of considerations in the averages.
    """
    features = impressions.features
    assert features == considerations.features
    biased = top(impressions, matter_on_impressions_F, k)
    unbiased = top(considerations, matter_on_considerations_F, k)
    either_F = matter_on_impressions_F | matter_on_considerations_F
    ways: dict[str, Callable[[], tuple[str, ...]]] = {
        "impressions_only": lambda: biased,
        "considerations_only": lambda: unbiased,
        "average_rank": lambda: first(features, average_ranks(impressions, considerations, weight), either_F, k),
        "average_importance": lambda: first(
            features, -average_importance(impressions, considerations, weight), either_F, k
        ),
        "intersection": lambda: intersection(biased, unbiased),
        "union": lambda: union(biased, unbiased),
    }
    return {way: ways[way]() for way in WAYS}
