"""A student's export is checked before its version stands, and the result is in the manifest."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import training_runs as runs
from example_store import write_store
from small_pipeline import PERIODS, small_pipeline

from rayfm.config import SnapshotError
from rayfm.export.config import CompileConfig, Tolerance
from rayfm.export.student import export_student
from rayfm.models.base import MODELS
from rayfm.pipeline.plan import student_specs
from rayfm.schema import Schema
from rayfm.snapshots.load import SnapshotStore
from rayfm.snapshots.manifest import MANIFEST
from rayfm.training.learner import Learner
from rayfm.training.spec import TrainerSpec

KEY = "dcnv2.none.1"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checked")
    write_store(root, list(runs.PERIODS), impressions=300, considerations=60)
    return root


def short(store: Path, run_dir: Path, **changes: object) -> TrainerSpec:
    spec = runs.spec(store, run_dir, runs.learner("dcnv2", calibrate=True))
    return spec.model_copy(update={"periods": runs.PERIODS[:2], "consideration_share": 0.0, **changes})


def test_the_manifest_says_how_far_the_export_is(store: Path, tmp_path: Path) -> None:
    spec = short(store, tmp_path)
    runs.train_here(spec)
    snapshots = SnapshotStore(tmp_path)
    version = snapshots.latest(KEY)
    manifest = snapshots.verify(KEY, version)
    check = manifest.check
    assert check is not None
    assert (check.period, check.rows, check.tolerance) == (runs.PERIODS[1], 300, Tolerance())
    assert check.forms["eager"].passed
    assert set(check.forms) == {"eager", "torchscript", "int8"}
    assert check.forms["eager"].difference.keys() == {"click", "watch"}
    assert check.file in manifest.files

    rows = snapshots.check_rows(KEY, version)
    assert rows is not None
    assert len(rows.batch) == 300
    config = MODELS["dcnv2"].Config.model_validate(manifest.config)
    schema = Schema.model_validate(manifest.example_schema)
    options = CompileConfig(compile="torchscript")
    student = export_student(config, schema, manifest.tasks, snapshots.load(KEY, version), options, rows)
    tensors = snapshots.load(KEY, version)
    scale, shift = tensors["calibrator.click.scale"], tensors["calibrator.click.shift"]
    assert float(scale) != 1  # a fit of the second period's predictions
    expected = torch.sigmoid(scale * rows.logits["click"] + shift)
    torch.testing.assert_close(student(rows.batch)["click"], expected, rtol=0, atol=1e-6)


def test_a_version_that_differs_from_what_was_trained_is_refused(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Learner.slices

    def mixed_up(self: Learner):  # type: ignore[no-untyped-def]
        for item in original(self):
            if item.name == "heads.linear.bias":
                item = dataclasses.replace(item, tensor=item.tensor + 0.1)
            yield item

    monkeypatch.setattr(Learner, "slices", mixed_up)
    message = f"differs from the trained one on 300 rows of {runs.PERIODS[0]}: click by 0.02.*watch by 0.1.*0.0001"
    with pytest.raises(SnapshotError, match=message):
        runs.train_here(short(store, tmp_path))
    assert SnapshotStore(tmp_path).versions(KEY) == []
    assert not list(tmp_path.rglob(MANIFEST))
    # Without a check it is published, as told.
    runs.train_here(short(store, tmp_path / "unchecked", export_tolerance=None))
    snapshots = SnapshotStore(tmp_path / "unchecked")
    assert snapshots.manifest(KEY, snapshots.latest(KEY)).check is None
    assert snapshots.check_rows(KEY, snapshots.latest(KEY)) is None


def test_a_teacher_is_not_exported(store: Path, tmp_path: Path) -> None:
    runs.train_here(short(store, tmp_path, role="teacher", periods=runs.PERIODS[:1]))
    snapshots = SnapshotStore(tmp_path)
    assert snapshots.manifest(KEY, snapshots.latest(KEY)).check is None


def test_two_workers_check_the_whole_of_their_slices(store: Path, tmp_path: Path) -> None:
    spec = short(store, tmp_path, periods=runs.PERIODS[:1])
    training = spec.training.model_copy(update={"sharding": "row_wise", "precision": "bf16"})
    runs.train_on(spec.model_copy(update={"training": training}), 2)
    snapshots = SnapshotStore(tmp_path)
    check = snapshots.verify(KEY, snapshots.latest(KEY)).check
    assert check is not None
    # The weights in fp32, not the training's own arithmetic, which is bf16 here.
    assert max(value or 0.0 for value in check.forms["eager"].difference.values()) < 1e-5


def test_what_is_let_pass_at_publishing_is_what_is_served_by(tmp_path: Path) -> None:
    config = small_pipeline(tmp_path, endpoints={"compile": {"tolerance": {"exact": 1e-3}}})
    [spec] = student_specs(config, PERIODS)
    assert spec.export_tolerance == Tolerance(exact=1e-3)
