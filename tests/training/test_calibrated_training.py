"""A training with ``calibrate``: what it publishes, on any number of workers and after a crash."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import training_runs as runs
from example_store import write_store

from rayfm.data.batch import IMPRESSION
from rayfm.export.calibrator import fit_platt
from rayfm.serving.teacher import load_version, score_table
from rayfm.snapshots.load import SnapshotStore
from rayfm.training.loop import TrainingLoop
from rayfm.training.lost_labels import LostLabels
from rayfm.training.scoring import PeriodScores
from rayfm.training.spec import TrainerSpec

KEY = "dcnv2.none.1"
NAMES = {"calibrator.click.scale", "calibrator.click.shift"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    write_store(root, list(runs.PERIODS), impressions=700, considerations=300)
    return root


@pytest.fixture(scope="module")
def calibrated(store: Path, tmp_path_factory: pytest.TempPathFactory):
    """A calibrated training, and the rows (logit, label, weight) of each period that it predicted."""
    spec = runs.spec(store, tmp_path_factory.mktemp("run"), runs.learner(calibrate=True), checkpoint_every=4)
    rows: list[tuple[torch.Tensor, ...]] = []
    original = PeriodScores.score

    def keep(self, state, learner, batch, logits, copies) -> None:
        original(self, state, learner, batch, logits, copies)
        label, known = batch.label("click")
        shown = known & (batch.kind == IMPRESSION)
        rows.append((logits["click"][shown], label[shown], batch.weight[shown], shown))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PeriodScores, "score", keep)
        runs.train_here(spec)
    return spec, rows


def tensors(spec: TrainerSpec, key: str = KEY) -> list[tuple[float, float]]:
    """(scale, shift) of the click in each version, oldest first."""
    store = SnapshotStore(spec.run_dir)
    found = []
    for version in store.versions(key):
        loaded = store.load(key, version)
        assert {name for name in loaded if name.startswith("calibrator")} == NAMES
        found.append((float(loaded["calibrator.click.scale"]), float(loaded["calibrator.click.shift"])))
    return found


def test_a_snapshot_holds_the_fit_of_its_periods_predictions(calibrated) -> None:
    spec, rows = calibrated
    first, *later = tensors(spec)
    assert first == (1, 0), "nothing was predicted yet"
    half = len(rows) // 2  # two periods of equally many batches
    for found, part in zip(later, (rows[:half], rows[half:]), strict=True):
        logit, label, weight = (torch.cat([row[i] for row in part]) for i in range(3))
        assert len(logit) == 700
        assert found == pytest.approx(fit_platt(logit, label, weight), rel=1e-4)
        assert abs(found[0] - 1) + abs(found[1]) > 0.05, "a fit that corrects nothing shows nothing"
    for position, period in enumerate(runs.PERIODS):
        record = json.loads((spec.folder / "periods" / f"{period}.json").read_text())
        fits = record["calibration"].get(KEY, {})
        assert fits.keys() == ({"click"} if position else set())
        assert not position or fits["click"] == pytest.approx(tensors(spec)[position], rel=1e-6)


def test_a_served_version_answers_calibrated_probabilities(calibrated, store: Path) -> None:
    import pyarrow.parquet as pq

    from rayfm.data.store import ExampleStore

    spec, _ = calibrated
    snapshots = SnapshotStore(spec.run_dir)
    loaded = load_version(snapshots, KEY, snapshots.latest(KEY))
    table = pq.read_table(ExampleStore(store).lane_path(runs.PERIODS[2], "impression", 0))
    said = torch.tensor(score_table(loaded, table)["click"].to_numpy())
    scale, shift = tensors(spec)[-1]
    loaded.model.calibrator = None
    own = torch.tensor(score_table(loaded, table)["click"].to_numpy())
    torch.testing.assert_close(said, torch.sigmoid(scale * torch.logit(own) + shift))


def test_training_and_metrics_stay_those_of_an_uncalibrated_one(calibrated, store: Path, tmp_path: Path) -> None:
    spec, _ = calibrated
    plain = runs.spec(store, tmp_path, runs.learner(), checkpoint_every=4)
    runs.train_here(plain)
    assert runs.losses(plain) == runs.losses(spec)
    for period in runs.PERIODS[1:]:
        ours, theirs = runs.metric_sums(plain, period, KEY), runs.metric_sums(spec, period, KEY)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    snapshots = SnapshotStore(plain.run_dir)
    for version in snapshots.versions(KEY):
        names = set(snapshots.manifest(KEY, version).tensors)
        assert names == set(SnapshotStore(spec.run_dir).manifest(KEY, version).tensors) - NAMES


class CrashError(Exception):
    pass


@pytest.mark.parametrize("where", ["train", "publish"])
def test_a_resumed_training_publishes_the_same_calibrator(calibrated, store: Path, tmp_path: Path, where: str) -> None:
    """Cut in the middle of the last period, after a checkpoint inside it; or right after its last checkpoint."""
    spec = calibrated[0].model_copy(update={"run_dir": str(tmp_path)})

    def report(self, period, step, steps, phase) -> None:
        if (period, step, phase) == (runs.PERIODS[2], 6, "train"):
            raise CrashError

    def publish(self, index, parts, original=TrainingLoop._publish):
        if index == 2:
            raise CrashError
        return original(self, index, parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLoop, *(("_report", report) if where == "train" else ("_publish", publish)))
        with pytest.raises(CrashError):
            runs.train_here(spec)
    assert len(SnapshotStore(spec.run_dir).versions(KEY)) == 2
    predicted = []

    def predict(self, period, parts) -> None:
        predicted.append(period)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLoop, "_predict", predict)
        runs.train_here(spec)
    assert not predicted, "the period is not predicted again, so the fit can only come from the checkpoint"
    assert tensors(spec) == tensors(calibrated[0])


def test_one_and_two_workers_publish_the_same_calibrator(calibrated, tmp_path: Path) -> None:
    """Sums of float32 in another order, as in the losses."""
    spec = calibrated[0].model_copy(update={"run_dir": str(tmp_path)})
    runs.train_on(spec, 2)
    for ours, theirs in zip(tensors(spec), tensors(calibrated[0]), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)


def test_a_period_of_one_class_keeps_the_calibrator(calibrated, tmp_path: Path) -> None:
    spec = calibrated[0].model_copy(update={"run_dir": str(tmp_path)})
    original = TrainingLoop._predict

    def predict(self, period, parts) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if period == runs.PERIODS[2]:
                patch.setattr("rayfm.training.scoring._add_shown", lambda *arguments: None)
            original(self, period, parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLoop, "_predict", predict)
        runs.train_here(spec)
    found = tensors(spec)
    assert found[1] == found[2] == tensors(calibrated[0])[1]


def test_variants_have_calibrators_of_their_own(store: Path, tmp_path: Path) -> None:
    learners = [
        runs.learner("fm", calibrate=True),
        runs.learner("fm", seed=2),
        runs.learner("fm", "direct", calibrate=True),
    ]
    spec = runs.spec(store, tmp_path, *learners)
    runs.train_here(spec)
    assert tensors(spec, "fm.none.1")[-1] != tensors(spec, "fm.direct.1")[-1]
    snapshots = SnapshotStore(spec.run_dir)
    assert not NAMES & set(snapshots.manifest("fm.none.2", snapshots.latest("fm.none.2")).tensors)


def test_a_shifted_teacher_labels_shifted_and_trains_the_same(store: Path, tmp_path: Path) -> None:
    plain, shifted = (
        runs.spec(store, tmp_path / str(shift), runs.learner("fm", logit_shift=shift)) for shift in (0.0, 0.7)
    )
    runs.train_here(plain)
    runs.train_here(shifted)
    key = "fm.none.1"
    assert tensors(shifted, key) == [(1.0, pytest.approx(0.7))] * 3
    before, after = (SnapshotStore(spec.run_dir) for spec in (plain, shifted))
    for one, other in zip(before.versions(key), after.versions(key), strict=True):
        weights, moved = before.load(key, one), after.load(key, other)
        assert moved.keys() - weights.keys() == NAMES
        for name, value in weights.items():
            torch.testing.assert_close(value, moved[name], rtol=0, atol=0)
    for name, sums in runs.metric_sums(plain, runs.PERIODS[1], key).items():
        torch.testing.assert_close(sums, runs.metric_sums(shifted, runs.PERIODS[1], key)[name], rtol=0, atol=0)


def test_a_calibrator_sees_what_its_models_training_sees(store: Path, tmp_path: Path) -> None:
    """A domain's own model is calibrated on that domain, and positives that a policy hides stay hidden."""
    every = runs.learner("fm", calibrate=True)
    own = runs.learner("fm", seed=2, calibrate=True, traffics=("feed",))
    hidden = LostLabels(traffics=("feed", "search"), kept=0.0)
    without = runs.learner("fm", seed=3, calibrate=True, lost_labels=hidden)
    spec = runs.spec(store, tmp_path, every, own, without)
    rows: list[tuple[torch.Tensor, ...]] = []
    original = PeriodScores.score

    def keep(self, state, learner, batch, logits, copies) -> None:
        original(self, state, learner, batch, logits, copies)
        if learner.config.seed == 2 and len(rows) < 3:
            label, known = batch.label("click")
            feed = known & (batch.kind == IMPRESSION) & (batch.traffic == spec.schema_.traffics.index("feed"))
            rows.append((logits["click"][feed], label[feed], batch.weight[feed]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PeriodScores, "score", keep)
        runs.train_here(spec)
    assert 0 < sum(len(logit) for logit, _, _ in rows) < 700
    assert tensors(spec, "fm.none.2")[1] == pytest.approx(fit_platt(*map(torch.cat, zip(*rows, strict=True))), rel=1e-4)
    assert tensors(spec, "fm.none.1")[1] != (1, 0)
    assert tensors(spec, "fm.none.3") == [(1, 0)] * 3, "without a positive there is nothing to fit"
