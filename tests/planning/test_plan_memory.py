"""Memory of tables and their optimisers: what is counted against what a sharded model holds."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor

from rayfm.models.base import MODELS
from rayfm.planning import memory
from rayfm.planning.hardware import load_hardware
from rayfm.planning.search import Cluster, Plan, find_plan
from rayfm.planning.step import dense_memory, rank_loads
from rayfm.planning.work import Learner, count_work
from rayfm.schema import Schema
from rayfm.training.config import DenseOptimizer, TrainingConfig
from rayfm.training.learner import Learner as Trained
from rayfm.training.learner import LearnerConfig
from rayfm.training.sharding import local_shards

ROWS = {"user": 1000, "ad": 601, "tag": 500, "hour": 24, "kind": 30}
SCHEMA = Schema.model_validate(
    {
        "tables": {name: {"rows": rows} for name, rows in ROWS.items()},
        "features": [
            {"name": "age", "kind": "dense"},
            *({"name": name, "kind": "sparse"} for name in ROWS if name != "tag"),
            {"name": "tags", "kind": "multi", "table": "tag", "max_len": 3},
        ],
        "tasks": [{"name": "click"}],
    }
)
MODEL = MODELS["dcnv2"].Config.model_validate({"type": "dcnv2", "embedding_dim": 16, "hidden": [8]})
TRAINING = TrainingConfig.model_validate(
    {
        "sharding_overrides": {"user": "row_wise", "ad": "table_wise", "tag": "column_wise"},
        "table_overrides": {
            "ad": {"type": "adagrad"},
            "hour": {"type": "sgd"},
            "kind": {"type": "adam"},
        },
        "column_parts": 2,
    }
)
WORLD = 2


def test_bytes_by_hand():
    assert memory.table_bytes(10, 4) == 160
    states = [memory.table_state_bytes(kind, 10, 4) for kind in ("rowwise_adagrad", "adagrad", "sgd", "adam")]
    assert states == [40, 160, 0, 320]
    assert memory.dense_bytes(5) == 40
    assert memory.dense_state_bytes(DenseOptimizer(), 5) == 40
    assert memory.dense_state_bytes(DenseOptimizer(type="adagrad"), 5) == 20
    # 6 ids of 8 bytes; 3 vectors leave and 2 arrive, of 4 columns of 4 bytes.
    assert memory.io_bytes(6, 3, 4, 2) == 6 * 8 + 5 * 16


def planned() -> tuple[Plan, Any]:
    work = count_work([Learner("t", MODEL, ("click",))], SCHEMA, TRAINING, bf16=False)
    cluster = Cluster(1, WORLD, load_hardware("h100", overrides=["device=cpu"]))
    return find_plan(work, TRAINING, cluster, 8, 1e9), work


def held(rank: int, folder: str) -> None:
    """Build the learner with the stored plan, and write down the bytes of what this rank holds."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", WORLD), rank=rank, world_size=WORLD)
    config = LearnerConfig(model_name="t", variant="none", seed=1, model=MODEL, tasks=("click",), objectives=())
    learner = Trained(config, TRAINING, SCHEMA, torch.device("cpu"), Path(folder) / "plan.json")
    learner.optimizers.init_state()
    weights = {
        name.split(".")[-2]: sum(shard.nbytes for shard, _, _ in local_shards(value))
        for name, value in learner.dmp.state_dict().items()
        if "embedding_bags" in name
    }
    state: dict[str, int] = {}
    for name, values in learner.optimizers.fused.state_dict()["state"].items():
        table = name.split(".")[-2]
        for value in values.values():
            if isinstance(value, ShardedTensor):  # not the count of steps
                state[table] = state.get(table, 0) + sum(shard.tensor.nbytes for shard in value.local_shards())
    dense = sum(
        p.nbytes
        for name, p in learner.dmp.named_parameters()
        if "embedding_bags" not in name or name.split(".")[-2] == "kind"
    )
    Path(folder, f"held{rank}.json").write_text(json.dumps({"weights": weights, "state": state, "dense": dense}))
    dist.destroy_process_group()


def test_counted_bytes_are_those_that_a_sharded_model_holds():
    plan, work = planned()
    assert {p.table.name: p.kind for p in plan.tables} == {
        "user": "row_wise",
        "ad": "table_wise",
        "tag": "column_wise",
        "hour": plan.tables[-1].kind,
        "kind": "data_parallel",
    }
    with tempfile.TemporaryDirectory() as folder:
        stored = {p.table.path.replace("t.", "model.", 1): {} for p in plan.tables}
        for p in plan.tables:
            owners = [piece.rank for piece in p.pieces]
            where: dict[str, Any] = {"kind": p.kind}
            if p.kind == "table_wise":
                where["rank"] = owners[0]
            elif p.kind == "column_wise":
                where["ranks"] = owners
            stored[p.table.path.replace("t.", "model.", 1)][p.table.name] = where
        Path(folder, "plan.json").write_text(json.dumps({str(WORLD): stored}))
        processes.start(held, (folder,), WORLD)
        found = [json.loads(Path(folder, f"held{rank}.json").read_text()) for rank in range(WORLD)]
    for rank, load in enumerate(rank_loads(plan, 8, WORLD)):
        sharded = {name: size for name, size in found[rank]["weights"].items() if name != "kind"}
        assert load.memory == sum(sharded.values())
        assert load.state == pytest.approx(sum(found[rank]["state"].values()))
        # Weights and gradients of what every rank holds, the replicated table among it.
        assert dense_memory(work, TRAINING, 8).dense == 2 * found[rank]["dense"]
