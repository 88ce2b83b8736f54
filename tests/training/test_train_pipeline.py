"""TorchRec's training pipeline against the same steps one by one: not a bit may differ."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
import training_runs as runs
from example_store import every_feature_schema, write_store

from rayfm.data.batch import Batch
from rayfm.models.base import MODELS
from rayfm.models.synthetic import synthetic_batch
from rayfm.snapshots.load import SnapshotStore
from rayfm.training.divergence import DivergenceError
from rayfm.training.feed import Feed
from rayfm.training.learner import LearnerConfig
from rayfm.training.ledger import read_ledger
from rayfm.training.loop import TrainingLoop
from rayfm.training.period import PeriodParts
from rayfm.training.sharding import local_shards
from rayfm.training.spec import TrainerSpec
from rayfm.training.trainer import single_process_group


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    write_store(root, list(runs.PERIODS), impressions=700, considerations=300)
    return root


def model_of(name: str) -> LearnerConfig:
    """A small model of any kind."""
    sizes: dict[str, Any] = {"two_tower": {"item_features": ["ad"], "vector_dim": 8}}.get(name, {})
    config = MODELS[name].Config.model_validate({"type": name, "embedding_dim": 8, **sizes})
    return runs.learner("fm").model_copy(update={"model_name": name, "model": config})


def group(store: Path, folder: Path, **training: object) -> TrainerSpec:
    """Learners of every kind on one feed: pooled, item by item, with an adapter's step ahead, with dropout."""
    dropping = runs.learner(seed=2)
    dropping = dropping.model_copy(update={"model": dropping.model.model_copy(update={"dropout": 0.3})})
    own = model_of("dlrm").model_copy(update={"traffics": ("feed",)})
    learners = (runs.learner("dcnv2", "adapter"), dropping, runs.learner("dmin"), own)
    return runs.spec(store, folder, *learners, **{"ledger": True, "row_wise_from": 300, **training})


class CrashError(Exception):
    pass


def outcome(spec: TrainerSpec) -> dict[str, Any]:
    """Losses, weights, metrics' sums and trained ids of a finished training."""
    snapshots = SnapshotStore(spec.run_dir)
    found: dict[str, Any] = {f"loss {where}": torch.tensor(value) for where, value in runs.losses(spec).items()}
    for key in (learner.key for learner in spec.learners):
        for version in snapshots.versions(key):
            found |= {f"{key} {version} {name}": value for name, value in snapshots.load(key, version).items()}
        for period in runs.PERIODS[1:]:
            found |= {f"{key} {period} {name}": v for name, v in runs.metric_sums(spec, period, key).items()}
    for period in runs.PERIODS:
        entries = read_ledger(spec.folder / "ledger", period)
        for name, value in vars(entries).items():
            found[f"ledger {period} {name}"] = torch.from_numpy(value)
    return found


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    assert len(theirs) > 100
    different = [name for name, value in theirs.items() if not torch.equal(ours[name], value)]
    assert not different


def crash_in(period: str, at: int) -> Callable[..., None]:
    """A `_report` that ends a training before a step."""

    def report(self: TrainingLoop, now: str, step: int, steps: int, phase: str) -> None:
        if (now, step, phase) == (period, at, "train"):
            raise CrashError

    return report


def _crash(rank: int, world: int, folder: str, spec: TrainerSpec) -> None:
    """One rank of a training that dies in the middle of the last period, after a checkpoint inside it."""
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = str(world)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    loop = TrainingLoop(spec, runs.Free(spec.teachers), runs.IdLabels())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLoop, "_report", crash_in(runs.PERIODS[2], 6))
        with pytest.raises(CrashError):
            loop.run()
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2])
def test_the_pipeline_changes_no_bit(store: Path, tmp_path: Path, world: int) -> None:
    """Also where it was cut in the middle of a period, with two batches read ahead that nobody trained."""
    plain = group(store, tmp_path / "plain", pipeline="none")
    runs.train_on(plain, world)
    piped = group(store, tmp_path / "piped", pipeline="sparse_dist", checkpoint_every=4)
    processes.start(_crash, (world, str(tmp_path), piped), world)
    runs.train_on(piped, world)
    assert_same(outcome(piped), outcome(plain))


