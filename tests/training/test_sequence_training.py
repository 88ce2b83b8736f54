"""A model with unpooled sequences goes the whole way: sharded, trained, checkpointed, published, served."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import training_runs as runs
from example_store import write_store

from rayfm.config import ConfigError
from rayfm.export.served import export_model
from rayfm.models.base import MODELS
from rayfm.schema import Schema
from rayfm.snapshots.load import SnapshotStore
from rayfm.training.loop import TrainingLoop

KEY = "dmin.none.1"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    write_store(root, list(runs.PERIODS), impressions=400, considerations=100)
    return root


@pytest.fixture(scope="module")
def alone(store: Path, tmp_path_factory: pytest.TempPathFactory):
    """One worker's training: its spec, its last batch, and what the trained model predicts for it."""
    spec = runs.spec(store, tmp_path_factory.mktemp("alone"), runs.learner("dmin"))
    captured = {}
    original = TrainingLoop._finish

    def keep(self: TrainingLoop, *arguments, **kwargs) -> None:
        original(self, *arguments, **kwargs)
        batch = next(self._training_reader(2, 0, {}).batches(runs.PERIODS[2]))
        captured["batch"], captured["logits"] = batch, self.learners[0].predict(batch).logits
        captured["tables"] = self.learners[0]._table_std

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLoop, "_finish", keep)
        runs.train_here(spec)
    return spec, captured


def served(spec, batch) -> dict[str, torch.Tensor]:
    snapshots = SnapshotStore(spec.run_dir)
    version = snapshots.latest(KEY)
    manifest = snapshots.verify(KEY, version)
    config = MODELS["dmin"].Config.model_validate(manifest.config)
    schema = Schema.model_validate(manifest.example_schema)
    return export_model(config, schema, manifest.tasks, snapshots.load(KEY, version)).logits(batch)


def test_a_published_dmin_predicts_as_the_trained_one(alone) -> None:
    spec, captured = alone
    for task, logit in served(spec, captured["batch"]).items():
        torch.testing.assert_close(logit, captured["logits"][task])


def test_it_learns_and_its_tables_start_and_move_like_any(alone) -> None:
    spec, captured = alone
    assert captured["tables"]["model.inputs.unpooled.embeddings.ad.weight"] == 0.01
    found = runs.losses(spec)
    term = f"{KEY}/supervised/watch"
    assert found[runs.PERIODS[2], term] < found[runs.PERIODS[0], term]
    snapshots = SnapshotStore(spec.run_dir)
    first, last = (
        snapshots.load(KEY, version)["inputs.unpooled.embeddings.ad.weight"]
        for version in (snapshots.versions(KEY)[0], snapshots.latest(KEY))
    )
    changed = (first != last).any(dim=1)
    assert changed.float().mean() > 0.3
    assert not changed.all(), "rows that no id leads to keep their first values"
    assert first[~changed].std() == pytest.approx(0.01, rel=0.2)


@pytest.mark.parametrize("sharding", ["row_wise", "table_wise"])
def test_two_workers_learn_what_one_does(store: Path, tmp_path: Path, alone, sharding: str) -> None:
    one, captured = alone
    two = runs.spec(store, tmp_path, runs.learner("dmin"), sharding=sharding)
    runs.train_on(two, 2)
    expected = runs.losses(one)
    for key, value in runs.losses(two).items():
        assert value == pytest.approx(expected[key], rel=1e-4), key
    for task, logit in served(two, captured["batch"]).items():
        torch.testing.assert_close(logit, captured["logits"][task], rtol=1e-3, atol=1e-3)


def test_a_checkpoint_of_two_workers_goes_on_with_one(store: Path, tmp_path: Path, alone) -> None:
    expected = runs.losses(alone[0])
    first = runs.spec(store, tmp_path, runs.learner("dmin"), sharding="row_wise")
    runs.train_on(first.model_copy(update={"periods": runs.PERIODS[:1]}), 2)
    runs.train_here(first)
    for key, value in runs.losses(first).items():
        assert value == pytest.approx(expected[key], rel=1e-4), key


def test_a_table_that_a_sequence_reads_cannot_be_replicated(store: Path, tmp_path: Path) -> None:
    adam = {"type": "adam", "lr": 0.01}
    spec = runs.spec(store, tmp_path / "refused", runs.learner("dmin"), table_overrides={"ad": adam})
    with pytest.raises(ConfigError, match="table 'ad' is read by a sequence item by item"):
        runs.train_here(spec)
    # Tables that stay pooled may be.
    runs.train_here(
        runs.spec(store, tmp_path / "pooled", runs.learner("dmin"), table_overrides={"user": adam}).model_copy(
            update={"periods": runs.PERIODS[:1]}
        )
    )
