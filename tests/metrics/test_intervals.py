"""Intervals: quantiles, variances by hand, and coverage in simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from rayfm.metrics import MetricState, bootstrap_weights
from rayfm.metrics.intervals import Sample, estimate, holm, p_value, ratio_estimate, t_quantile, t_two_sided
from rayfm.metrics.pool import Pool


@pytest.mark.parametrize("df", [1.0, 1.3, 2.0, 2.7, 5.5, 30.0, 99.9, 101.0, 199.0, 1e5])
@pytest.mark.parametrize("probability", [0.9, 0.975, 0.995])
def test_t_quantile(df: float, probability: float) -> None:
    assert t_quantile(df, probability) == pytest.approx(stats.t.ppf(probability, df), rel=1e-4 if df < 2 else 1e-6)


def test_one_seed_is_over_users_alone() -> None:
    replicates = np.array([[0.8, 0.9, 1.0, 0.7]])
    result = estimate(Sample(np.array([0.85]), replicates))
    half = stats.t.ppf(0.975, 3) * replicates.std(ddof=1)
    assert (result.lo, result.hi) == (pytest.approx(0.85 - half), pytest.approx(0.85 + half))
    assert result.seeds == 1


def test_seeds_and_users_by_hand() -> None:
    points = np.array([0.80, 0.82, 0.87])
    replicates = points[:, None] + np.array([-0.01, 0.0, 0.02, 0.01, -0.02])
    result = estimate(Sample(points, replicates))
    users, seeds = np.var([-0.01, 0.0, 0.02, 0.01, -0.02], ddof=1), np.var(points, ddof=1) / 3
    df = (users + seeds) ** 2 / (users**2 / 4 + seeds**2 / 2)
    half = stats.t.ppf(0.975, df) * math.sqrt(users + seeds)
    assert result.value == pytest.approx(0.83)
    assert (result.lo, result.hi) == (pytest.approx(0.83 - half), pytest.approx(0.83 + half))


def test_undefined_and_constant_samples() -> None:
    assert math.isnan(estimate(Sample(np.array([0.5]), np.empty((1, 0)))).lo)
    assert math.isnan(estimate(Sample(np.array([math.nan]), np.full((1, 9), math.nan))).hi)
    constant = estimate(Sample(np.array([0.5]), np.full((1, 9), 0.5)))
    assert (constant.lo, constant.hi) == (0.5, 0.5)
    # A replicate in which the metric happens to be undefined is left out.
    holed = estimate(Sample(np.array([0.5]), np.array([[0.4, math.nan, 0.6]])))
    assert holed.lo < 0.5 < holed.hi


def test_ratio_interval_is_the_delta_method_where_the_denominator_is_sharp() -> None:
    rng = np.random.default_rng(0)
    noise = rng.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], 4000).T * 1e-3
    a, b = Sample(np.array([0.5]), 0.5 + noise[:1]), Sample(np.array([1.0]), 1.0 + noise[1:])
    result, reason = ratio_estimate(a, b)
    assert reason is None
    assert result.value == pytest.approx(0.5)
    spread = 1.96 * (noise[0] - 0.5 * noise[1]).std()
    assert result.hi - result.lo == pytest.approx(2 * spread, rel=1e-2)


@pytest.mark.parametrize(
    ("b", "said"), [(1.0, "interval includes zero"), (-1.0, "interval includes zero"), (math.nan, "undefined")]
)
def test_ratio_without_a_denominator(b: float, said: str) -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(2, 1, 500))
    result, reason = ratio_estimate(Sample(np.ones(1), 1 + noise[0]), Sample(np.array([b]), b + noise[1]))
    assert math.isnan(result.value)
    assert reason is not None
    assert said in reason


def test_ratio_coverage() -> None:
    rng, hits = np.random.default_rng(3), 0
    for _ in range(400):
        a, b = 0.3 + 0.2 * rng.normal(), 1.0 + 0.25 * rng.normal()
        replicates = rng.normal(size=(2, 1, 200)) * np.array([0.2, 0.25])[:, None, None]
        result, reason = ratio_estimate(
            Sample(np.array([a]), a + replicates[0]), Sample(np.array([b]), b + replicates[1])
        )
        hits += reason is not None or result.lo <= 0.3 <= result.hi
    assert 0.92 < hits / 400 < 0.99


def clustered(
    dataset: int, biases: list[float], users: int = 250, rows: int = 6
) -> tuple[MetricState, list[MetricState]]:
    """Rows clustered by user (a user's own taste is half of the logit's variance), scored by biased models."""
    g = torch.Generator().manual_seed(dataset)
    user = torch.arange(users).repeat_interleave(rows) + 10_000 * dataset
    taste = 0.8 * torch.randn(users, generator=g).repeat_interleave(rows)
    known = 0.8 * torch.randn(users * rows, generator=g) - 1
    label = (torch.rand(users * rows, generator=g) < (known + taste).sigmoid()).float()
    ones = torch.ones_like(label)
    copies = bootstrap_weights(user, 100)
    states = []
    for bias in [0.0, *biases]:
        state = MetricState([("click", "binary")], ["all"], replicates=100, bins=256, replicate_bins=128)
        state.update("click", 0, known + bias, label, ones.bool(), ones, ones.long() * 0, user, copies)
        states.append(state)
    return states[0], states[1:]


def sample(states: list[MetricState], metric: str) -> Sample:
    pools = []
    for state in states:
        pool = Pool("binary")
        pool.add("p", state.cell(0, "click"), 0.3)
        pools.append(pool)
    return Sample(
        np.array([pool.points()[metric] for pool in pools]), np.stack([pool.replicates()[metric] for pool in pools])
    )


def truth(metric: str, biases: list[float]) -> float:
    """The metric on rows without end, by quadrature over what the model knows and the user's taste."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    known, taste = 0.8 * nodes[:, None] - 1, 0.8 * nodes[None, :]
    mass = (weights[:, None] * weights[None, :] / weights.sum() ** 2).sum(1)
    rate = (1 / (1 + np.exp(-known - taste)) * weights / weights.sum()).sum(1)
    values = []
    for bias in biases:
        p = 1 / (1 + np.exp(-known[:, 0] - bias))
        loss = -(mass * (rate * np.log(p) + (1 - rate) * np.log1p(-p))).sum()
        mean = (mass * rate).sum()
        entropy = -(mean * np.log(mean) + (1 - mean) * np.log1p(-mean))
        values.append({"ne": loss / entropy, "calibration": (mass * p).sum() / mean}[metric])
    return float(np.mean(values))


