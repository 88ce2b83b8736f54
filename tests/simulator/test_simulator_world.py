"""The world: seeded, drifting, with ads that come and go; a truth that no log column gives away."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from rayfm.simulator.config import SimulatorConfig, TrafficConfig, WorldConfig
from rayfm.simulator.history import History
from rayfm.simulator.requests import draw_requests, period_start
from rayfm.simulator.world import LONG_VIEW_SECONDS, World, stream


def small(**changes) -> SimulatorConfig:
    base = {"users": 300, "ads": 120, "campaigns": 30, "candidates": 80, "requests_per_period": 400}
    return SimulatorConfig(**(base | changes))


def advanced(config: SimulatorConfig, periods: int) -> World:
    world = World(config)
    for _ in range(periods):
        world.advance()
    return world


def pairs(config: SimulatorConfig, rows: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    limits = (config.users, config.ads, len(config.traffics), 24, 3)
    return tuple(rng.integers(0, limit, rows) for limit in limits)


def test_a_stream_is_its_own():
    first = stream(0, "users", 3).random(4)
    assert np.array_equal(first, stream(0, "users", 3).random(4))
    for other in (stream(1, "users", 3), stream(0, "ads", 3), stream(0, "users", 4)):
        assert not np.array_equal(first, other.random(4))


def test_same_seed_same_truth_other_seed_another():
    config = small()
    rows = pairs(config, 2000)
    truth = advanced(config, 3).truth(*rows)
    again = advanced(config, 3).truth(*rows)
    other = advanced(small(seed=1), 3).truth(*rows)
    assert np.array_equal(truth.click, again.click)
    assert np.array_equal(truth.watch_time, again.watch_time)
    assert abs(np.corrcoef(truth.click, other.click)[0, 1]) < 0.5


def test_the_truth_does_not_depend_on_the_chunks():
    config = small()
    world, rows = advanced(config, 1), pairs(config, 1000)
    assert np.array_equal(world.truth(*rows).click, world.truth(*rows, chunk=37).click)


def test_labels_follow_the_truth():
    config = small()
    truth = advanced(config, 1).truth(*pairs(config, 200_000))
    labels = truth.sample(np.random.default_rng(5))
    for task in ("click", "long_view"):
        probability = getattr(truth, task)
        assert ((probability > 0) & (probability < 1)).all()
        assert set(np.unique(labels[task])) == {0.0, 1.0}
        error = np.sqrt((probability * (1 - probability)).sum())
        assert abs(labels[task].sum() - probability.sum()) < 5 * error
    assert np.array_equal(labels["long_view"] == 1, labels["watch_time"] >= LONG_VIEW_SECONDS)
    assert labels["watch_time"].mean() == pytest.approx(truth.watch_time.mean(), rel=0.03)


def energy_beyond_latent_rank(**world) -> float:
    """Share of the logits' variance (without row and column means) that no product of the latents can hold."""
    config = small(world=WorldConfig(**world))
    user, ad = np.divmod(np.arange(120 * 120), 120)
    zero = np.zeros_like(user)
    click = advanced(config, 1).truth(user, ad, zero, zero, zero).click.astype(np.float64)
    logit = np.log(click / (1 - click)).reshape(120, 120)
    logit -= logit.mean(0) + logit.mean(1)[:, None] - logit.mean()
    energy = np.linalg.svd(logit, compute_uv=False) ** 2
    return float(energy[config.world.latent_dim :].sum() / energy.sum())


def test_user_and_ad_interact_beyond_any_product_of_their_latents():
    assert energy_beyond_latent_rank(network_scale=0.0) < 1e-6  # an FM that knows the latents holds all of this
    assert energy_beyond_latent_rank(product_scale=0.0) > 0.05


def test_surfaces_weigh_factors_differently_and_differ_in_base_rate():
    config = small()
    world = advanced(config, 1)
    user, ad, _, hour, device = pairs(config, 20_000)
    logits = []
    for surface in range(3):
        click = world.truth(user, ad, np.full_like(user, surface), hour, device).click
        logits.append(np.log(click / (1 - click)))
    correlation = np.corrcoef(logits)
    assert (correlation[np.triu_indices(3, 1)] < 0.97).all()
    assert (correlation > 0.2).all()
    rates = [(1 / (1 + np.exp(-logit))).mean() for logit in logits]
    assert rates[1] > rates[0] > rates[2]  # video, feed, sidebar as their base_logit says


def test_preferences_drift_as_configured():
    still, moving = small(world=WorldConfig(user_drift=0.0)), small(world=WorldConfig(user_drift=0.36))
    assert np.array_equal(advanced(still, 1).user_latent, advanced(still, 5).user_latent)
    start = advanced(moving, 1).user_latent
    for periods, expected in ((1, 0.8), (3, 0.8**3)):
        later = advanced(moving, 1 + periods).user_latent
        assert np.corrcoef(start.ravel(), later.ravel())[0, 1] == pytest.approx(expected, abs=0.06)
        assert later.std() == pytest.approx(1.0, abs=0.05)  # a walk that stays as wide as it was


