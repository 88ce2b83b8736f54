"""The training loop: what it leaves, whatever the number of workers, and after a crash."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import processes
import pytest
import torch
import training_runs as runs
from example_store import write_store

from rayfm.config import DataError, RayfmError
from rayfm.distill.base import OBJECTIVES
from rayfm.export.served import export_model
from rayfm.models.base import MODELS
from rayfm.schema import Schema
from rayfm.snapshots.load import SnapshotStore
from rayfm.training.learner import DivergenceError
from rayfm.training.loop import TrainingLoop

VARIANTS = ("none", "direct", "adapter")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    write_store(root, list(runs.PERIODS), impressions=700, considerations=300)
    return root


@pytest.fixture(scope="module")
def whole(store: Path, tmp_path_factory: pytest.TempPathFactory):
    """An unbroken training of one model in three variants."""
    learners = [runs.learner("dcnv2", variant, reference={"click": "logged/ranking/click"}) for variant in VARIANTS]
    spec = runs.spec(store, tmp_path_factory.mktemp("run"), *learners, checkpoint_every=4)
    return spec, runs.train_here(spec)


def test_every_period_is_predicted_trained_and_published(whole) -> None:
    spec, coordinator = whole
    assert [period for period, _ in coordinator.done] == list(runs.PERIODS)
    store = SnapshotStore(spec.run_dir)
    for learner in spec.learners:
        assert len(store.versions(learner.key)) == 3
        manifest = store.verify(learner.key, coordinator.done[-1][1][learner.key])
        assert manifest.trained_through == runs.PERIODS[-1]
    assert not (spec.folder / "metrics" / runs.PERIODS[0]).exists()
    sums = runs.metric_sums(spec, runs.PERIODS[1], "dcnv2.none.1")
    assert float(sums["impression/click/sums"][:, 0].sum()) == 700
    logged = float(sums["consideration/click/sums"][:, 0].sum())
    assert 0.7 * 300 < logged < 300, "considerations are scored where a production model logged a prediction"
    record = json.loads((spec.folder / "periods" / f"{runs.PERIODS[1]}.json").read_text())
    assert 700 < record["examples"] < 1000
    rates = json.loads((spec.folder / "metrics" / runs.PERIODS[1] / "rates.json").read_text())
    assert 0 < rates["click"] < 1


def test_training_learns(whole) -> None:
    spec, _ = whole
    term = "dcnv2.none.1/supervised/watch"
    found = runs.losses(spec)
    assert found[runs.PERIODS[2], term] < found[runs.PERIODS[0], term]


def test_labels_reach_the_objectives_only_where_they_stand(whole) -> None:
    spec, _ = whole
    terms = runs.losses(spec)
    assert (runs.PERIODS[0], "dcnv2.direct.1/direct/click") not in terms, "the first period has no labels"
    assert terms[runs.PERIODS[1], "dcnv2.direct.1/direct/click"] > 0
    assert terms[runs.PERIODS[1], "dcnv2.adapter.1/student_adapter/adapted/click"] > 0
    assert not any("none" in term and "direct" in term for _, term in terms)


def test_a_published_student_has_no_trace_of_its_objectives(whole) -> None:
    spec, coordinator = whole
    store = SnapshotStore(spec.run_dir)
    shapes = {}
    for learner in spec.learners:
        manifest = store.manifest(learner.key, coordinator.done[-1][1][learner.key])
        shapes[learner.variant] = {name: record.shape for name, record in manifest.tensors.items()}
    assert shapes["none"] == shapes["direct"] == shapes["adapter"]


def test_a_published_model_predicts_as_the_trained_one(store: Path, tmp_path: Path) -> None:
    spec = runs.spec(store, tmp_path, runs.learner("fm"))
    captured = {}
    original = TrainingLoop._finish

    def keep(self: TrainingLoop, *arguments, **kwargs) -> None:
        original(self, *arguments, **kwargs)
        batch = next(self._training_reader(2, 0, {}).batches(runs.PERIODS[2]))
        captured["batch"], captured["logits"] = batch, self.learners[0].predict(batch).logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLoop, "_finish", keep)
        runs.train_here(spec)
    snapshots = SnapshotStore(tmp_path)
    version = snapshots.latest("fm.none.1")
    manifest = snapshots.manifest("fm.none.1", version)
    schema = Schema.model_validate(manifest.example_schema)
    config = MODELS["fm"].Config.model_validate(manifest.config)
    served = export_model(config, schema, manifest.tasks, snapshots.load("fm.none.1", version))
    for task, logit in served.logits(captured["batch"]).items():
        torch.testing.assert_close(logit, captured["logits"][task])


@pytest.mark.parametrize("sharding", ["table_wise", "row_wise"])
def test_one_and_two_workers_have_the_same_losses(store: Path, tmp_path: Path, sharding: str) -> None:
    """Sums of float32 in another order: losses of a period agree to 1e-4 relative after 3 periods of steps."""
    learners = [runs.learner("deepfm", "adapter"), runs.learner("two_tower")]
    found = {}
    for world in (1, 2):
        spec = runs.spec(store, tmp_path / f"{sharding}-{world}", *learners, sharding=sharding)
        runs.train_on(spec, world)
        found[world] = runs.losses(spec)
        snapshots = SnapshotStore(spec.run_dir)
        for learner in learners:
            snapshots.verify(learner.key, snapshots.latest(learner.key))
    assert found[1].keys() == found[2].keys()
    for key, value in found[1].items():
        assert found[2][key] == pytest.approx(value, rel=1e-4), key


def test_a_checkpoint_of_two_workers_goes_on_with_one(store: Path, tmp_path: Path, whole) -> None:
    one = runs.spec(store, tmp_path / "one", runs.learner("dcnv2"), sharding="row_wise")
    runs.train_here(one)
    moved = one.model_copy(update={"run_dir": str(tmp_path / "moved"), "periods": runs.PERIODS[:1]})
    runs.train_on(moved, 2)
    moved = moved.model_copy(update={"periods": runs.PERIODS})
    runs.train_here(moved)
    expected = runs.losses(one)
    for key, value in runs.losses(moved).items():
        assert value == pytest.approx(expected[key], rel=1e-4), key


def _train_and_die(spec, after: int) -> None:
    """Trains in this process and kills it, as the kernel would, at a step."""
    steps = 0
    original = TrainingLoop._report

    def count(self, *arguments) -> None:
        nonlocal steps
        steps += 1
        if steps == after:
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, *arguments)

    TrainingLoop._report = count
    torch.set_num_threads(1)
    runs.train_here(spec)


@pytest.mark.parametrize("after", [7, 18, 31])
def test_a_killed_training_goes_on_to_the_same_end(store: Path, tmp_path: Path, whole, after: int) -> None:
    unbroken, _ = whole
    spec = unbroken.model_copy(update={"run_dir": str(tmp_path)})
    process = processes.context().Process(target=_train_and_die, args=(spec, after))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    coordinator = runs.train_here(spec)
    assert coordinator.done[-1][0] == runs.PERIODS[-1]
    assert runs.losses(spec) == pytest.approx(runs.losses(unbroken), rel=1e-6)
    for period in runs.PERIODS[1:]:
        for learner in spec.learners:
            ours, theirs = (runs.metric_sums(s, period, learner.key) for s in (spec, unbroken))
            for name, value in theirs.items():
                torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-9)
        counts = [
            json.loads((s.folder / "periods" / f"{period}.json").read_text())["examples"] for s in (spec, unbroken)
        ]
        assert counts[0] == counts[1], "each example is trained once"


def test_a_crash_between_checkpoint_and_publishing_loses_nothing(store: Path, tmp_path: Path) -> None:
    spec = runs.spec(store, tmp_path, runs.learner("fm"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLoop, "_publish", lambda self, index, parts: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            runs.train_here(spec)
    coordinator = runs.train_here(spec)
    assert [period for period, _ in coordinator.done] == list(runs.PERIODS)
    assert len(SnapshotStore(tmp_path).versions("fm.none.1")) == 3


def test_a_half_written_checkpoint_is_ignored(store: Path, tmp_path: Path) -> None:
    spec = runs.spec(store, tmp_path, runs.learner("fm"))
    orphan = spec.folder / "checkpoints" / "00002-00000003"
    orphan.mkdir(parents=True)
    (orphan / "__0_0.distcp").write_bytes(b"half")
    coordinator = runs.train_here(spec)
    assert len(coordinator.done) == 3
    assert not orphan.exists(), "orphans are collected"


def test_a_checkpoint_of_other_models_is_refused(store: Path, tmp_path: Path) -> None:
    runs.train_here(runs.spec(store, tmp_path, runs.learner("fm")))
    with pytest.raises(RayfmError, match="does not fit this run"):
        runs.train_here(runs.spec(store, tmp_path, runs.learner("dcnv2")))


def test_a_loss_that_is_not_finite_stops_the_training(store: Path, tmp_path: Path) -> None:
    spec = runs.spec(store, tmp_path, runs.learner("dcnv2"), tables={"type": "sgd", "lr": 1e30})
    with pytest.raises(DivergenceError, match=r"dcnv2\.none\.1: term supervised/.* not finite at step"):
        runs.train_here(spec)


def test_bf16_trains_to_about_the_same_losses(store: Path, tmp_path: Path, whole) -> None:
    spec = runs.spec(store, tmp_path, runs.learner("dcnv2"), precision="bf16")
    runs.train_here(spec)
    expected = runs.losses(whole[0])
    for key, value in runs.losses(spec).items():
        assert value == pytest.approx(expected[key], rel=0.02), key


def test_adam_on_replicated_tables_trains(store: Path, tmp_path: Path) -> None:
    spec = runs.spec(store, tmp_path, runs.learner("fm"), tables={"type": "adam", "lr": 0.01}, sharding="data_parallel")
    runs.train_here(spec)
    found = runs.losses(spec)
    term = "fm.none.1/supervised/watch"
    assert found[runs.PERIODS[2], term] < found[runs.PERIODS[0], term]


def test_a_period_with_another_schema_is_refused(store: Path, tmp_path: Path) -> None:
    spec = runs.spec(store, tmp_path, runs.learner("fm"))
    plain = spec.schema_.dump()
    plain["features"].append({"name": "price", "kind": "dense"})
    with pytest.raises(DataError, match="column 'price' is missing"):
        runs.train_here(spec.model_copy(update={"schema_": Schema.model_validate(plain)}))


def test_every_objective_is_known_to_the_registry() -> None:
    assert set(OBJECTIVES) >= {"supervised", "direct", "auxiliary_head", "student_adapter"}


def test_progress_is_reported(store: Path, tmp_path: Path) -> None:
    from rayfm.training import loop
    from rayfm.training.progress import progress_file

    spec = runs.spec(store, tmp_path, runs.learner("fm"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "PROGRESS_EVERY_S", 0.0)
        started = time.perf_counter()
        runs.train_here(spec)
    report = progress_file(spec).read()
    assert report["period"] == runs.PERIODS[-1]
    assert report["step"] + 1 == report["steps"]
    assert time.perf_counter() > started
