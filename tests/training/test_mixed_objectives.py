"""A student with many objectives at once, as the training loop trains it."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import training_runs as runs
from example_store import write_store

from rayfm.config import DataError
from rayfm.data.store import ExampleStore
from rayfm.distill.base import OBJECTIVES
from rayfm.models.base import MODELS
from rayfm.snapshots.load import SnapshotStore
from rayfm.training.learner import LearnerConfig
from rayfm.training.spec import PinnedLabels
from rayfm.training.trainer import fit_here

WIDTH = 5


class _Rows:
    """Predictions of click and watch, and representations, that follow from the example id."""

    name, width = "teacher", WIDTH

    def __init__(self, tasks: tuple[str, ...]) -> None:
        self.tasks = tasks
        self.columns = tuple(f"teacher/{task}" for task in tasks)

    def rows(self, period, kind, lane, start, stop, ids):
        values = {"click": (ids % 97 + 1) / 99, "watch": (ids % 13) / 4}
        picked = np.stack([values[task] for task in self.tasks], 1).astype(np.float32)
        return picked, np.repeat((ids % 7 != 0)[:, None], len(self.tasks), 1)

    def vectors(self, period, kind, lane, start, stop, ids):
        axes = np.arange(1, WIDTH + 1)
        return (axes / 5 + 0.3 * np.sin(ids[:, None] * axes)).astype(np.float32), ids % 7 != 0


class TeacherLabels:
    """A label source of both tasks and of representations."""

    def lookup(self, teacher: str, labels: PinnedLabels, tasks: tuple[str, ...]) -> Any:
        return _Rows(tasks)

    def representation(self, teacher: str, labels: PinnedLabels, width: int) -> Any:
        assert (teacher, width) == ("teacher", WIDTH)
        return _Rows(())

    def release(self) -> None:
        pass


CLICK = {"teacher": "teacher", "tasks": ("click",)}
MIXTURE: list[dict[str, Any]] = [
    {"type": "direct", "teacher": "teacher", "tasks": ("watch",), "weight": 0.5},
    {"type": "auxiliary_head", "teacher": "teacher"},
    {"type": "student_adapter", **CLICK},
    {"type": "kl", **CLICK, "temperature": 2.0, "weight": 0.1},
    {"type": "pairwise", **CLICK, "weight": 0.1},
    {"type": "pairwise", "teacher": "teacher", "tasks": ("watch",), "loss": "hinge", "weight": 0.1, "name": "margin"},
    {"type": "listwise", **CLICK, "weight": 0.1},
    {"type": "representation", "teacher": "teacher", "width": WIDTH, "weight": 0.1},
    {"type": "representation", "teacher": "teacher", "width": WIDTH, "distance": "cosine", "name": "direction"},
]
TERMS = {
    "supervised/click",
    "supervised/watch",
    "direct/watch",
    "auxiliary_head/click",
    "auxiliary_head/watch",
    "student_adapter/adapted/click",
    "kl/click",
    "pairwise/click",
    "margin/watch",
    "listwise/click",
    "representation/l2",
    "direction/cosine",
}


def student(variant: str, objectives: list[dict[str, Any]], model: str = "dcnv2") -> LearnerConfig:
    sizes: dict[str, Any] = {"dcnv2": {"hidden": [16]}, "fm": {}}[model]
    return LearnerConfig(
        model_name=model,
        variant=variant,
        seed=1,
        model=MODELS[model].Config.model_validate({"type": model, "embedding_dim": 8, **sizes}),
        tasks=("click", "watch"),
        objectives=tuple(OBJECTIVES[item["type"]].Config.model_validate(item) for item in objectives),
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    write_store(root, list(runs.PERIODS), impressions=500, considerations=200)
    return root


def train(spec) -> None:
    fit_here(spec, runs.Free(spec.teachers), TeacherLabels())


@pytest.fixture(scope="module")
def mixed(store: Path, tmp_path_factory: pytest.TempPathFactory):
    """The mixture; the same with every weight at zero; no objective."""
    unweighted = [{**item, "weight": 0.0} for item in MIXTURE]
    learners = (student("mixture", MIXTURE), student("shown", unweighted), student("none", []))
    spec = runs.spec(store, tmp_path_factory.mktemp("run"), *learners)
    train(spec)
    return spec


def test_every_term_is_in_the_record(mixed) -> None:
    for period in runs.PERIODS[1:]:
        record = json.loads((mixed.folder / "periods" / f"{period}.json").read_text())
        for variant in ("mixture", "shown"):
            key = f"dcnv2.{variant}.1/"
            terms = {name.removeprefix(key): v for name, v in record["losses"].items() if name.startswith(key)}
            assert set(terms) == TERMS
            assert all(np.isfinite(value) and value > 0 for value in terms.values()), terms


def test_terms_are_shown_without_their_weights(mixed) -> None:
    """A weight of zero changes what is learned and not what is shown: every term is far from zero."""
    found = runs.losses(mixed)
    for term in TERMS:
        shown = found[runs.PERIODS[1], f"dcnv2.shown.1/{term}"]
        weighted = found[runs.PERIODS[1], f"dcnv2.mixture.1/{term}"]
        assert 0.3 < weighted / shown < 2, term


def test_the_mixture_is_learned(mixed) -> None:
    found = runs.losses(mixed)
    for term in ("auxiliary_head/watch", "direct/watch", "representation/l2", "direction/cosine"):
        name = f"dcnv2.mixture.1/{term}"
        assert found[runs.PERIODS[2], name] < found[runs.PERIODS[1], name], term
        assert found[runs.PERIODS[2], name] < found[runs.PERIODS[2], f"dcnv2.shown.1/{term}"], term


def test_objectives_of_weight_zero_change_nothing(mixed) -> None:
    found = runs.losses(mixed)
    for period in runs.PERIODS:
        for task in ("click", "watch"):
            shown = found[period, f"dcnv2.shown.1/supervised/{task}"]
            assert shown == pytest.approx(found[period, f"dcnv2.none.1/supervised/{task}"], rel=1e-4)


def test_the_first_period_has_no_distilled_terms(mixed) -> None:
    record = json.loads((mixed.folder / "periods" / f"{runs.PERIODS[0]}.json").read_text())
    assert {name.partition("/")[2] for name in record["losses"]} == {"supervised/click", "supervised/watch"}


def test_what_is_published_has_none_of_it(mixed) -> None:
    snapshots = SnapshotStore(mixed.run_dir)
    shapes = []
    for variant in ("mixture", "none"):
        manifest = snapshots.manifest(f"dcnv2.{variant}.1", snapshots.latest(f"dcnv2.{variant}.1"))
        shapes.append({name: record.shape for name, record in manifest.tensors.items()})
    assert shapes[0] == shapes[1]


def test_two_workers_have_the_losses_of_one(store: Path, tmp_path: Path) -> None:
    """Float32 sums in another order: 1e-4 relative, as the training loop's own test.

    Requests too: the rows of each lie in four lanes, two of them on either rank.
    """
    found = {}
    for world in (1, 2):
        spec = runs.spec(store, tmp_path / str(world), student("mixture", MIXTURE, "fm"), sharding="row_wise")
        (train if world == 1 else train_on_two)(spec)
        found[world] = runs.losses(spec)
    assert found[1].keys() == found[2].keys()
    for key, value in found[1].items():
        assert found[2][key] == pytest.approx(value, rel=1e-4), key


def _rank(rank: int, world: int, port: int, spec) -> None:
    runs.IdLabels = TeacherLabels  # in a process of its own
    runs._rank(rank, world, port, spec)


def train_on_two(spec) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes.start(_rank, (2, port, spec), 2)


# --- what is refused


def test_examples_without_requests_are_refused_before_training(tmp_path: Path) -> None:
    root = tmp_path / "store"
    store: ExampleStore = write_store(root, list(runs.PERIODS), impressions=100)
    for period in runs.PERIODS:
        path = store.period_dir(period) / "manifest.json"
        manifest = json.loads(path.read_text())
        del manifest["columns"]["request_id"]
        path.write_text(json.dumps(manifest))
    spec = runs.spec(root, tmp_path / "run", student("listwise", [{"type": "listwise", **CLICK}]))
    with pytest.raises(
        DataError, match=r"column 'request_id' is missing, and objective 'listwise' of dcnv2\.listwise\.1"
    ):
        train(spec)
    assert not (spec.folder / "periods").exists()