def test_the_trend_moves_the_odds_of_ads():
    def change(drift: float) -> float:
        config = small(world=WorldConfig(user_drift=0.0, turnover=0.0, fatigue=0.0, trend_drift=drift))
        rows = pairs(config, 2000)
        return float(np.abs(advanced(config, 6).truth(*rows).click - advanced(config, 1).truth(*rows).click).max())

    assert change(0.0) == 0.0
    assert change(0.3) > 0.005


def test_ads_come_and_go():
    config = small(ads=1000, world=WorldConfig(turnover=0.1))
    world = advanced(config, 1)
    for _ in range(5):
        before, latent = world.ad_id.copy(), world.ad_latent.copy()
        new = world.advance()
        changed = np.flatnonzero(world.ad_id != before)
        assert np.array_equal(changed, new)
        assert 60 < len(new) < 140
        assert world.ad_id[new].min() > before.max()  # an id is never used again
        assert (world.ad_age[new] == 0).all()
        stayed = np.setdiff1d(np.arange(1000), new)
        assert np.array_equal(world.ad_latent[stayed], latent[stayed])
        assert (world.ad_age[stayed] > 0).all()
    assert len(np.unique(world.ad_id)) == 1000


def test_an_ad_tires():
    config = small(world=WorldConfig(fatigue=0.3, turnover=0.0, user_drift=0.0, trend_drift=0.0))
    rows = pairs(config, 2000)
    young, old = advanced(config, 1).truth(*rows).click, advanced(config, 4).truth(*rows).click
    assert (old <= young).all()
    assert old.mean() < 0.9 * young.mean()


def test_requests_fill_their_period_in_time_order_with_distinct_candidates():
    config = small(candidates=120, ads=120, period_hours=6, requests_per_period=3000)
    world = advanced(config, config.bootstrap_periods + 2)
    requests = draw_requests(world)
    start, end = (round(period_start(config, number).timestamp() * 1e6) for number in (1, 2))
    assert (np.diff(requests.time) > 0).all()
    assert start <= requests.time[0] < requests.time[-1] < end
    assert set(requests.hour) == set(range(6, 12))
    assert (np.sort(requests.pool, axis=1) == np.arange(120)).all()
    assert set(requests.device) == {0, 1, 2}
    counts = np.bincount(requests.traffic) / len(requests)
    assert counts == pytest.approx([0.5, 0.3, 0.2], abs=0.04)


def test_candidates_are_spread_over_the_catalogue():
    config = small(ads=120, candidates=40, requests_per_period=3000)
    pool = draw_requests(advanced(config, 1)).pool
    assert (np.diff(np.sort(pool, axis=1)) > 0).all()
    counts = np.bincount(pool.reshape(-1), minlength=120)
    assert counts == pytest.approx(np.full(120, 1000), rel=0.2)


def test_requests_do_not_depend_on_what_models_show():
    config = small()
    first, second = advanced(config, 2), advanced(config, 2)
    second.truth(*pairs(config, 10)).sample(np.random.default_rng(0))
    assert np.array_equal(draw_requests(first).user, draw_requests(second).user)


def test_history_keeps_the_newest_clicks_in_order():
    history = History(small(history_length=3, traffics=(TrafficConfig(name="all", share=1, base_logit=-3),)))
    zero = np.zeros(5, np.int64)

    def add(users: list[int], ads: list[int], clicks: list[float]) -> None:
        user, ad = np.array(users), np.array(ads)
        history.add(user, ad, ad + 100, ad % 4, zero[: len(user)], np.array(clicks, np.float32))

    add([7, 8, 7, 7, 9], [1, 2, 3, 4, 5], [1, 1, 0, 1, 0])
    assert history.clicked_ads[7].tolist() == [-1, 101, 104]
    assert history.clicked_ads[8].tolist() == [-1, -1, 102]
    assert history.clicked_ads[9].tolist() == [-1, -1, -1]
    add([7, 7, 8], [6, 9, 10], [1, 1, 1])
    assert history.clicked_ads[7].tolist() == [104, 106, 109]
    assert history.clicked_categories[7].tolist() == [0, 2, 1]
    assert history.clicked_ads[8].tolist() == [-1, 102, 110]
    assert history.user_shown[7, 0] == 5
    assert history.user_clicked[7, 0] == 4
    assert history.user_category[7].tolist()[:4] == [1, 2, 1, 0]
    add([7, 7, 7, 7, 7], [11, 12, 13, 14, 15], [1, 1, 1, 1, 1])
    assert history.clicked_ads[7].tolist() == [113, 114, 115]
    history.forget_ads(np.array([6]))
    assert history.ad_shown[6, 0] == 0
    assert history.ad_shown[9, 0] == 1


def test_a_cascade_that_widens_is_refused():
    with pytest.raises(ValueError, match="must narrow"):
        small(candidates=30)


def test_the_defaults_are_frozen():
    """They were fitted once, before any distillation ran (docs/simulator.md); results on other ones do not compare."""
    dumped = json.dumps(SimulatorConfig().dump(), sort_keys=True)
    assert hashlib.sha256(dumped.encode()).hexdigest()[:16] == "87b2dc35963c7fb2"
