"""Metrics as pure functions of sums, so that they merge over batches, ranks, periods and bootstrap replicates.

Every argument is a float or a float64 array, broadcast element by element. A sum runs over scored rows with their
weight: ``label_sum`` is the sum of ``weight * label``. A label of a binary task may be a probability (on
considerations it is the next stage's prediction). Where a metric is undefined (no rows, one class) the value is NaN.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float64]
Numeric: TypeAlias = float | Array


def ratio(numerator: Numeric, denominator: Numeric) -> Array:
    """``numerator / denominator``, NaN where the denominator is 0."""
    top, bottom = np.broadcast_arrays(np.asarray(numerator, np.float64), np.asarray(denominator, np.float64))
    quotient: Array = np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom != 0)
    return quotient


def logloss(logloss_sum: Numeric, weight_sum: Numeric) -> Array:
    """Mean binary cross-entropy in nats (ExFM Eq. 1, with the minus sign that the text omits)."""
    return ratio(logloss_sum, weight_sum)


def entropy_of_rate(rate: Numeric) -> Array:
    """Entropy of a coin with probability ``rate``, in nats: the logloss of always predicting the base rate."""
    p = np.asarray(rate, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy: Array = -np.where(p > 0, p * np.log(p), 0.0) - np.where(p < 1, (1 - p) * np.log1p(-p), 0.0)
    return np.where((p >= 0) & (p <= 1), entropy, np.nan)


def ne(logloss_sum: Numeric, label_sum: Numeric, weight_sum: Numeric) -> Array:
    """Normalised entropy: logloss over the entropy of the scored rows' own base rate.

    UKDSL section 4 and ``torchrec.metrics``. 1 is what the constant base rate scores; lower is better. NaN where the
    rows are of one class.
    """
    return ratio(logloss(logloss_sum, weight_sum), entropy_of_rate(ratio(label_sum, weight_sum)))


def ne_train(logloss_sum: Numeric, weight_sum: Numeric, train_rate: Numeric) -> Array:
    """Normalised entropy with the base rate of the data trained on so far (ExFM section 4, after He et al. 2014)."""
    return ratio(logloss(logloss_sum, weight_sum), entropy_of_rate(train_rate))


def calibration(prediction_sum: Numeric, label_sum: Numeric) -> Array:
    """Mean prediction over mean label; 1 is calibrated, above 1 predicts too much (UKDSL Eq. 2 per stage)."""
    return ratio(prediction_sum, label_sum)


def rmse(squared_error_sum: Numeric, weight_sum: Numeric) -> Array:
    """Root of the mean squared error."""
    return np.sqrt(ratio(squared_error_sum, weight_sum))


def auc_from_histograms(positives: Array, negatives: Array) -> Array:
    """Area under the ROC curve from histograms of the score, with half credit inside a bin.

    Args:
        positives: ``[..., bins]``, sum of ``weight * label`` per bin, bins ascending in the score.
        negatives: ``[..., bins]``, sum of ``weight * (1 - label)`` per bin.

    Returns:
        ``[...]``: with soft labels, the probability that a positive drawn from the labels scores above a negative.
    """
    below = np.cumsum(negatives, axis=-1) - 0.5 * negatives
    return ratio((positives * below).sum(-1), positives.sum(-1) * negatives.sum(-1))


def transfer_ratio(ne_none: Numeric, ne_distilled: Numeric, ne_teacher: Numeric) -> Array:
    """Share of the teacher's gain in NE that reaches the student.

    (undistilled student - distilled student) / (undistilled student - teacher). 1 is a student as good as
    its teacher, 0 one that learnt nothing from it.
    """
    gain = np.asarray(ne_none, np.float64) - ne_distilled
    return ratio(gain, np.asarray(ne_none, np.float64) - ne_teacher)
