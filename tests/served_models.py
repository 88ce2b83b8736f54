"""Small published models that read every kind of feature, for tests of what serves them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from example_store import every_feature_rows, every_feature_schema

from rayfm.data.encode import Encoder
from rayfm.models import MODELS, build_model
from rayfm.serving.teacher import TeacherService
from rayfm.snapshots.publish import publish

SCHEMA = every_feature_schema()
TASKS = ("click", "watch")
CONFIG = MODELS["dcnv2"].Config(embedding_dim=8, hidden=(8,))
USER_COLUMNS = ("traffic", "age", "user", "history", "topics", "topics__weights")
CANDIDATE_COLUMNS = ("ad", "tags")


def publish_model(
    root: Path, model: str, version: str, seed: int, config=CONFIG, extra: Mapping[str, torch.Tensor] | None = None
) -> torch.nn.Module:
    """A model with noticeable weights as a snapshot, whose ``extra`` tensors join its own or take their places."""
    built = build_model(config, SCHEMA, TASKS, seed=seed)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(seed + parameter.numel()))
    publish(
        root,
        model,
        version,
        {**built.state_dict(), **(extra or {})},
        trained_through="2024-01-01",
        config=config.dump(),
        example_schema=SCHEMA.dump(),
        tasks=TASKS,
    )
    return built.eval()


def predictions(model: torch.nn.Module, table: pa.Table) -> dict[str, np.ndarray]:
    """The model's own, its tables neither sharded nor exported."""
    encoder = Encoder(SCHEMA, labels=False)
    none = np.zeros((len(table), 0), np.float32)
    chunk = encoder.encode(table, np.zeros(len(table), np.int64), none, none.astype(bool))
    with torch.no_grad():
        logits = model(encoder.batch(chunk, 0, len(table))).logits
    return {"click": logits["click"].sigmoid().numpy(), "watch": logits["watch"].numpy()}


def user_row(seed: int = 3) -> pa.Table:
    """One user's features; none is null."""
    rows = every_feature_rows(60, seed)
    for row in rows.select(USER_COLUMNS).to_pylist():
        if None not in row.values() and row["history"] and row["topics"]:
            return pa.Table.from_pylist([row], rows.select(USER_COLUMNS).schema)
    raise AssertionError


def candidate_rows(count: int, seed: int = 4) -> pa.Table:
    """The features of ``count`` candidates."""
    return every_feature_rows(count, seed).select(CANDIDATE_COLUMNS)


def as_examples(user: pa.Table, candidates: pa.Table) -> pa.Table:
    """What the same request would be with the user's features in every row."""
    rows = candidates.num_rows
    table = candidates.append_column("example_id", pa.array(np.arange(rows)))
    for name in user.column_names:
        table = table.append_column(name, pa.array(user[name].to_pylist() * rows, user.schema.field(name).type))
    return table


class LocalTeacher:
    """A teacher's service in this process, asked like the one on Ray Serve."""

    def __init__(self, root: Path, model: str) -> None:
        self.service = TeacherService({"root": str(root), "model": model, "poll_s": 60.0})

    async def score(self, rows, version, representation):
        return await self.service.score_request(rows, version, representation)

    async def version(self):
        return await self.service.current_version()
