"""The bootstrap's weights are Poisson(1), fixed for ever, and independent between users and replicates."""

from __future__ import annotations

import math

import numpy as np
import torch

from rayfm.metrics import bootstrap_weights


def test_moments_and_distribution() -> None:
    copies = bootstrap_weights(torch.arange(-20_000, 20_000), 50).numpy()
    assert copies.shape == (40_000, 50)
    assert copies.dtype == np.float32
    assert abs(copies.mean() - 1) < 4 / math.sqrt(copies.size)
    assert abs(copies.var() - 1) < 4 * math.sqrt(3 / copies.size)
    for k in range(5):
        expected = math.exp(-1) / math.factorial(k)
        assert abs((copies == k).mean() - expected) < 4 * math.sqrt(expected / copies.size)


def test_replicates_and_neighbouring_users_are_uncorrelated() -> None:
    copies = bootstrap_weights(torch.arange(20_000), 12).numpy()
    between = np.corrcoef(copies.T)[~np.eye(12, dtype=bool)]
    assert np.abs(between).max() < 5 / math.sqrt(20_000)
    neighbours = np.corrcoef(copies[:-1].ravel(), copies[1:].ravel())[0, 1]
    assert abs(neighbours) < 4 / math.sqrt(copies.size)


def test_fixed_for_ever() -> None:
    # Changing these numbers breaks the pairing with every saved run.
    copies = bootstrap_weights(torch.tensor([0, 1, -7, 2**62]), 8)
    assert copies.tolist() == [
        [1, 0, 2, 2, 2, 1, 1, 1],
        [0, 2, 0, 2, 1, 1, 1, 1],
        [0, 1, 1, 2, 1, 1, 0, 1],
        [1, 1, 1, 1, 0, 2, 3, 1],
    ]


def test_depends_on_nothing_but_user_and_replicate() -> None:
    user = torch.tensor([5, 9, 5, 7])
    copies = bootstrap_weights(user, 30)
    assert torch.equal(copies[0], copies[2])
    assert torch.equal(bootstrap_weights(torch.tensor([7]), 30)[0], copies[3])
    assert torch.equal(bootstrap_weights(user, 7), copies[:, :7])
    assert bootstrap_weights(torch.tensor([], dtype=torch.int64), 7).shape == (0, 7)
