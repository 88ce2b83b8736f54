"""Permuting look-ups is permuting features: held to a batch that is shuffled itself, for every model and feature."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from model_batches import SCHEMA, SIZES, TASKS, random_batch, small_config, small_model
from torch import nn

from rayfm.config import DataError
from rayfm.data.batch import Batch
from rayfm.models.base import ModelOutput
from rayfm.models.embeddings import FeatureEmbeddings
from rayfm.selection.replay import Replay, input_modules, replayable
from rayfm.selection.shuffle import shuffled
from rayfm.training.config import TrainingConfig
from rayfm.training.learner import Learner, LearnerConfig
from rayfm.training.trainer import single_process_group

FEATURES = tuple(feature.name for feature in SCHEMA.features)
DENSE = tuple(feature.name for feature in SCHEMA.features if feature.kind == "dense")
ROWS = 32


def order(seed: int = 0, rows: int = ROWS) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).permutation(rows))


def lists_of(batch: Batch, feature: str) -> list[list[float]]:
    """A feature's values row by row, with weights, the slow way."""
    if feature in DENSE:
        return [[value] for value in batch.dense[:, DENSE.index(feature)].tolist()]
    for ids in (batch.sparse, batch.weighted, batch.sequence):
        if ids is not None and feature in ids.keys():  # noqa: SIM118
            part = ids[feature]
            bounds = part.offsets().tolist()
            values = part.values().tolist()
            weights = part.weights_or_none()
            pairs = values if weights is None else list(zip(values, weights.tolist(), strict=True))
            return [pairs[start:stop] for start, stop in itertools.pairwise(bounds)]
    raise AssertionError(feature)


@pytest.mark.parametrize("feature", FEATURES)
def test_a_shuffled_batch_has_that_feature_alone_in_another_order(feature: str) -> None:
    batch, moved = random_batch(ROWS), order()
    result = shuffled(batch, feature, moved, DENSE)
    before, after = lists_of(batch, feature), lists_of(result, feature)
    assert after == [before[place] for place in moved.tolist()]
    assert after != before
    for other in FEATURES:
        if other != feature:
            assert lists_of(result, other) == lists_of(batch, other)
    assert result.example_id is batch.example_id


def test_a_feature_that_the_batch_lacks() -> None:
    with pytest.raises(DataError, match="the batch lacks feature 'colour'"):
        shuffled(random_batch(4), "colour", order(rows=4), DENSE)


@pytest.mark.parametrize("kind", SIZES)
@torch.no_grad()
def test_every_feature_of_every_model(kind: str) -> None:
    model = small_model(kind).eval()
    for table in (parameter for name, parameter in model.named_parameters() if "embedding" in name):
        nn.init.normal_(table)  # tables start near zero, where no feature changes anything
    batch = random_batch(ROWS)
    replay = Replay(model)
    plain = model(batch)
    recorded = replay.record(batch)
    changed = set()
    for seed, feature in enumerate(FEATURES):
        moved = order(seed)
        fast = replay.permuted(feature, moved)
        slow = model(shuffled(batch, feature, moved, DENSE))
        for task in TASKS:
            torch.testing.assert_close(fast.logits[task], slow.logits[task])
        torch.testing.assert_close(fast.representation, slow.representation)
        if not torch.allclose(fast.logits["click"], plain.logits["click"]):
            changed.add(feature)
    assert changed == set(FEATURES), "the test would not notice a feature that is not permuted"
    # Nothing is left of it: neither in what was recorded nor in the model.
    for output in (recorded, replay.output(), model(batch)):
        torch.testing.assert_close(output.logits["click"], plain.logits["click"], rtol=0, atol=0)
    assert not any("forward" in vars(module) for module in model.modules())
    assert replayable(model, batch, FEATURES, DENSE) == set(FEATURES)


@torch.no_grad()
def test_the_embeddings_are_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("deepfm").eval()
    looked_up: list[int] = []
    look_up = FeatureEmbeddings._look_up
    monkeypatch.setattr(FeatureEmbeddings, "_look_up", lambda self, *ids: looked_up.append(1) or look_up(self, *ids))
    replay = Replay(model)
    replay.record(random_batch(ROWS))
    assert len(looked_up) == 2, "factors and linear weights"
    for feature in FEATURES:
        replay.permuted(feature, order())
    assert len(looked_up) == 2


@torch.no_grad()
def test_a_model_whose_forward_fails_is_left_as_it_was() -> None:
    model = small_model("dcnv2").eval()
    batch = random_batch(ROWS)
    replay = Replay(model)
    replay.record(batch)
    before = replay.output().logits["click"]
    model.deep.forward = lambda _: 1 / 0
    with pytest.raises(ZeroDivisionError):
        replay.permuted("video", order())
    del model.deep.forward
    torch.testing.assert_close(replay.output().logits["click"], before, rtol=0, atol=0)
    torch.testing.assert_close(model(batch).logits["click"], before, rtol=0, atol=0)


class Peeking(nn.Module):
    """A model that reads one feature besides its embeddings, and one by no module of rayfm."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_model("deepfm", features=tuple(name for name in FEATURES if name != "duration"))

    def forward(self, batch: Batch) -> ModelOutput:
        output = self.inner(batch)
        ages, durations = (batch.dense[:, DENSE.index(name)] for name in ("age", "duration"))
        return ModelOutput(output.representation, {"click": output.logits["click"] + ages + 2 * durations})


def test_a_model_that_reads_otherwise_is_found_out() -> None:
    model = Peeking().eval()
    assert len(input_modules(model)) == 3  # factors, linear weights, dense columns
    found = replayable(model, random_batch(ROWS), FEATURES, DENSE)
    assert found == set(FEATURES) - {"age", "duration"}


@pytest.mark.parametrize("kind", ["deepfm", "dmin"])
def test_a_sharded_model(kind: str, tmp_path) -> None:
    with single_process_group():
        config = LearnerConfig(model_name="m", variant="v", seed=3, model=small_config(kind), tasks=TASKS)
        training = TrainingConfig(row_wise_from=30)  # some tables whole, some by rows
        learner = Learner(config, training, SCHEMA, torch.device("cpu"), tmp_path / "plan.json")
        learner.dmp.eval()
        model = learner.module.model
        batch = random_batch(ROWS)
        replay = Replay(model)
        with torch.no_grad():
            replay.record(batch)
            for seed, feature in enumerate(FEATURES):
                moved = order(seed)
                fast = replay.permuted(feature, moved).logits
                slow = model(shuffled(batch, feature, moved, DENSE)).logits
                for task in TASKS:
                    torch.testing.assert_close(fast[task], slow[task])
