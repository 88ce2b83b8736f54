"""Why unbiased models are biased on what they pick: UKDSL section 3.

n candidates have a true value (CPM) ``y ~ N(mu, sigma^2)``; model j predicts ``z_j = y + e_j`` with an error of its
own, ``e_j ~ N(0, sigma_j^2)``. Model 1 passes on the k_1 that it likes best.

Shape letters: R repetitions, N candidates, K numbers of candidates that are passed on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rayfm.config import RayfmError
from rayfm.theory.order_statistics import exact_order_statistics

Float64 = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Candidates:
    """What is ranked, and by how noisy a first model."""

    n: int = 1000
    mu: float = 5.0
    """Mean true value. The paper does not say; Eq. 2 is a ratio, so its size depends on it, its side of 1 does not."""
    sigma: float = 1.0
    """Standard deviation of the true values."""
    sigma_1: float = 1.0
    """Of the first model's error."""
    sigma_2: float = 0.5
    """Of the second model's."""

    def __post_init__(self) -> None:
        if self.n < 1 or self.mu <= 0 or self.sigma <= 0 or min(self.sigma_1, self.sigma_2) < 0:
            raise RayfmError(f"{self}: n, mu and sigma must be positive, and errors at least 0")

    @property
    def spread(self) -> float:
        """Standard deviation of the first model's predictions, ``sqrt(sigma^2 + sigma_1^2)``."""
        return float(np.hypot(self.sigma, self.sigma_1))


def expected_prediction(candidates: Candidates, order_statistics: Float64) -> Float64:
    """Eq. 1: the first model's expected prediction for its i-th choice, ``mu + spread * m_i``, ``[N]``."""
    return candidates.mu + candidates.spread * order_statistics


def expected_value(candidates: Candidates, order_statistics: Float64) -> Float64:
    """The expected true value of its i-th choice, ``[N]``: ``mu + sigma^2 / spread * m_i``.

    Of a prediction's distance to the mean only the share ``sigma^2 / spread^2`` is real:
    ``E[y | z] = mu + sigma^2 / (sigma^2 + sigma_1^2) (z - mu)``.
    """
    return candidates.mu + candidates.sigma**2 / candidates.spread * order_statistics


def expected_bias(candidates: Candidates, order_statistics: Float64) -> Float64:
    """By how much the first model overrates its i-th choice, ``[N]``: ``sigma_1^2 / spread * m_i``."""
    return candidates.sigma_1**2 / candidates.spread * order_statistics


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Eq. 2 on S_1, for every k_1."""

    k: npt.NDArray[np.int64]
    """k_1, ``[K]``."""
    cal_12: Float64
    """The first model's average over the second's, ``[K]``."""
    cal_10: Float64
    """The first model's over the truth."""
    cal_20: Float64
    """The second model's over the truth."""


def closed_form(candidates: Candidates, k: Sequence[int]) -> Calibration:
    """Eq. 2 of expectations over S_1.

    The second model's errors do not know how S_1 was picked, so that its average there is the truth's: cal(2, 0) = 1
    and cal(1, 2) = cal(1, 0), whatever the noise.
    """
    m = exact_order_statistics(candidates.n)
    mean = np.cumsum(m)[np.asarray(k) - 1] / np.asarray(k)
    truth = candidates.mu + candidates.sigma**2 / candidates.spread * mean
    ratio = (candidates.mu + candidates.spread * mean) / truth
    return Calibration(np.asarray(k), ratio, ratio.copy(), np.ones_like(ratio))


@dataclasses.dataclass(frozen=True)
class Simulated:
    """Eq. 2 as simulated, with the half-widths of 95 % intervals."""

    value: Calibration
    half: Calibration


def simulate(
    candidates: Candidates, k: Sequence[int], repetitions: int = 2000, seed: int = 0, at_once: int = 2_000_000
) -> Simulated:
    """Eq. 2 on S_1 by Monte Carlo: the ratio of averages over all repetitions, its interval by the delta method.

    Args:
        candidates: the world.
        k: values of k_1, in [1, n].
        repetitions: R, how many sets of candidates are ranked.
        seed: of the draws.
        at_once: numbers drawn at a time, which bounds memory.

    Raises:
        RayfmError: a k_1 outside [1, n], or fewer than two repetitions.
    """
    sizes = np.asarray(k, dtype=np.int64)
    if len(sizes) == 0 or sizes.min() < 1 or sizes.max() > candidates.n or repetitions < 2:
        raise RayfmError(f"k_1 must lie in [1, {candidates.n}], and at least two repetitions are needed")
    generator = np.random.default_rng(seed)
    means = np.empty((repetitions, 3, len(sizes)))  # truth, first model, second model
    step = max(1, at_once // candidates.n)
    for start in range(0, repetitions, step):
        rows = min(step, repetitions - start)
        y_RN, e1_RN, e2_RN = generator.standard_normal((3, rows, candidates.n))
        y_RN = candidates.mu + candidates.sigma * y_RN
        z1_RN = y_RN + candidates.sigma_1 * e1_RN
        z2_RN = y_RN + candidates.sigma_2 * e2_RN
        order = np.argsort(-z1_RN, axis=1)
        for position, values in enumerate((y_RN, z1_RN, z2_RN)):
            picked = np.take_along_axis(values, order, axis=1).cumsum(axis=1)
            means[start : start + rows, position] = picked[:, sizes - 1] / sizes
    truth, first, second = means.transpose(1, 0, 2)
    pairs = {"cal_12": (first, second), "cal_10": (first, truth), "cal_20": (second, truth)}
    found = {name: _ratio(*pair) for name, pair in pairs.items()}
    return Simulated(
        Calibration(sizes, **{name: value for name, (value, _) in found.items()}),
        Calibration(sizes, **{name: half for name, (_, half) in found.items()}),
    )


def _ratio(above_RK: Float64, below_RK: Float64) -> tuple[Float64, Float64]:
    """Ratio of means over R and the half-width of its 95 % interval, each ``[K]``."""
    top, bottom = above_RK.mean(axis=0), below_RK.mean(axis=0)
    ratio = top / bottom
    residual = (above_RK - ratio * below_RK) / bottom
    return ratio, 1.96 * residual.std(axis=0, ddof=1) / np.sqrt(len(above_RK))