@pytest.mark.parametrize("name", list(MODELS))
def test_every_model_goes_through_the_pipeline(store: Path, tmp_path: Path, name: str) -> None:
    losses = {}
    for kind in ("none", "sparse_dist"):
        spec = runs.spec(store, tmp_path / kind, model_of(name), pipeline=kind)
        with single_process_group():
            loop = TrainingLoop(spec, runs.Free())
            assert loop.stepping.ahead == (2 if kind == "sparse_dist" else 0)
            partial: dict[str, Any] = {}
            loop._train(0, 8, partial, None, PeriodParts())
            assert loop.steps_done == {f"{name}.none.1": 3}
            batch = next(iter(loop._training_reader(0, 0, {}).batches(runs.PERIODS[0])))
            partial["said"] = {task: z.tolist() for task, z in loop.learners[0].predict(batch).logits.items()}
        losses[kind] = partial
    assert losses["none"]["losses"]
    assert losses["sparse_dist"] == losses["none"]


def test_a_loss_that_is_not_finite_stops_the_pipeline_before_the_step(store: Path, tmp_path: Path) -> None:
    spec = runs.spec(store, tmp_path, runs.learner(), pipeline="sparse_dist", checkpoint_every=2)
    before: dict[str, torch.Tensor] = {}

    def tables(loop: TrainingLoop) -> dict[str, torch.Tensor]:
        state = {name: value for name, value in loop.learners[0].dmp.state_dict().items() if "_bags." in name}
        return {name: torch.cat([shard.clone() for shard, _, _ in local_shards(v)]) for name, v in state.items()}

    def spoil(self: TrainingLoop, period: str, step: int, *_: object) -> None:
        if step == 5 and period == runs.PERIODS[0]:
            with torch.no_grad():
                next(p for name, p in self.learners[0].module.named_parameters() if "head" in name).fill_(float("nan"))
            before.update(tables(self))

    with pytest.MonkeyPatch.context() as patch, single_process_group():
        patch.setattr(TrainingLoop, "_report", spoil)
        loop = TrainingLoop(spec, runs.Free())
        with pytest.raises(DivergenceError, match=rf"step 5 of {runs.PERIODS[0]}; the newest checkpoint is .*000004"):
            loop.run()
        after = tables(loop)
    assert len(before) == 4
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert loop.steps_done == {"dcnv2.none.1": 5}


def test_a_learner_without_tables_goes_step_by_step_and_says_so(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dense = runs.learner()
    names = tuple(feature.name for feature in every_feature_schema().features if feature.kind == "dense")
    dense = dense.model_copy(update={"variant": "dense", "model": dense.model.model_copy(update={"features": names})})
    spec = runs.spec(store, tmp_path, dense, runs.learner(), pipeline="sparse_dist")
    with single_process_group():
        loop = TrainingLoop(spec, runs.Free())
        loop._train(0, 8, {}, None, PeriodParts())
    assert loop.stepping.one_by_one == {"dcnv2.dense.1": "it has no embedding table"}
    assert "dcnv2.dense.1 trains step by step" in caplog.text
    assert loop.steps_done == {"dcnv2.dense.1": 3, "dcnv2.none.1": 3}


def test_a_feed_reads_no_further_than_it_is_told() -> None:
    read: list[int] = []

    def batches() -> Iterator[Batch]:
        schema = every_feature_schema()
        for number in range(6):
            read.append(number)
            yield synthetic_batch(schema, rows=number + 1)

    feed = Feed(batches(), torch.device("cpu"), ahead=2)
    first, second = feed.on_device(), feed.on_device()
    for step, (cpu, moved) in enumerate(feed):
        assert len(cpu) == len(moved) == step + 1
        assert read == list(range(min(step + 3, 6)))
        if step == 0:
            assert [len(next(first)) for _ in range(3)] == [1, 2, 3]
            assert next(second) is moved, "one copy for all who read it"
        elif step < 4:
            assert len(next(first)) == step + 3
            assert next(second) is moved
    assert next(first, None) is None
    assert read == list(range(6))
