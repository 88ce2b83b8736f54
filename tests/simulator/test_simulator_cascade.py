"""The cascade and its production models: widths, order, what each stage sees, what the models learn from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rayfm.simulator.cascade import run_cascade
from rayfm.simulator.config import ProductionConfig
from rayfm.simulator.production import Impressions, ProductionModel, Side, platt, single_thread


def test_each_stage_ranks_by_probability_times_bid_and_passes_its_best():
    rng = np.random.default_rng(0)
    pool = np.stack([rng.permutation(50)[:20] for _ in range(7)])
    bid = rng.uniform(0.5, 2, 50).astype(np.float32)
    tables = [rng.random(50, dtype=np.float32) for _ in range(3)]
    scorers = [lambda ads, table=table: table[ads] for table in tables]
    outcome = run_cascade(pool, bid, scorers, (10, 6, 2))
    for request, ads in enumerate(pool):
        left = ads
        for table, width in zip(tables, (10, 6, 2), strict=True):
            left = np.array(sorted(left, key=lambda ad: -table[ad] * bid[ad]))[:width]
        assert outcome.ads(outcome.shown)[request].tolist() == left.tolist()
    assert [stage.column.shape for stage in outcome.stages] == [(7, 20), (7, 10), (7, 6)]
    assert np.array_equal(outcome.passed(2), outcome.shown)
    for place in range(2):
        assert np.array_equal(np.sort(outcome.passed(place)), np.sort(outcome.stages[place + 1].column))
        unseen = np.isnan(outcome.grid(place + 1))
        assert unseen.sum() == 7 * (20 - (10, 6)[place])
    said = outcome.said(1, outcome.shown)
    assert np.array_equal(said, tables[1][outcome.ads(outcome.shown)])


def test_explored_requests_pass_on_random_candidates():
    pool = np.tile(np.arange(30), (200, 1))
    chance = np.full((200, 30), np.nan, np.float32)
    chance[100:] = np.random.default_rng(1).random((100, 30), dtype=np.float32)
    by_position = [lambda ads: (ads + 1).astype(np.float32) / 31] * 2
    outcome = run_cascade(pool, np.ones(30, np.float32), by_position, (10, 3), chance)
    assert (outcome.shown[:100] == [29, 28, 27]).all()
    counts = np.bincount(outcome.shown[100:].reshape(-1), minlength=30)
    assert (counts > 0).sum() > 25
    assert np.array_equal(outcome.said(1, outcome.shown), (outcome.shown + 1).astype(np.float32) / 31)


def model_and_rows(hidden: tuple[int, ...], rows: int = 6000) -> tuple[ProductionModel, Impressions]:
    """A model, and rows whose clicks depend on the pair of a request's and an ad's category."""
    rng = np.random.default_rng(3)
    with single_thread(0):
        model = ProductionModel((4, 3), (5,), 1, 1, 16, hidden, ProductionConfig(learning_rate=0.02, passes=12))
    requests = Side(rng.integers(0, [4, 3], (rows, 2)), rng.random((rows, 1), dtype=np.float32))
    ads = Side(rng.integers(0, 5, (rows, 1)), rng.random((rows, 1), dtype=np.float32))
    likes = (requests.ids[:, 0] + ads.ids[:, 0]) % 2
    click = (rng.random(rows) < np.where(likes == 1, 0.5, 0.05)).astype(np.float32)
    return model, Impressions(requests, ads, click)


@pytest.mark.parametrize("hidden", [(), (16, 8)], ids=["two towers", "mlp"])
def test_a_model_learns_an_interaction(hidden):
    model, impressions = model_and_rows(hidden)
    with single_thread(0):
        loss = model.fit(impressions, seed=1)
        model.calibrate(impressions)
        rows = np.arange(len(impressions.click))
        said = model.predict(impressions.requests, impressions.ads, rows[:, None])[:, 0]
    likes = (impressions.requests.ids[:, 0] + impressions.ads.ids[:, 0]) % 2
    assert said[likes == 1].mean() == pytest.approx(0.5, abs=0.06)
    assert said[likes == 0].mean() == pytest.approx(0.05, abs=0.03)
    assert loss < 0.5
    assert said.mean() == pytest.approx(impressions.click.mean(), rel=0.01)  # what the calibrator is for


@pytest.mark.parametrize("hidden", [(), (16, 8)], ids=["two towers", "mlp"])
def test_predictions_do_not_depend_on_chunks_and_equal_the_training_graph(hidden):
    model, impressions = model_and_rows(hidden)
    pool = np.random.default_rng(0).integers(0, 50, (30, 9))
    whole = model.predict(impressions.requests[np.arange(30)], impressions.ads[np.arange(50)], pool)
    parts = model.predict(impressions.requests[np.arange(30)], impressions.ads[np.arange(50)], pool, chunk=20)
    request_ids, request_dense, ad_ids, ad_dense, _ = impressions.tensors()
    row = torch.arange(30).repeat_interleave(9)
    ad = torch.from_numpy(pool.reshape(-1))
    with torch.no_grad():
        logits = model.combine(model.request(request_ids[row], request_dense[row]), model.ad(ad_ids[ad], ad_dense[ad]))
    assert parts == pytest.approx(whole, abs=1e-6)
    assert whole.reshape(-1) == pytest.approx(torch.sigmoid(logits).numpy(), abs=1e-6)


def test_platt_recovers_slope_and_shift():
    rng = np.random.default_rng(0)
    logit = rng.normal(-2, 1.5, 200_000)
    click = (rng.random(200_000) < 1 / (1 + np.exp(-(0.6 * logit - 0.4)))).astype(np.float32)
    slope, shift = platt(logit, click)
    assert slope == pytest.approx(0.6, abs=0.02)
    assert shift == pytest.approx(-0.4, abs=0.04)


def test_platt_stands_still_without_evidence():
    assert platt(np.zeros(0), np.zeros(0, np.float32)) == (1.0, 0.0)
    slope, shift = platt(np.full(20, -3.0), np.zeros(20, np.float32))
    assert np.isfinite([slope, shift]).all()


def test_single_thread_leaves_torch_as_it_was():
    threads = torch.get_num_threads()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with single_thread(1):
        assert torch.get_num_threads() == 1
        inside = torch.rand(3)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.rand(3), expected)
    assert not torch.equal(inside, expected)
