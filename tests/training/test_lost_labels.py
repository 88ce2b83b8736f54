"""Labels hidden from training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import training_runs as runs
from example_store import write_store

from rayfm.models.synthetic import synthetic_batch
from rayfm.schema import Feature, Schema, Table, Task
from rayfm.training.lost_labels import LostLabels, lose_labels

SCHEMA = Schema(
    tables={"user": Table(rows=100)},
    features=(Feature(name="user", kind="sparse"),),
    tasks=(Task(name="click"), Task(name="watch", kind="regression")),
    traffics=("feed", "search", "video"),
)


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
    rates = [json.loads((s.folder / "metrics" / runs.PERIODS[2] / "rates.json").read_text()) for s in specs]
    assert rates[0] == rates[1], "ne_train divides by one entropy for all, or it would say who lost labels"
    sums = [runs.metric_sums(spec, runs.PERIODS[2], "fm.none.1")["impression/click/sums"].sum(0) for spec in specs]
    assert sums[0][2] == sums[1][2] > 0, "the labels that it is scored against are all there"
    assert float(sums[1][3] / sums[1][1]) < 0.5 * float(sums[0][3] / sums[0][1]), "it learnt that nothing is clicked"
