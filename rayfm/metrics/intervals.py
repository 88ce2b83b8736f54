"""95 % intervals over users (the bootstrap) and training seeds, for means, differences and ratios.

Shape letters: M seeds, R bootstrap replicates.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

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
    angle, share = _t_share(df)
    return math.sqrt(df) * math.tan(float(np.interp(2 * probability - 1, share, angle)))


def t_two_sided(t: float, df: float) -> float:
    """Probability that Student's t with ``df`` >= 1 degrees of freedom lies at least as far from 0 as ``t``.

    Above 100 degrees of freedom by Abramowitz and Stegun 26.7.8, an approximation by the normal distribution; good to
    3e-5 absolute.
    """
    if math.isinf(t):
        return 0.0
    if df > 100:
        x = abs(t) * (1 - 1 / (4 * df)) / math.sqrt(1 + t * t / (2 * df))
        return 2 * statistics.NormalDist().cdf(-x)
    angle, share = _t_share(df)
    return 1.0 - float(np.interp(math.atan(abs(t) / math.sqrt(df)), angle, share))


def _t_share(df: float) -> tuple[Array, Array]:
    """Angles a in [0, pi/2], and the probability that |t| <= sqrt(df) tan(a)."""
    angle = np.linspace(0.0, math.pi / 2, 20_001)
    density = np.cos(angle) ** (df - 1)
    area = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return angle, area / area[-1]


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


def _degrees(sample: Sample, users: float, seeds: float) -> float:
    """Welch and Satterthwaite's degrees of freedom for a sum of two estimated variances; NaN where undefined."""
    count, replicates = len(sample.points), sample.replicates.shape[1]
    spread = users**2 / (replicates - 1) + (seeds**2 / (count - 1) if count > 1 else 0.0)
    if not spread > 0:
        return float(replicates - 1) if math.isfinite(spread) else math.nan
    return float(max((users + seeds) ** 2 / spread, 1.0))


def _quantile(sample: Sample, users: float, seeds: float) -> float:
    df = _degrees(sample, users, seeds)
    return t_quantile(df) if math.isfinite(df) else math.nan


def p_value(sample: Sample) -> float:
    """Two-sided p of the mean over seeds being 0, by the same variance as `estimate`; NaN where undefined.

    It is below 1 - CONFIDENCE where that interval excludes 0.
    """
    if sample.replicates.shape[1] < 2:
        return math.nan
    over_users, over_seeds = _covariance(sample, sample)
    df = _degrees(sample, over_users, over_seeds)
    value, error = float(sample.points.mean()), math.sqrt(over_users + over_seeds)
    if not (math.isfinite(df) and math.isfinite(value)):
        return math.nan
    if error == 0:
        return 1.0 if value == 0 else 0.0
    return t_two_sided(value / error, df)


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p values of a family of tests (Holm 1979): reject where one is below the family's level.

    The i-th smallest of m (from 0) is multiplied by m - i, made to rise with i, and cut at 1. A NaN stays NaN and does
    not count.
    """
    adjusted = [math.nan] * len(p)
    order = sorted((i for i, value in enumerate(p) if math.isfinite(value)), key=lambda i: p[i])
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p[i]))
        adjusted[i] = highest
    return adjusted


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
