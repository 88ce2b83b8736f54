"""Algorithm 1 by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from rayfm.config import DataError
from rayfm.selection.importance import Importance, batch_bounds, loss_changes, matters, shuffle_orders, summarise


def test_batches_use_every_row_and_none_is_small() -> None:
    assert batch_bounds(10, 4) == [(0, 5), (5, 10)]
    assert batch_bounds(12, 4) == [(0, 4), (4, 8), (8, 12)]
    assert batch_bounds(3, 4) == [(0, 3)]
    assert batch_bounds(0, 4) == []
    assert batch_bounds(24, 4, most=2) == [(0, 4), (12, 16)]
    assert batch_bounds(8, 4, most=5) == [(0, 4), (4, 8)]
    for rows in range(1, 40):
        bounds = batch_bounds(rows, 7)
        assert bounds[0][0] == 0
        assert bounds[-1][1] == rows
        assert all(before[1] == after[0] for before, after in itertools.pairwise(bounds))
        assert min(stop - start for start, stop in bounds) >= min(7, rows)


def test_orders_are_permutations_that_depend_on_the_place_alone() -> None:
    place = ("2024-01-01", "impression", 3, 0)
    orders = shuffle_orders(1, place, 4, 50)
    assert orders.shape == (4, 50)
    assert all(sorted(order.tolist()) == list(range(50)) for order in orders)
    assert not any((orders[0] == other).all() for other in orders[1:])
    assert (shuffle_orders(1, place, 4, 50) == orders).all()
    for other in (("2024-01-02", *place[1:]), (place[0], "consideration", 3, 0), (*place[:3], 1)):
        assert (shuffle_orders(1, other, 4, 50) != orders).any()
    assert (shuffle_orders(2, place, 4, 50) != orders).any()
    # Another version of this file must find them again where it resumes a job.
    assert shuffle_orders(0, ("p", 1), 1, 6).tolist() == [[5, 2, 0, 1, 4, 3]]


def test_the_change_is_shuffled_minus_original() -> None:
    """A squared error of 2 a + 0 b: with a reversed, rows are off by 2 (a_i - a_j)."""
    values = {"a": np.array([0.0, 1.0, 3.0]), "b": np.array([5.0, 6.0, 7.0])}
    label = 2 * values["a"] + np.array([1.0, 0.0, 0.0])
    asked = []

    def loss(feature: str | None, order: np.ndarray | None) -> float:
        asked.append(feature)
        moved = dict(values) if feature is None else {**values, feature: values[feature][order]}
        return float(np.mean((2 * moved["a"] + 0 * moved["b"] - label) ** 2))

    reverse, stay = np.array([2, 1, 0]), np.array([0, 1, 2])
    original, changes = loss_changes(loss, ("a", "b"), np.stack([reverse, stay]))
    assert original == pytest.approx(1 / 3)
    # Reversed: predictions 6, 2, 0 against 1, 2, 6: (25 + 0 + 36) / 3.
    assert changes == pytest.approx(np.array([[61 / 3 - 1 / 3, 0.0], [0.0, 0.0]]))
    assert asked.count(None) == 1, "the original loss is measured once for all features"


def test_mean_and_deviation_over_batches_and_shuffles() -> None:
    changes = np.array([[[1.0, 3.0], [5.0, 7.0]], [[0.0, 0.0], [2.0, -2.0]]])  # 2 features, 2 batches, 2 shuffles
    found = summarise(("a", "b"), changes, np.array([0.4, 0.6]), rows=20)
    assert found.mean == pytest.approx([4.0, 0.0])
    # Of 1, 3, 5, 7: squares 9 + 1 + 1 + 9 = 20 over 3; of 0, 0, 2, -2: 8 over 3.
    assert found.deviation == pytest.approx([math.sqrt(20 / 3), math.sqrt(8 / 3)])
    # Batch means 2 and 6, and 0 and 0: deviation sqrt(8), over sqrt(2).
    assert found.error == pytest.approx([2.0, 0.0])
    assert (found.loss, found.batches, found.rows) == (pytest.approx(0.5), 2, 20)
    assert found.ranks.tolist() == [1, 2]
    assert found.relative == pytest.approx([8.0, 0.0])
    with pytest.raises(DataError, match=r"measured on 1 batch of 9 rows.*lower select\.batch_size"):
        summarise(("a",), np.zeros((1, 1, 3)), np.zeros(1), rows=9)


def importance(means: list[float], errors: list[float], loss: float = 1.0) -> Importance:
    names = tuple("abcdefgh"[: len(means)])
    return Importance(names, np.array(means), np.array(errors), np.array(errors), loss, 4, 400)


def test_equal_importances_keep_their_order() -> None:
    assert importance([0.1, 0.3, 0.1, 0.3], [0] * 4).ranks.tolist() == [3, 1, 4, 2]


def test_noise_does_not_matter() -> None:
    found = importance([0.030, 0.031, 0.5, -0.5, 0.05], [0.01, 0.01, 0.2, 0.01, 0.0], loss=2.0)
    assert matters(found, 0.0, 3.0).tolist() == [False, True, False, False, True]
    assert matters(found, 0.0, 2.0).tolist() == [True, True, True, False, True]
    # A threshold of 2 % of a loss of 2 is a change of 0.04.
    assert matters(found, 0.02, 0.0).tolist() == [False, False, True, False, True]
