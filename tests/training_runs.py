"""Small trainings for tests: a spec over a store, a coordinator that never waits, one process or several."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from pathlib import Path
from typing import Any

import processes
import torch
import torch.distributed as dist
from example_store import every_feature_schema

from rayfm.distill.base import OBJECTIVES
from rayfm.metrics import MetricState
from rayfm.models.base import MODELS
from rayfm.training.config import TrainingConfig
from rayfm.training.learner import LearnerConfig
from rayfm.training.loop import TrainingLoop
from rayfm.training.spec import PinnedLabels, TrainerSpec
from rayfm.training.trainer import fit_here

PERIODS = ("2024-01-01", "2024-01-02", "2024-01-03")


class Free:
    """A coordinator for which everything stands: labels from period 1 on."""

    def __init__(self, teachers: tuple[str, ...] = ()) -> None:
        self.teachers = teachers
        self.done: list[tuple[str, dict[str, str]]] = []

    def wait_prepared(self, period: str) -> None:
        pass

    def wait_labels(self, period: str) -> dict[str, PinnedLabels]:
        if period == PERIODS[0]:
            return {}
        return {teacher: PinnedLabels(version=f"{period}-v", table_version=1) for teacher in self.teachers}

    def trained(self, period: str, versions: dict[str, str]) -> None:
        self.done.append((period, versions))

    def stopped(self) -> bool:
        return False

    def failed(self, message: str) -> None:
        raise AssertionError(message)


@dataclasses.dataclass
class Noted:
    """A coordinator that writes down, for all processes, what it was asked and told."""

    folder: Path

    def note(self, what: str, text: str) -> None:
        with (self.folder / what).open("a") as file:
            file.write(f"{text}\n")

    def noted(self, what: str) -> list[str]:
        path = self.folder / what
        return path.read_text().splitlines() if path.exists() else []

    def wait_prepared(self, period: str) -> None:
        self.note("asked", period)

    def wait_labels(self, period: str) -> dict[str, PinnedLabels]:
        return {}

    def trained(self, period: str, versions: dict[str, str]) -> None:
        self.note("trained", period)

    def stopped(self) -> bool:
        return bool(self.noted("failed"))

    def failed(self, message: str) -> None:
        self.note("failed", message)


class IdLabels:
    """A label source whose labels follow from the example id."""

    def lookup(self, teacher: str, labels: PinnedLabels, tasks: tuple[str, ...]) -> Any:
        from example_store import IdLookup

        return IdLookup()

    def release(self) -> None:
        pass


def learner(model: str = "dcnv2", variant: str = "none", seed: int = 1, **kwargs: Any) -> LearnerConfig:
    """A small model; ``variant`` names the objectives."""
    sizes: dict[str, Any] = {"fm": {}, "two_tower": {"item_features": ["ad"], "hidden": [16], "vector_dim": 8}}.get(
        model, {"hidden": [16]}
    )
    objectives: dict[str, list[dict[str, Any]]] = {
        "none": [],
        "direct": [{"type": "direct", "teacher": "teacher", "tasks": ["click"]}],
        "adapter": [
            {"type": "auxiliary_head", "teacher": "teacher", "tasks": ["click"]},
            {"type": "student_adapter", "teacher": "teacher", "tasks": ["click"]},
        ],
    }
    return LearnerConfig(
        model_name=model,
        variant=variant,
        seed=seed,
        model=MODELS[model].Config.model_validate({"type": model, "embedding_dim": 8, **sizes}),
        tasks=("click", "watch"),
        objectives=tuple(OBJECTIVES[item["type"]].Config.model_validate(item) for item in objectives[variant]),
        **kwargs,
    )


def spec(store: Path, run_dir: Path, *learners: LearnerConfig, **training: Any) -> TrainerSpec:
    """A trainer of ``learners`` over three periods, batch 64."""
    return TrainerSpec(
        name="group",
        role="students",
        learners=learners,
        training=TrainingConfig.model_validate({"batch_size": 64, "predict_batch_size": 256, **training}),
        schema_=every_feature_schema(),
        periods=PERIODS,
        store=str(store),
        run_dir=str(run_dir),
        teachers=("teacher",) if any(item.variant != "none" for item in learners) else (),
        consideration_share=0.5,
        evaluated_share=1.0,
        replicates=20,
    )


def train_here(spec: TrainerSpec) -> Free:
    """Train in this process."""
    coordinator = Free(spec.teachers)
    fit_here(spec, coordinator, IdLabels())
    return coordinator


def _rank(rank: int, world: int, port: int, spec: TrainerSpec) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
    }
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    TrainingLoop(spec, Free(spec.teachers), IdLabels()).run()
    dist.destroy_process_group()


def train_on(spec: TrainerSpec, world: int) -> None:
    """Train on ``world`` gloo processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes.start(_rank, (world, port, spec), world)


def losses(spec: TrainerSpec) -> dict[tuple[str, str], float]:
    """(period, term) -> mean loss, of a finished training."""
    found = {}
    for period in spec.periods:
        record = json.loads((spec.folder / "periods" / f"{period}.json").read_text())
        found |= {(period, term): value for term, value in record["losses"].items()}
    return found


def metric_sums(spec: TrainerSpec, period: str, key: str) -> dict[str, torch.Tensor]:
    """The metric sums that a training stored for a period."""
    return MetricState.load(spec.folder / "metrics" / period / f"{key}.npz").state_dict()
