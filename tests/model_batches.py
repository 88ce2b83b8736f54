"""A schema with every kind of feature, small configs of every model, random batches of it, and a comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rayfm.data.batch import Batch
from rayfm.export.served import ServedModel, probabilities
from rayfm.models import MODELS, Model, build_model
from rayfm.models.base import ModelOutput
from rayfm.models.synthetic import synthetic_batch
from rayfm.schema import Feature, Schema, Table, Task

TASKS = ("click", "watch")
SUPERVISION = ("fm/click", "fm/watch")

SCHEMA = Schema(
    tables={"user": Table(rows=40), "video": Table(rows=60), "tag": Table(rows=20), "topic": Table(rows=12)},
    features=(
        Feature(name="age", kind="dense"),
        Feature(name="video", kind="sparse"),
        Feature(name="user", kind="sparse"),
        Feature(name="watched", kind="sequence", table="video", max_len=6),
        Feature(name="tags", kind="multi", table="tag", max_len=4),
        Feature(name="duration", kind="dense"),
        Feature(name="topics", kind="weighted", table="topic", max_len=3),
        Feature(name="liked", kind="sequence", table="video", max_len=6),
        Feature(name="country", kind="sparse", table="user"),
    ),
    tasks=(Task(name="click", weight=2.0), Task(name="watch", kind="regression")),
)

SIZES: dict[str, dict[str, Any]] = {
    "dlrm": {"dense": (8,), "over": (16, 12)},
    "dcnv2": {"hidden": (16, 12)},
    "dcn": {"hidden": (16, 12)},
    "fm": {},
    "fmfm": {},
    "deepfm": {"hidden": (16, 12)},
    "dmin": {"interests": 2, "position_dim": 2, "attention": (8,), "hidden": (16, 12)},
    "dhen": {"layers": 2, "tokens": 2, "dot_hidden": (6,), "cross_rank": 3, "dense": (6,), "hidden": (16, 12)},
    "interformer": {
        "layers": 2,
        "interactions": ("dot", "linear"),
        "dot_hidden": (6,),
        "summary_tokens": 2,
        "recent_tokens": 1,
        "dense": (6,),
        "hidden": (16, 12),
    },
    "two_tower": {"item_features": ("video", "tags", "duration"), "hidden": (16,), "vector_dim": 12},
    "wukong": {
        "fm_tokens": 3,
        "linear_tokens": 2,
        "rank": 2,
        "fm_hidden": (6,),
        "dense": (6,),
        "hidden": (16, 12),
    },
}


def small_config(kind: str, **changes: Any) -> Any:
    return MODELS[kind].Config(**{"embedding_dim": 8, **SIZES[kind], **changes})


def small_model(kind: str, tasks: tuple[str, ...] = TASKS, seed: int = 0, **changes: Any) -> Model:
    return build_model(small_config(kind, **changes), SCHEMA, tasks, seed=seed)


def random_batch(rows: int = 32, seed: int = 0, **options: Any) -> Batch:
    return synthetic_batch(SCHEMA, rows, seed=seed, **{"supervision": SUPERVISION, **options})


def is_table(name: str) -> bool:
    """Whether a parameter is a table of an embedding collection."""
    return "embedding_bags" in name or ".embeddings." in name


def max_difference(trained: Callable[[Batch], ModelOutput], served: ServedModel, batch: Batch) -> dict[str, float]:
    """Task -> the largest absolute difference between the trained model's predictions and the served one's.

    The served model's calibrator is left out: it is meant to change predictions.
    """
    with torch.no_grad():
        expected = probabilities(served.model.schema, trained(batch).logits)
        found = probabilities(served.model.schema, served.model(batch).logits)
    return {task: float((expected[task] - found[task]).abs().max()) for task in expected}
