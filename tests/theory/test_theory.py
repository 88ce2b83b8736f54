"""Numerical experiments of the papers' theory, held to closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rayfm.config import ConfigError, RayfmError
from rayfm.theory import adapter, experiments, heads, selection
from rayfm.theory.order_statistics import BLOM, approximate_order_statistics, exact_order_statistics


def test_order_statistics_of_few_are_known_numbers():
    # Two: 1 / sqrt(pi). Three: 3 / (2 sqrt(pi)). Four and five: published tables (e.g. Harter 1961).
    assert exact_order_statistics(1) == pytest.approx([0], abs=1e-12)
    assert exact_order_statistics(2) == pytest.approx([1 / math.sqrt(math.pi), -1 / math.sqrt(math.pi)], abs=1e-10)
    assert exact_order_statistics(3) == pytest.approx(
        [1.5 / math.sqrt(math.pi), 0, -1.5 / math.sqrt(math.pi)], abs=1e-10
    )
    assert exact_order_statistics(4)[:2] == pytest.approx([1.0293753730, 0.2970113823], abs=1e-9)
    assert exact_order_statistics(5)[:3] == pytest.approx([1.1629644736, 0.4950189705, 0], abs=1e-9)


@pytest.mark.parametrize("n", [7, 100, 3000])
def test_order_statistics_sum_to_zero_and_agree_with_their_approximation(n: int):
    exact = exact_order_statistics(n)
    assert exact.sum() == pytest.approx(0, abs=1e-8)
    np.testing.assert_allclose(exact, -exact[::-1], atol=1e-9)
    assert (np.diff(exact) < 0).all()
    np.testing.assert_allclose(approximate_order_statistics(n), exact, atol=0.02)


def test_the_printed_constant_has_no_quantile():
    with pytest.raises(RayfmError, match=r"alpha 3\.375: outside \[0, 1\) the quantile's argument leaves"):
        approximate_order_statistics(10, alpha=3.375)
    assert BLOM == 0.375
    # By hand: i = 1 of n = 2: Phi^-1((2 - 1 - .375 + 1) / (2 - .75 + 1)) = Phi^-1(1.625 / 2.25).
    assert approximate_order_statistics(2)[0] == pytest.approx(0.589456, abs=1e-6)


def test_one_stage_bias_by_hand():
    # spread = 5; E z = 10 + 5 m, E y = 10 + 9/5 m, bias = 16/5 m.
    world = selection.Candidates(n=3, mu=10, sigma=3, sigma_1=4)
    m = np.array([1.0, 0.0, -1.0])
    assert selection.expected_prediction(world, m).tolist() == [15, 10, 5]
    assert selection.expected_value(world, m).tolist() == pytest.approx([11.8, 10, 8.2])
    assert selection.expected_bias(world, m).tolist() == pytest.approx([3.2, 0, -3.2])


def test_a_noisier_model_promises_more_and_delivers_less():
    m = exact_order_statistics(100)[:10]
    worlds = [selection.Candidates(n=100, sigma_1=noise) for noise in (0.0, 0.5, 1.0, 2.0)]
    promised = [selection.expected_prediction(world, m).sum() for world in worlds]
    delivered = [selection.expected_value(world, m).sum() for world in worlds]
    assert promised == sorted(promised)
    assert delivered == sorted(delivered, reverse=True)
    assert promised[0] == pytest.approx(delivered[0])


@pytest.mark.parametrize("noise", [(1.0, 0.5), (2.0, 1.0), (0.5, 0.5)])
def test_two_stages_are_what_the_closed_form_says(noise: tuple[float, float]):
    world = selection.Candidates(n=200, mu=5, sigma=1, sigma_1=noise[0], sigma_2=noise[1])
    k = [1, 5, 20, 60, 200]
    found, expected = selection.simulate(world, k, repetitions=4000, seed=1), selection.closed_form(world, k)
    for name in ("cal_12", "cal_10", "cal_20"):
        value, half, truth = (getattr(part, name) for part in (found.value, found.half, expected))
        assert (np.abs(value - truth) < 2 * half + 1e-12).all(), name
        assert (half < 0.02).all()
    assert (found.value.cal_10[:-1] > 1.03).all()  # picked by itself: overrated
    assert expected.cal_10[-1] == pytest.approx(1, abs=1e-9)  # all are passed on: nothing was picked
    assert (np.diff(found.value.cal_12) < 0).all()


def test_simulated_calibration_does_not_depend_on_how_much_is_drawn_at_a_time():
    world = selection.Candidates(n=50)
    one = selection.simulate(world, [5], repetitions=300, seed=3, at_once=50 * 300)
    # The draws differ, the worlds do not: intervals overlap.
    other = selection.simulate(world, [5], repetitions=300, seed=3, at_once=50 * 7)
    assert abs(one.value.cal_10[0] - other.value.cal_10[0]) < 2 * (one.half.cal_10[0] + other.half.cal_10[0])


@pytest.mark.parametrize("k", [[], [0], [51]])
def test_impossible_cuts_are_refused(k: list[int]):
    with pytest.raises(RayfmError, match=r"k_1 must lie in \[1, 50\]"):
        selection.simulate(selection.Candidates(n=50), k)


@pytest.mark.parametrize(("units", "mu", "truth"), [(2, 0.5, 0.5), (4, 0.5, 0.3), (6, 1.0, 0.7)])
def test_one_head_keeps_the_bias_and_heads_of_their_own_do_not(units: int, mu: float, truth: float):
    teaching = heads.Teaching(inputs=16, units=units, mu=mu, truth_weight=truth, steps=6000)
    # By hand for two units: mu * alpha_2.
    if units == 2:
        assert heads.single_head_bias(teaching) == pytest.approx(0.25)
    for seed in range(3):
        found = heads.descend(teaching, seed)
        assert found.single[-1] == pytest.approx(heads.single_head_bias(teaching), rel=1e-3)
        assert found.auxiliary[-1] < 0.02 * found.single[-1]
        assert found.single[0] > found.single[-1]


def test_a_descent_that_diverges_says_so():
    with pytest.raises(RayfmError, match="rate 5: the descent diverges"):
        heads.descend(heads.Teaching(rate=5))


@pytest.mark.parametrize(("d", "s"), [(16, 2), (32, 8)])
def test_the_adapters_errors_are_the_closed_form(d: int, s: int):
    drift = adapter.Drift(inputs=d, adapter=s, labels=6000, gamma=3.0)
    alpha = [0.0, 0.5, 2.0, 20.0]
    found = adapter.measure(drift, alpha, repetitions=300, seed=0)
    expected = adapter.expected_error(drift, np.array(alpha))
    # First order in 1/N: the next term is of relative order d / N.
    assert (np.abs(found.error - expected) < 2 * found.half + 3 * d / drift.labels * expected).all()
    gain = adapter.expected_gain(drift, np.array(alpha))
    assert (np.abs(found.gain - gain) < 2 * found.gain_half + 3 * d / drift.labels * gain).all()
    assert found.gain[0] == pytest.approx(1)


def test_the_papers_gain_is_passed_and_is_no_limit():
    drift = adapter.Drift(inputs=64, adapter=4)
    at = adapter.alpha_of_the_papers_gain(drift)
    assert adapter.papers_gain(drift) == pytest.approx(2)
    assert adapter.largest_gain(drift) == pytest.approx(4)
    # By hand: (1 + alpha)^2 = (64 - 4) / (16 - 4) = 5.
    assert at == pytest.approx(math.sqrt(5) - 1)
    assert adapter.expected_gain(drift, np.array([at, 1e9])) == pytest.approx([2, 4], rel=1e-6)


def test_drift_that_the_adapter_cannot_learn_makes_the_best_alpha_finite():
    drift = adapter.Drift(inputs=16, adapter=2, labels=4000, gamma=3.0, outside=1.0)
    alpha = np.array([0.0, 0.3, 1.0, 30.0])
    found = adapter.measure(drift, list(alpha), repetitions=200, seed=2)
    expected = adapter.expected_error(drift, alpha)
    np.testing.assert_allclose(found.error, expected, rtol=0.06)
    assert found.error[-1] > found.error[0] > found.error[1]


@pytest.mark.parametrize("bad", [{"inputs": 3, "adapter": 4}, {"gamma": 0}, {"labels": 10}])
def test_impossible_drifts_are_refused(bad: dict[str, float]):
    with pytest.raises(RayfmError, match="needs 1 <= adapter <= inputs < labels"):
        adapter.Drift(**bad)


def test_every_experiment_prints_and_draws_small(tmp_path):
    found = experiments.simulate((), tmp_path, quick=True)
    assert [finding.name for finding, _ in found] == list(experiments.EXPERIMENTS)
    for finding, path in found:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert {len(row) for row in finding.rows} == {len(finding.columns)}


def test_an_unknown_experiment_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no experiment 'two-stages'; did you mean 'two-stage'"):
        experiments.simulate(("two-stages",), tmp_path)
    assert not list(tmp_path.iterdir())
