"""95 % intervals over users (the bootstrap) and training seeds, for means, differences and ratios.

Shape letters: M seeds, R bootstrap replicates.
"""

from __future__ import annotations

import dataclasses
import math
import statistics

import numpy as np

from rayfm.metrics.functions import Array

CONFIDENCE = 0.95


def t_quantile(df: float, probability: float = (1 + CONFIDENCE) / 2) -> float:
    """Quantile of Student's t with ``df`` >= 1 degrees of freedom, for ``probability`` >= 0.5, to 1e-4 relative.

    With t = sqrt(df) tan(a) the CDF is the normalised integral of cos(a)**(df - 1). Above 100 degrees of freedom the
    expansion about the normal quantile (Abramowitz and Stegun 26.7.5) is as exact.
    """
    if df > 100:
        x = statistics.NormalDist().inv_cdf(probability)
        third = (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / (384 * df**3)
        return x + (x**3 + x) / (4 * df) + (5 * x**5 + 16 * x**3 + 3 * x) / (96 * df**2) + third
    angle = np.linspace(0.0, math.pi / 2, 20_001)
    density = np.cos(angle) ** (df - 1)
    area = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(df) * math.tan(float(np.interp(2 * probability - 1, area / area[-1], angle)))


@dataclasses.dataclass(frozen=True)
class Sample:
    """A statistic of each seed's model: on the rows as they are, and on each bootstrap replicate of their users."""

    points: Array
    """``[M]``."""
    replicates: Array
    """``[M, R]``; column r is the same draw of users in every row and in every other sample."""

    def __sub__(self, other: Sample) -> Sample:
        return Sample(self.points - other.points, self.replicates - other.replicates)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its interval; NaN where undefined (``lo`` and ``hi`` also without replicates)."""

    value: float
    lo: float
    hi: float
    seeds: int


def _covariance(first: Sample, second: Sample) -> tuple[float, float]:
    """Covariance of the means over seeds: the part from the users, the part from the seeds."""
    users = np.stack([first.replicates.mean(0), second.replicates.mean(0)])
    users = users[:, np.isfinite(users).all(0)]
    over_users = float(np.cov(users)[0, 1]) if users.shape[1] > 1 else math.nan
    seeds = len(first.points)
    over_seeds = float(np.cov(first.points, second.points)[0, 1]) / seeds if seeds > 1 else 0.0
    return over_users, over_seeds


def _quantile(sample: Sample, users: float, seeds: float) -> float:
    """The t quantile at Welch and Satterthwaite's degrees of freedom for a sum of two estimated variances."""
    count, replicates = len(sample.points), sample.replicates.shape[1]
    spread = users**2 / (replicates - 1) + (seeds**2 / (count - 1) if count > 1 else 0.0)
    if not spread > 0:
        return t_quantile(replicates - 1) if math.isfinite(spread) else math.nan
    return t_quantile(max((users + seeds) ** 2 / spread, 1.0))


def estimate(sample: Sample) -> Estimate:
    """The mean over seeds and its interval.

    Variance = that of the mean over users (from the replicates) + the variance between seeds / M. With one seed the
    interval is over users alone; ``seeds`` says so. With few seeds the interval leans on their effects being about
    normal: where they are very skewed it covers less than it says.
    """
    value, seeds = float(sample.points.mean()), len(sample.points)
    if sample.replicates.shape[1] < 2:
        return Estimate(value, math.nan, math.nan, seeds)
    over_users, over_seeds = _covariance(sample, sample)
    half = _quantile(sample, over_users, over_seeds) * math.sqrt(over_users + over_seeds)
    return Estimate(value, value - half, value + half, seeds)


def ratio_estimate(numerator: Sample, denominator: Sample) -> tuple[Estimate, str | None]:
    """Ratio of two means with Fieller's interval, or the reason why there is none.

    The interval holds every ratio q for which mean(numerator - q denominator) is not significantly different from 0;
    it is bounded only where the denominator's own interval excludes zero (Fieller, Some problems in interval
    estimation, 1954). One quantile serves both means: the wider of the two.
    """
    seeds = len(numerator.points)
    a, b = float(numerator.points.mean()), float(denominator.points.mean())
    nothing = Estimate(math.nan, math.nan, math.nan, seeds)
    if not (math.isfinite(a) and math.isfinite(b)):
        return nothing, "undefined: one of the values is"
    if numerator.replicates.shape[1] < 2:
        return nothing, "no bootstrap replicates, so no interval of the denominator"
    parts = [_covariance(*pair) for pair in ((numerator, numerator), (denominator, denominator))]
    t = max(_quantile(numerator, *parts[0]), _quantile(denominator, *parts[1]))
    var_a, var_b = (sum(part) for part in parts)
    cov = sum(_covariance(numerator, denominator))
    square = b**2 - t**2 * var_b
    if not square > 0:
        return nothing, "the denominator's interval includes zero"
    middle = a * b - t**2 * cov
    root = math.sqrt(max(middle**2 - square * (a**2 - t**2 * var_a), 0.0))
    return Estimate(a / b, (middle - root) / square, (middle + root) / square, seeds), None
