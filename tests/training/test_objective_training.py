"""Objectives in the training loop: mixed, over ranks, over a resume, and gone from what is published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import training_runs as runs
from example_store import write_store

from rayfm.config import DataError
from rayfm.distill import OBJECTIVES
from rayfm.export.served import export_model
from rayfm.models.base import MODELS
from rayfm.schema import Schema
from rayfm.snapshots.load import SnapshotStore
from rayfm.training.learner import LearnerConfig

CLICK = {"tasks": ["click"]}
LOGGED = {"teacher": "logged/ranking", **CLICK}
TEACHER = {"teacher": "teacher", **CLICK}
CURRICULUM = {"selector": "curriculum", "curriculum": {"steps": 25, "positive_weight": 4.0}}

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "mixed": [
        {"type": "cross_stage", "next_stage": "logged/ranking", "fallback": "teacher", **CLICK},
        {"type": "dependent_task", **TEACHER},
        {"type": "auxiliary_task", **TEACHER},
        {"type": "self_auxiliary", **CURRICULUM, **CLICK},
        {"type": "auxiliary_head", **TEACHER},
        {"type": "auxiliary_head", **LOGGED, "name": "from_the_log"},
        {"type": "student_adapter", **TEACHER},
    ],
    "signal_loss": [
        {"type": "selected_label", **LOGGED, **CURRICULUM, "traffics": ["feed"]},
        {"type": "self_auxiliary", **CLICK, "gradient_scale": 0.0},
    ],
    "teacher_tower": [
        {"type": "supervised", "traffics": ["search"]},
        {"type": "self_auxiliary", "selector": "original", "traffics": ["feed"], **CLICK},
    ],
}


def variant(name: str) -> LearnerConfig:
    objectives = tuple(OBJECTIVES[item["type"]].Config.model_validate(item) for item in VARIANTS[name])
    return runs.learner("dcnv2").model_copy(update={"variant": name, "objectives": objectives})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    write_store(root, list(runs.PERIODS), impressions=700, considerations=300)
    return root


@pytest.fixture(scope="module")
def whole(store: Path, tmp_path_factory: pytest.TempPathFactory):
    """An unbroken training of every variant beside an undistilled one."""
    learners = [runs.learner("dcnv2"), *(variant(name) for name in VARIANTS)]
    spec = runs.spec(store, tmp_path_factory.mktemp("run"), *learners)
    return spec, runs.train_here(spec)


def test_every_term_has_a_name_and_the_replaced_ones_are_gone(whole) -> None:
    spec, _ = whole
    terms = {term for period, term in runs.losses(spec) if period == runs.PERIODS[1]}
    assert {term.removeprefix("dcnv2.mixed.1/") for term in terms if ".mixed." in term} == {
        "supervised/click",
        "supervised/watch",
        "cross_stage/click",
        "cross_stage/click/coverage logged/ranking",
        "cross_stage/click/coverage teacher",
        "dependent_task/click",
        "auxiliary_task/click",
        "self_auxiliary/click",
        "auxiliary_head/click",
        "from_the_log/click",
        "student_adapter/adapted/click",
    }
    assert {term.removeprefix("dcnv2.signal_loss.1/") for term in terms if ".signal_loss." in term} == {
        "supervised/watch",
        "selected_label/click",
        "self_auxiliary/click",
    }
    assert {term.removeprefix("dcnv2.teacher_tower.1/") for term in terms if ".teacher_tower." in term} == {
        "supervised/click",
        "supervised/watch",
        "self_auxiliary/click",
    }


def test_metrics_show_terms_without_their_coefficients(store: Path, tmp_path: Path, whole) -> None:
    objectives = tuple(
        OBJECTIVES["self_auxiliary"].Config(tasks=("click",), gradient_scale=0.0, weight=weight, name=f"at_{weight}")
        for weight in (1.0, 1e-6)
    )
    learner = runs.learner("fm").model_copy(update={"variant": "weights", "objectives": objectives})
    spec = runs.spec(store, tmp_path, learner).model_copy(update={"periods": runs.PERIODS[:1], "teachers": ()})
    runs.train_here(spec)
    found = runs.losses(spec)
    for name in ("at_1.0", "at_1e-06"):
        assert 0.1 < found[runs.PERIODS[0], f"fm.weights.1/{name}/click"] < 1.5


def test_objectives_are_not_published(whole) -> None:
    spec, coordinator = whole
    store = SnapshotStore(spec.run_dir)
    shapes = []
    for learner in spec.learners:
        version = coordinator.done[-1][1][learner.key]
        manifest = store.manifest(learner.key, version)
        shapes.append({name: record.shape for name, record in manifest.tensors.items()})
        schema = Schema.model_validate(manifest.example_schema)
        config = MODELS["dcnv2"].Config.model_validate(manifest.config)
        export_model(config, schema, manifest.tasks, store.load(learner.key, version))
    assert all(shape == shapes[0] for shape in shapes)


def test_two_workers_and_a_resume_change_nothing(store: Path, tmp_path: Path, whole) -> None:
    """The curricula run through 25 of 33 steps; a count that was lost or of one rank alone would show in the losses.

    The first period on two workers, the others on one that takes over their checkpoint; tolerance: float32 sums in
    another order."""
    unbroken, _ = whole
    learners = [variant(name) for name in ("mixed", "signal_loss")]
    moved = runs.spec(store, tmp_path, *learners, sharding="row_wise")
    runs.train_on(moved.model_copy(update={"periods": runs.PERIODS[:1]}), 2)
    runs.train_here(moved)
    expected, found = runs.losses(unbroken), runs.losses(moved)
    assert found
    for key, value in found.items():
        assert value == pytest.approx(expected[key], rel=2e-4), key


def test_where_predictions_are_from_is_a_share_of_the_rows(whole) -> None:
    spec, _ = whole
    found, prefix = runs.losses(spec), "dcnv2.mixed.1/cross_stage/click/coverage "
    logged, filled = (
        [found[period, prefix + source] for period in runs.PERIODS] for source in ("logged/ranking", "teacher")
    )
    assert all(0.7 < share < 0.9 for share in logged), "a fifth of the rows has no logged prediction"
    assert filled[0] == 0, "no teacher labels the first period"
    assert all(0 < share <= 1 - other + 1e-6 for share, other in zip(filled[1:], logged[1:], strict=True))


def test_predictions_that_nobody_logged_are_refused(store: Path, tmp_path: Path) -> None:
    config = OBJECTIVES["cross_stage"].Config
    lost = config.model_validate({"type": "cross_stage", "next_stage": "logged/rankin", **CLICK})
    learner = runs.learner("fm").model_copy(update={"variant": "lost", "objectives": (lost,)})
    message = (
        "column 'logged/rankin/click' is missing, and objective 'cross_stage' of fm.lost.1 learns from nothing else; "
        "prepare examples that have it, or name a teacher, for cross_stage as 'fallback'; did you mean "
        "'logged/ranking/click'"
    )
    with pytest.raises(DataError, match=message):
        runs.train_here(runs.spec(store, tmp_path, learner))
    filled = lost.model_copy(update={"fallback": "teacher"})
    learner = learner.model_copy(update={"objectives": (filled,)})
    spec = runs.spec(store, tmp_path / "filled", learner)
    runs.train_here(spec)
    assert runs.losses(spec)[runs.PERIODS[1], "fm.lost.1/cross_stage/click/coverage teacher"] > 0.5
