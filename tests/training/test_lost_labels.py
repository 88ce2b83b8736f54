"""Labels hidden from training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import training_runs as runs
from example_store import write_store

from rayfm.models.synthetic import synthetic_batch
from rayfm.schema import Feature, Schema, Table, Task
from rayfm.training.lost_labels import LostLabels, lose_labels, uniform_of

SCHEMA = Schema(
    tables={"user": Table(rows=100)},
    features=(Feature(name="user", kind="sparse"),),
    tasks=(Task(name="click"), Task(name="watch", kind="regression")),
    traffics=("feed", "search", "video"),
)


def splitmix(value: int) -> float:
    """SplitMix64's finaliser in Python's own integers."""
    mask = 2**64 - 1
    x = (value + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return ((x ^ (x >> 31)) >> 11) / 2**53


def test_the_draw_is_splitmix64() -> None:
    ids = [0, 1, 17, 2**40 + 3, 2**62, -5]
    np.testing.assert_allclose(uniform_of(torch.tensor(ids)).numpy(), [splitmix(value) for value in ids], rtol=0)
    draws = uniform_of(torch.arange(20_000))
    assert float(draws.mean()) == pytest.approx(0.5, abs=0.01)
    assert float((draws < 0.2).double().mean()) == pytest.approx(0.2, abs=0.01)


def test_positives_of_the_named_traffics_are_hidden() -> None:
    batch = synthetic_batch(SCHEMA, rows=6000)
    batch.labels[:] = 1.0
    batch.traffic[:] = torch.arange(6000) % 3
    batch.example_id[:] = torch.arange(6000)
    seen = lose_labels(batch, LostLabels(traffics=("search", "video"), kept=0.25), SCHEMA)
    click, watch = seen.labels[:, 0], seen.labels[:, 1]
    assert bool((click[batch.traffic == 0] == 1).all())
    for traffic in (1, 2):
        assert float(click[batch.traffic == traffic].mean()) == pytest.approx(0.25, abs=0.03)
    assert bool((watch == 1).all()), "a regression's label is no positive"
    assert bool((batch.labels == 1).all()), "the batch itself is not touched"
    assert seen.label_mask is batch.label_mask, "a false negative looks like a label"


def test_training_sees_them_lost_and_scoring_does_not(tmp_path: Path) -> None:
    store = tmp_path / "store"
    write_store(store, list(runs.PERIODS), impressions=300, considerations=0)
    learner = runs.learner("fm")
    schema = runs.spec(store, tmp_path, learner).schema_
    hidden = learner.model_copy(update={"lost_labels": LostLabels(traffics=schema.traffics, kept=0.0)})
    fast = {"dense": {"lr": 0.1}}
    specs = [runs.spec(store, tmp_path / name, item, **fast) for name, item in (("all", learner), ("none", hidden))]
    for spec in specs:
        runs.train_here(spec)
    sums = [runs.metric_sums(spec, runs.PERIODS[2], "fm.none.1")["impression/click/sums"].sum(0) for spec in specs]
    assert sums[0][2] == sums[1][2] > 0, "the labels that it is scored against are all there"
    assert float(sums[1][3] / sums[1][1]) < 0.5 * float(sums[0][3] / sums[0][1]), "it learnt that nothing is clicked"
