"""Hand-computed values, scikit-learn and torchrec as referees."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from rayfm.metrics import functions as f


def test_hand_computed() -> None:
    # Two rows, labels 1 and 0, predictions 0.8 and 0.4.
    loss = -math.log(0.8) - math.log(0.6)
    assert f.logloss(loss, 2.0) == pytest.approx(loss / 2)
    assert f.ne(loss, 1.0, 2.0) == pytest.approx(loss / 2 / math.log(2))
    assert f.ne_train(loss, 2.0, 0.25) == pytest.approx(loss / 2 / (0.25 * math.log(4) + 0.75 * math.log(4 / 3)))
    assert f.calibration(1.2, 1.0) == pytest.approx(1.2)
    assert f.rmse(0.2**2 + 0.4**2, 2.0) == pytest.approx(math.sqrt(0.1))
    assert f.transfer_ratio(0.90, 0.88, 0.86) == pytest.approx(0.5)


@pytest.mark.parametrize(("rate", "entropy"), [(0.0, 0.0), (1.0, 0.0), (0.5, math.log(2)), (-0.1, math.nan)])
def test_entropy(rate: float, entropy: float) -> None:
    assert f.entropy_of_rate(rate) == pytest.approx(entropy, nan_ok=True)


def test_undefined_is_nan_not_an_error() -> None:
    assert np.isnan(f.ne(0.3, 0.0, 5.0))  # all labels 0
    assert np.isnan(f.ne(0.3, 5.0, 5.0))  # all labels 1
    assert np.isnan(f.logloss(0.0, 0.0))
    assert np.isnan(f.calibration(1.0, 0.0))
    assert np.isnan(f.auc_from_histograms(np.array([0.0, 0.0]), np.array([1.0, 2.0])))
    assert np.isnan(f.transfer_ratio(0.9, 0.8, 0.9))


def test_auc_of_histograms_by_hand_and_batched() -> None:
    # Positives in bins 1 and 2, negatives in bins 0 and 1: pairs (1,0) (1,1 half) (2,0) (2,1) = 3.5 of 4.
    positives, negatives = np.array([0.0, 1, 1]), np.array([1.0, 1, 0])
    assert f.auc_from_histograms(positives, negatives) == pytest.approx(3.5 / 4)
    both = f.auc_from_histograms(np.stack([positives, negatives]), np.stack([negatives, positives]))
    np.testing.assert_allclose(both, [3.5 / 4, 0.5 / 4])


def test_arrays_agree_with_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    y = rng.random(2000) < 0.2
    p, w = rng.uniform(0.01, 0.99, 2000), rng.uniform(0.1, 3, 2000)
    loss = -(w * np.where(y, np.log(p), np.log1p(-p))).sum()
    assert f.logloss(loss, w.sum()) == pytest.approx(log_loss(y, p, sample_weight=w))
    rate = (w * y).sum() / w.sum()
    base = log_loss(y, np.full(2000, rate), sample_weight=w)
    assert f.ne(loss, (w * y).sum(), w.sum()) == pytest.approx(log_loss(y, p, sample_weight=w) / base)
    assert f.ne_train(loss, w.sum(), rate) == pytest.approx(f.ne(loss, (w * y).sum(), w.sum()))
    order = np.argsort(p)
    exact = f.auc_from_histograms((w * y)[order], (w * ~y)[order])
    assert exact == pytest.approx(roc_auc_score(y, p, sample_weight=w))


@pytest.mark.parametrize("soft", [False, True])
def test_ne_agrees_with_torchrec(soft: bool) -> None:
    from torchrec.metrics.ne import compute_ne, get_ne_states

    torch.manual_seed(0)
    p, w = torch.rand(1, 500), torch.rand(1, 500)
    y = torch.rand(1, 500) if soft else (torch.rand(1, 500) < 0.3).float()
    states = get_ne_states(y.double(), p, w.double(), 1e-12)
    theirs = compute_ne(
        states["cross_entropy_sum"],
        states["weighted_num_samples"],
        states["pos_labels"],
        states["neg_labels"],
        1e-12,
    )
    p64, y64, w64 = p.double().numpy(), y.double().numpy(), w.double().numpy()
    loss = -(w64 * (y64 * np.log(p64) + (1 - y64) * np.log1p(-p64))).sum()
    assert f.ne(loss, (w64 * y64).sum(), w64.sum()) == pytest.approx(float(theirs), rel=1e-6)
