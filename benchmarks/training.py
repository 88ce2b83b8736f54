"""Training from Parquet against a bare step: ``python -m benchmarks.training STORE dlrm|dcnv2 fp32|bf16``.

Ours is the training loop over a period: read, encode, step, account for losses. Theirs is the same model with the same
fused tables on batches already in memory: forward, mean cross-entropy, backward, Adam.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.nn import functional
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingEnv
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from benchmarks.data import BATCH, SHORT, model_config, schema
from benchmarks.measure import Outcome, in_turns, rates, report, timed
from rayfm.data.batch import Batch
from rayfm.data.encode import Encoder
from rayfm.data.reader import ArrowReader
from rayfm.data.steps import ReadPlan
from rayfm.data.store import ExampleStore
from rayfm.models.build import build_model
from rayfm.training.config import TrainingConfig
from rayfm.training.learner import LearnerConfig
from rayfm.training.loop import PeriodParts, TrainingLoop
from rayfm.training.sharding import Sharder, collections, place, sharding_plan
from rayfm.training.spec import PinnedLabels, TrainerSpec
from rayfm.training.trainer import single_process_group

HELD = 8
"""Batches in memory that a step alone goes through in turn."""


class Free:
    """A coordinator for which everything stands."""

    def wait_prepared(self, period: str) -> None:
        """The period is there."""

    def wait_labels(self, period: str) -> dict[str, PinnedLabels]:
        """No labels."""
        return {}

    def trained(self, period: str, versions: dict[str, str]) -> None:
        """Nobody asks."""

    def stopped(self) -> bool:
        """Nothing else runs."""
        return False

    def failed(self, message: str) -> None:
        """The error is raised here anyway."""


def batches_in_memory(store: ExampleStore, count: int, size: int = BATCH) -> list[Batch]:
    """The first batches of the short period."""
    encoder = Encoder(schema())
    plan = ReadPlan(store, tuple(encoder.columns), size)
    return list(islice(ArrowReader(plan, encoder).batches(SHORT), count))


def bare_step(name: str, training: TrainingConfig) -> Callable[[Batch], None]:
    """One training step with nothing of rayfm's loop around it."""
    model = build_model(model_config(name), schema(), ("click",), embedding_device=torch.device("meta"))
    for collection in collections(model).values():
        for bag in collection.embedding_bags.values():
            _apply_optimizer_in_backward(
                RowWiseAdagrad, [bag.weight], {"lr": training.tables.lr, "eps": training.tables.eps}
            )
    cpu = torch.device("cpu")
    dmp = DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=cpu,
        plan=sharding_plan(model, place(model, training, 1), 1, cpu),
        sharders=[Sharder()],
        init_data_parallel=False,
    )
    fused: Any = dmp.fused_optimizer
    tables = set(fused.params)
    for parameter in fused.params.values():
        torch.nn.init.normal_(parameter.detach(), std=0.01)
    adam = torch.optim.Adam(
        [p for name, p in dmp.named_parameters() if name not in tables], lr=training.dense.lr, foreach=True
    )
    dmp.train()

    def step(batch: Batch) -> None:
        fused.zero_grad()
        adam.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16) if training.precision == "bf16" else nullcontext():
            logit = dmp(batch).logits["click"]
        loss = functional.binary_cross_entropy_with_logits(logit.float(), batch.labels[:, 0])
        loss.backward()
        adam.step()

    return step


def compare(store: ExampleStore, name: str, precision: str) -> Outcome:
    """Examples a second of both, in turns."""
    training = TrainingConfig.model_validate({"batch_size": BATCH, "precision": precision})
    learner = LearnerConfig(
        model_name=name, variant="none", seed=1, model=model_config(name), tasks=("click",), objectives=()
    )

    steps = store.manifest(SHORT).rows("impression") // BATCH
    # All of the period's: a few in turn would find their tables' rows in the processor's cache, and ours would not.
    held = batches_in_memory(store, steps)

    with tempfile.TemporaryDirectory() as folder, single_process_group():
        spec = TrainerSpec(
            name="bench",
            role="students",
            learners=(learner,),
            training=training,
            schema_=schema(),
            periods=(SHORT,),
            store=str(store.root),
            run_dir=folder,
            replicates=0,
        )
        loop = TrainingLoop(spec, Free())
        step = bare_step(name, training)

        def ours() -> float:
            # The loop's own method, so that its start, checkpoint and publishing stay out of the figure.
            return loop._train(0, 0, {}, None, PeriodParts())

        def theirs() -> float:
            rows = 0
            for batch in held:
                step(batch)
                rows += len(batch)
            return rows

        return rates(in_turns(lambda: timed(ours), lambda: timed(theirs), repeats=3), "examples")


if __name__ == "__main__":
    torch.set_num_threads(1)
    report(compare(ExampleStore(Path(sys.argv[1])), sys.argv[2], sys.argv[3]))
