"""What `benchmarks.gpu` measures of rayfm's own training steps, where TorchRec and fbgemm are installed."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from benchmarks.data import SPARSE, model_config, schema
from benchmarks.gpu_parts import PRECISIONS, seconds
from rayfm.models.synthetic import synthetic_batch
from rayfm.schema import Schema
from rayfm.training.config import TrainingConfig
from rayfm.training.device import set_up
from rayfm.training.feed import Feed
from rayfm.training.learner import Learner, LearnerConfig
from rayfm.training.stepping import Stepping
from rayfm.training.trainer import single_process_group

HELD = 8
"""Batches in memory that the steps go through in turn."""


def step_rate(device: torch.device, known: Schema, rows: int, steps: int, **training: Any) -> dict[str, float]:
    """Rows a second of DCNv2's training steps, fed from the host's memory.

    Args:
        device: what to train on.
        known: the schema.
        rows: of a batch.
        steps: of one pass that is timed.
        **training: keys of the training's config.
    """
    gpus = {"gpus_per_worker": 1} if device.type == "cuda" else {}
    config = TrainingConfig.model_validate({"batch_size": rows, **gpus, **training})
    learner_config = LearnerConfig(
        model_name="dcnv2", variant="none", seed=1, model=model_config("dcnv2"), tasks=("click",)
    )
    held = [synthetic_batch(known, rows, seed=seed) for seed in range(HELD)]
    with tempfile.TemporaryDirectory() as folder, single_process_group():
        set_up(device, config)
        learner = Learner(learner_config, config, known, device, Path(folder) / "plan.json")
        stepping = Stepping(config, [learner], device)
        made = itertools.count()

        def work() -> None:
            feed = Feed(itertools.islice(itertools.cycle(held), steps), device, stepping.ahead)
            with stepping.steppers(feed) as steppers:
                for _, batch in feed:
                    for _, stepper in steppers:
                        stepper.train_step(batch, next(made))

        taken = seconds(work, device, repeats=3)
    return {"ms": 1e3 * taken / steps, "rows/s": rows * steps / taken}


def steps(device: torch.device, rows: int, count: int) -> dict[str, dict[str, float]]:
    """Steps one by one and through TorchRec's pipeline, at each precision."""
    gpu = device.type == "cuda"
    return {
        f"{pipeline} {precision}": step_rate(device, schema(), rows, count, pipeline=pipeline, precision=precision)
        for pipeline in ("none", "sparse_dist")
        for precision in (PRECISIONS if gpu else ("fp32", "bf16"))
    }


def memories(device: torch.device, rows: int, count: int, table_rows: int) -> dict[str, dict[str, float]]:
    """Steps with all tables in the GPU's memory, in the host's, and there with a cache of a fifth of the rows."""
    known = schema()
    known = known.model_copy(
        update={"tables": {n: table.model_copy(update={"rows": table_rows}) for n, table in known.tables.items()}}
    )
    return {
        kind: step_rate(device, known, rows, count, table_memory={"kind": kind})
        for kind in ("device", "uvm", "uvm_caching")
    }


def exchange(kind: str, world: int, rows: int, count: int, sparse: int = SPARSE) -> dict[str, dict[str, float]]:
    """Steps of ``world`` workers, one by one and through TorchRec's pipeline; rows are those of all workers.

    Args:
        kind: ``cuda`` (over NCCL, a GPU each), or ``cpu`` (over gloo).
        world: how many.
        rows: of a worker's batch.
        count: steps of a pass.
        sparse: tables.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_worker, (kind, world, rows, count, sparse, folder), nprocs=world)
        found: dict[str, dict[str, float]] = json.loads((Path(folder) / "found.json").read_text())
    return found


def _worker(rank: int, kind: str, world: int, rows: int, count: int, sparse: int, folder: str) -> None:
    os.environ["LOCAL_WORLD_SIZE"] = str(world)
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", store=store, rank=rank, world_size=world)
    found = {}
    for pipeline in ("none", "sparse_dist"):
        rate = step_rate(device, schema(sparse), rows, count, pipeline=pipeline)
        found[pipeline] = {"ms": rate["ms"], "rows/s": world * rate["rows/s"]}
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()
