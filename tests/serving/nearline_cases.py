"""A published teacher of nothing but an id and a number, and everything near-line labelling needs around it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from rayfm.models import MODELS, build_model
from rayfm.schema import Schema
from rayfm.serving.nearline.config import NearLineConfig
from rayfm.serving.nearline.labeller import Labeller
from rayfm.serving.nearline.labels import NearLineLabels
from rayfm.serving.nearline.rows import Versions, check_post
from rayfm.serving.nearline.spool import ROW, Spool
from rayfm.snapshots import SnapshotStore
from rayfm.snapshots.publish import publish

MODEL, TEACHER = "fm.teacher.0", "fm"
V1, V2 = "2024-01-01-aaaaaaaa", "2024-01-02-bbbbbbbb"
TRAINED = {V1: "2024-01-01", V2: "2024-01-02"}
DAY_US = 86_400_000_000
DAY2_US = 1_704_153_600_000_000
"""2024-01-02T00:00Z, the first day that V1 may label."""

SCHEMA = Schema.model_validate(
    {
        "tables": {"user": {"rows": 100}},
        "features": [
            {"name": "age", "kind": "dense"},
            {"name": "user", "kind": "sparse"},
            {"name": "unread", "kind": "dense"},
        ],
        "tasks": [{"name": "click"}, {"name": "watch", "kind": "regression"}],
        "traffics": ["feed", "search"],
    }
)
TASKS = ("click", "watch")


def publish_teacher(root: Path, version: str) -> None:
    """A small DCNv2 that reads ``age`` and ``user``; versions differ in their weights."""
    config = MODELS["dcnv2"].Config(embedding_dim=4, hidden=(4,), features=("age", "user"))
    model = build_model(config, SCHEMA, TASKS, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(sum(version.encode())))
    publish(
        root, MODEL, version, dict(model.state_dict()), trained_through=TRAINED[version], config=config.dump(),
        example_schema=SCHEMA.dump(), tasks=TASKS,
    )  # fmt: skip


def config(root: Path, **changes: object) -> NearLineConfig:
    """A config whose Redis is not asked in tests without one."""
    plain = {"run": "test", "teacher": TEACHER, "root": str(root), "model": MODEL} | changes
    return NearLineConfig.model_validate(plain)


def rows(count: int, first_id: int = 0, day: int = 0) -> pa.Table:
    """``count`` examples of a day, counted from 2024-01-02, with one column that the teacher does not read."""
    ids = np.arange(first_id, first_id + count)
    return pa.table(
        {
            "example_id": ids,
            "time": DAY2_US + day * DAY_US + ids,
            "traffic": ["feed"] * count,
            "age": (ids % 50).astype(np.float32),
            "user": ids % 40,
            "note": [f"n{number}" for number in ids],
        }
    )


def predicted(table: pa.Table, version: str = V1) -> pa.Table:
    """What `Oracle` says of a table: numbers that can be recomputed from ids."""
    ids = table["example_id"].to_numpy()
    shift = 0.0 if version == V1 else 0.5
    return pa.table({"click": ((ids % 100) / 250 + shift).astype(np.float32), "watch": ids.astype(np.float32)})


class Oracle:
    """Stands in for the teacher's service; records what it was asked, and fails as told."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.error: Exception | None = None
        self.poison: set[int] = set()

    def __call__(self, table: pa.Table, version: str) -> tuple[str, pa.Table]:
        self.asked.append(table.num_rows)
        if self.error is not None:
            raise self.error
        if self.poison & set(table["example_id"].to_pylist()):
            raise RuntimeError("index out of range")
        return version, predicted(table, version)


def as_json(table: pa.Table) -> bytes:
    """A post's JSON body."""
    return json.dumps({"rows": table.to_pydict()}).encode()


def as_arrow(table: pa.Table) -> bytes:
    """A post's Arrow body."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def queued(spool: Spool, count: int = 2) -> str:
    """The ticket of a post that waits."""
    return spool.accept(rows(count).append_column(ROW, pa.array(range(count), pa.int64())), V1)


class Bench:
    """A labeller with what it works on."""

    def __init__(self, root: Path) -> None:
        self.config = config(root)
        self.spool, self.labels = Spool(root, TEACHER), NearLineLabels(root)
        self.versions, self.oracle = Versions(SnapshotStore(root), MODEL), Oracle()
        self.labeller = Labeller(self.config, self.spool, self.labels, self.versions, self.oracle)

    def accept(self, table: pa.Table, version: str = V1) -> str:
        post = check_post(table, TEACHER, self.versions.get(version))
        return self.spool.accept(post.good, version, post.rejects)

    def label(self, *tickets: str):
        return self.labeller.label([self.spool.read(ticket) for ticket in tickets])

    def stored(self) -> pa.Table:
        return self.labels.rows(TEACHER).sort_by([("ticket", "ascending"), ("row", "ascending")])
