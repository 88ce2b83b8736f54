"""Everything that is planned for a trainer on a cluster, in one value."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rayfm.config import ConfigError
from rayfm.planning.hardware import Precision
from rayfm.planning.memory import Memory
from rayfm.planning.search import Cluster, Plan, find_plan
from rayfm.planning.step import (
    StepTime,
    dense_memory,
    host_memory,
    rank_loads,
    rank_memory,
    received_bytes,
    step_time,
)
from rayfm.planning.work import Learner, Work, count_work
from rayfm.schema import Schema
from rayfm.training.config import TrainingConfig

ADVICE = {
    "host_to_device": "fewer or shorter features, or a faster host link",
    "ids_all_to_all": "shorter lists, fewer pieces of tables; row-wise tables send lengths to every rank",
    "lookup": "narrower tables, shorter lists, more memory bandwidth; row-wise pooled tables write a partial vector of "
    "every rank's examples on every rank, however many ranks there are",
    "host_rows": "a larger cache_load_factor, fewer tables in the host's memory, more GPUs to hold them, shorter "
    "lists, a faster host link",
    "vectors_forward": "narrower tables, fewer row-wise pooled ones (their reduce-scatter grows with the ranks), a "
    "faster network",
    "dense_forward": "a lower precision, a smaller model, or a larger batch where starting operators is what costs",
    "dense_backward": "a lower precision, a smaller model, or a larger batch where starting operators is what costs",
    "vectors_backward": "narrower tables, fewer row-wise pooled ones (their all-gather grows with the ranks), a faster "
    "network",
    "table_update": "narrower tables, shorter lists, more memory bandwidth; row-wise pooled tables read a gradient of "
    "every rank's examples on every rank, however many ranks there are",
    "dense_all_reduce": "a larger batch a GPU, which pays it less often; fewer dense parameters; a faster network",
    "dense_optimizer": "a larger batch a GPU, which pays it less often; fewer dense parameters",
}
"""Part -> what would make it shorter."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What training would take."""

    work: Work
    cluster: Cluster
    batch: int
    """Examples of a rank's batch."""
    precision: Precision
    plan: Plan
    fullest: Memory
    """Of the rank that holds most."""
    emptiest: Memory
    host: float
    """Bytes of tables in the memory of the fullest node's host."""
    step: StepTime

    @property
    def examples_per_second(self) -> tuple[float, float]:
        """With nothing overlapped, and with all of it: what is got lies between."""
        total = self.batch * self.cluster.world
        return total / self.step.total, total / self.step.overlapped


def estimate(
    learners: Sequence[Learner],
    schema: Schema,
    training: TrainingConfig,
    cluster: Cluster,
    batch: int,
    precision: Precision,
) -> Estimate:
    """Plan a trainer's models on a cluster.

    Args:
        learners: the models of one worker group.
        schema: the pipeline's schema.
        training: how they are trained; its workers, batch size and precision are not read.
        cluster: the devices.
        batch: examples a device.
        precision: of the dense part.

    Raises:
        ConfigError: the batch is below 1, or a model cannot be built.
        CapacityError: it does not fit, with the arithmetic.
    """
    if batch < 1:
        raise ConfigError(f"--batch-size is {batch}; a GPU takes at least 1 example a step")
    work = count_work(learners, schema, training, bf16=precision == "bf16")
    shared = dense_memory(work, training, batch)
    plan = find_plan(work, training, cluster, batch, cluster.usable_bytes - shared.total)
    received = received_bytes(plan, batch)
    loads = rank_loads(plan, batch, cluster.world)
    ranks = [rank_memory(load, shared, received) for load in set(loads)]
    return Estimate(
        work=work,
        cluster=cluster,
        batch=batch,
        precision=precision,
        plan=plan,
        fullest=max(ranks, key=lambda memory: memory.total),
        emptiest=min(ranks, key=lambda memory: memory.total),
        host=host_memory(loads, cluster.per_node),
        step=step_time(work, plan, cluster, batch, precision),
    )
