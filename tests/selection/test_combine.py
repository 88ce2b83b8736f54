"""The six ways of Table 2 by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rayfm.selection.combine import (
    WAYS,
    average_importance,
    average_ranks,
    combine,
    intersection,
    shares,
    union,
    union_of_size,
)
from rayfm.selection.importance import Importance

NAMES = ("a", "b", "c", "d", "e")
EVERY = np.ones(5, np.bool_)


def importance(*means: float) -> Importance:
    zeros = np.zeros(len(means))
    return Importance(NAMES, np.array(means), zeros, zeros, 1.0, 4, 400)


IMPRESSIONS = importance(0.40, 0.30, 0.20, 0.10, 0.0)
"""Ranks 1 2 3 4 5, shares .4 .3 .2 .1 0."""
CONSIDERATIONS = importance(0.5, 0.0, 1.0, 2.0, 1.5)
"""Ranks 4 5 3 1 2, shares .1 0 .2 .4 .3."""


def test_shares_leave_out_what_is_negative() -> None:
    assert shares(IMPRESSIONS) == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0])
    assert shares(importance(3.0, -5.0, 1.0, 0.0, 0.0)) == pytest.approx([0.75, 0, 0.25, 0, 0])
    assert shares(importance(-1.0, -1.0, 0.0, 0.0, 0.0)) == pytest.approx([0.0] * 5)


def test_averages() -> None:
    assert average_ranks(IMPRESSIONS, CONSIDERATIONS) == pytest.approx([2.5, 3.5, 3.0, 2.5, 3.5])
    assert average_ranks(IMPRESSIONS, CONSIDERATIONS, 0.25) == pytest.approx([1.75, 2.75, 3.0, 3.25, 4.25])
    assert average_importance(IMPRESSIONS, CONSIDERATIONS) == pytest.approx([0.25, 0.15, 0.2, 0.25, 0.15])
    assert average_importance(IMPRESSIONS, CONSIDERATIONS, 1.0) == pytest.approx(shares(CONSIDERATIONS))


def test_the_six_ways() -> None:
    assert combine(IMPRESSIONS, CONSIDERATIONS, EVERY, EVERY, 3) == {
        "impressions_only": ("a", "b", "c"),
        "considerations_only": ("d", "e", "c"),
        "average_rank": ("a", "d", "c"),
        "average_importance": ("a", "d", "c"),
        "intersection": ("c",),
        "union": ("a", "d", "b", "e", "c"),
    }
    assert tuple(combine(IMPRESSIONS, CONSIDERATIONS, EVERY, EVERY, 3)) == tuple(WAYS)
    weighted = combine(IMPRESSIONS, CONSIDERATIONS, EVERY, EVERY, 2, weight=0.0)
    assert weighted["average_rank"] == weighted["average_importance"] == weighted["impressions_only"] == ("a", "b")


def test_no_way_takes_what_matters_on_neither_kind() -> None:
    on_impressions = np.array([True, True, False, False, False])
    on_considerations = np.array([False, False, False, True, True])
    lists = combine(IMPRESSIONS, CONSIDERATIONS, on_impressions, on_considerations, 4)
    assert lists["impressions_only"] == ("a", "b")
    assert lists["considerations_only"] == ("d", "e")
    assert lists["intersection"] == ()
    assert lists["union"] == ("a", "d", "b", "e")
    assert "c" not in {name for names in lists.values() for name in names}
    assert set(lists["average_rank"]) == {"a", "b", "d", "e"}


def test_unions_and_intersections_of_lists() -> None:
    assert intersection(("c", "a", "b"), ("b", "c")) == ("c", "b")
    assert union(("a", "b"), ("b", "c", "d")) == ("a", "b", "c", "d")
    assert union((), ("x",)) == ("x",)
    one, other = ("a", "b", "c", "d"), ("a", "e", "b", "f")
    # Depth 1: a; 2: a b e; 3: a b e c; 4: a b e c d f.
    assert union_of_size(one, other, 3) == ("a", "b", "e")
    assert union_of_size(one, other, 5) == ("a", "b", "e", "c")
    assert union_of_size(one, other, 6) == ("a", "b", "e", "c", "d", "f")
    assert union_of_size(one, other, 1) == ("a",)
    assert union_of_size(("a",), ("b",), 1) == ()