@pytest.mark.parametrize("metric", ["ne", "calibration"])
def test_coverage_over_users(metric: str) -> None:
    expected, hits = truth(metric, [0.0]), 0
    for dataset in range(200):
        state, _ = clustered(dataset, [])
        result = estimate(sample([state], metric))
        hits += result.lo <= expected <= result.hi
    assert 0.90 <= hits / 200 <= 0.99


def test_coverage_over_users_and_seeds_of_a_paired_difference() -> None:
    """Each seed's training leaves a random bias; the truth is the mean over all seeds that could have been."""
    spread, hits, rng = 0.1, 0, np.random.default_rng(7)
    nodes, weights = np.polynomial.hermite_e.hermegauss(15)
    means = [truth("calibration", [spread * node]) - truth("calibration", [0.0]) for node in nodes]
    expected = float(np.average(means, weights=weights))
    users_alone = 0
    for dataset in range(200):
        reference, states = clustered(1000 + dataset, (spread * rng.normal(size=3)).tolist())
        difference = sample(states, "calibration") - sample([reference] * 3, "calibration")
        result = estimate(difference)
        hits += result.lo <= expected <= result.hi
        half = 1.97 * difference.replicates.mean(0).std()
        users_alone += abs(result.value - expected) <= half
    assert 0.90 <= hits / 200 <= 0.99
    # The seeds' part is what does it: users alone would claim far too much.
    assert users_alone / 200 < 0.5


@pytest.mark.parametrize("df", [1.0, 2.5, 7.0, 60.0, 101.0, 199.0, 1e5])
@pytest.mark.parametrize("t", [0.0, -0.7, 1.96, 3.5])
def test_two_sided_probability(df: float, t: float) -> None:
    assert t_two_sided(t, df) == pytest.approx(2 * stats.t.sf(abs(t), df), abs=3e-5)


def test_p_value_agrees_with_the_interval() -> None:
    rng = np.random.default_rng(5)
    for shift in (0.0, 0.01, 0.02, 0.05):
        points = shift + rng.normal(0, 0.005, 3)
        sample = Sample(points, points[:, None] + rng.normal(0, 0.008, 200))
        result, p = estimate(sample), p_value(sample)
        assert (p < 0.05) == (result.lo > 0 or result.hi < 0)
        at_the_edge = Sample(sample.points - result.lo, sample.replicates - result.lo)
        assert p_value(at_the_edge) == pytest.approx(0.05, rel=1e-3)
    assert math.isnan(p_value(Sample(np.array([0.5]), np.empty((1, 0)))))
    assert p_value(Sample(np.array([0.5]), np.full((1, 9), 0.5))) == 0.0


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, math.nan, 0.005]) == pytest.approx([0.03, 0.06, 0.06, math.nan, 0.02], nan_ok=True)
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
