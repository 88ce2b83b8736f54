"""One model under training: its sharded module, its optimisers, one step at a time."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor
from torchrec.distributed.model_parallel import (
    DataParallelWrapper,
    DefaultDataParallelWrapper,
    DistributedModelParallel,
)
from torchrec.distributed.types import ShardingEnv
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from rayfm.config import Config
from rayfm.data.batch import Batch
from rayfm.data.vocabulary import IntArray
from rayfm.distill.base import OBJECTIVES, ObjectiveConfig
from rayfm.distill.build import build_objectives
from rayfm.models.base import MODELS, ModelConfig, ModelOutput
from rayfm.models.build import build_model
from rayfm.models.histories import HistoryFeature
from rayfm.schema import Schema
from rayfm.snapshots.publish import TensorSlice
from rayfm.training.calibration import CountsCalibration
from rayfm.training.config import TrainingConfig
from rayfm.training.cpu_kernels import denormals_as_zero, train_fast_here
from rayfm.training.diagnosis import diagnose
from rayfm.training.divergence import DivergenceError, LossWatch
from rayfm.training.dropout import has_dropout, step_masks
from rayfm.training.init import fill_normal
from rayfm.training.lost_labels import LostLabels, lose_labels
from rayfm.training.module import TrainModule
from rayfm.training.optim import Optimizers, fuse_table_optimizers
from rayfm.training.reset import reset_rows
from rayfm.training.sharding import (
    carried,
    collections,
    local_shards,
    sharders,
    sharding_plan,
    stored_placement,
    table_configs,
    weight_name,
)
from rayfm.training.table_memory import forget_caches


class LearnerConfig(Config):
    """One model to train: a teacher, or one variant of a student under one seed."""

    model_name: str
    variant: str
    seed: int
    model: Annotated[ModelConfig, MODELS]
    tasks: tuple[str, ...]
    objectives: tuple[Annotated[ObjectiveConfig, OBJECTIVES], ...] = ()
    """Besides the tasks' own loss, which every model has where none of them takes its place."""
    reference: dict[str, str] = {}
    """Task -> supervision column that considerations are scored against."""
    traffics: tuple[str, ...] = ()
    """Traffics whose rows it learns and is scored on; none named: all."""
    lost_labels: LostLabels | None = None
    """Labels that it is trained without."""
    logit_shift: float = 0.0
    """Added to the logits of binary tasks in what is published."""
    calibrate: bool | CountsCalibration = False
    """Publish with a calibrator, fitted on each period's predictions before the model trains on the period."""

    @property
    def key(self) -> str:
        """Name of the learner in checkpoints, snapshots and metrics."""
        return f"{self.model_name}.{self.variant}.{self.seed}"

    def supervision(self) -> tuple[str, ...]:
        """Supervision columns that training reads."""
        return tuple(dict.fromkeys(name for o in self.objectives for name in o.supervision(self.tasks)))

    def representations(self) -> dict[str, int]:
        """Teacher -> width of its stored representation, for those that training reads."""
        return {name: width for o in self.objectives for name, width in o.representations().items() if width}

    def histories(self) -> dict[str, HistoryFeature]:
        """Name -> history, of those that the model reads."""
        return {history.name: history for history in self.model.histories}


@dataclasses.dataclass
class StepClock:
    """Seconds spent in the parts of a step."""

    forward: float = 0.0
    backward: float = 0.0
    optimizer: float = 0.0


class Learner:
    """Builds and trains one model on this rank.

    Args:
        config: the learner's config.
        training: how it is trained.
        schema: the pipeline's schema.
        device: this rank's device.
        plan_path: where the sharding plan is stored.
    """

    def __init__(
        self, config: LearnerConfig, training: TrainingConfig, schema: Schema, device: torch.device, plan_path: Path
    ) -> None:
        self.config, self.training, self.schema, self.device = config, training, schema, device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        if device.type == "cpu":
            train_fast_here()
        torch.manual_seed(config.seed)
        model = build_model(config.model, schema, config.tasks, embedding_device=torch.device("meta"))
        objectives = build_objectives(config.objectives, schema, config.tasks, model.representation_dim)
        module = TrainModule(model, objectives, bf16=training.precision == "bf16")
        self._drops = has_dropout(module)
        fuse_table_optimizers(module, training, schema.tables)
        placement = stored_placement(plan_path, module, training, self.world, write=self.rank == 0)
        self.carried = carried(placement, training)
        """Table of a collection -> what loading a checkpoint of this learner depends on."""
        unsharded = collections(module)
        self._table_std = {
            weight_name(path, collection, table.name): _init_std(table)
            for path, collection in unsharded.items()
            for table in table_configs(collection)
        }
        ahead_parameters = module.pre_step_parameters()
        ahead = {name: p for name, p in module.named_parameters() if any(p is q for q in ahead_parameters)}
        self.dmp = DistributedModelParallel(
            module,
            env=ShardingEnv.from_process_group(dist.group.WORLD),
            device=device,
            plan=sharding_plan(module, placement, self.world, device, training),
            sharders=sharders(),
            data_parallel_wrapper=_Alone()
            if self.world == 1
            else DefaultDataParallelWrapper(static_graph=True, params_to_ignore=list(ahead)),
        )
        self.module: TrainModule = self.dmp.module
        self._initialise_tables()
        replicated = {
            weight_name(path, unsharded[path], table): table
            for path, tables in placement.items()
            for table, where in tables.items()
            if where.kind == "data_parallel"
        }
        dense, tables = {}, {}
        for name, parameter in self.dmp.named_parameters():
            if name in replicated:
                tables[name] = (parameter, training.optimizer_of(replicated[name]))
            elif name not in ahead and name not in self._table_std:
                dense[name] = parameter
        self.optimizers = Optimizers(self.dmp, dense, tables, ahead, training)
        self._ahead = list(ahead.values())
        positions = [schema.traffics.index(name) for name in config.traffics]
        self._traffics = torch.tensor(positions, device=device) if positions else None
        self.clock = StepClock()
        self._losses = LossWatch(training.divergence)

    @torch.no_grad()
    def _initialise_tables(self) -> None:
        for name, value in self.dmp.state_dict().items():
            if name in self._table_std:
                for shard, row, column in local_shards(value):
                    table = name.split(".")[-2]
                    fill_normal(shard, table, self.config.seed, self._table_std[name], row, column, value.shape[1])

    def reset_rows(self, table: str, rows_K: IntArray) -> None:
        """Rows of a table, where the model reads it, as they were before training, what optimisers remember too."""
        names = [name for name in self._table_std if name.split(".")[-2] == table]
        if not names or not len(rows_K):
            return
        weights, state = self.dmp.state_dict(), self.optimizers.combined().state_dict()["state"]
        for name in names:
            reset_rows(weights, state, name, rows_K, self.config.seed, self._table_std[name])
        if self.training.on_host:
            forget_caches(self.module)

    def own_rows(self, batch: Batch) -> Tensor | None:
        """bool ``[B]``: the rows of this learner's traffics; None for all."""
        return None if self._traffics is None else torch.isin(batch.traffic, self._traffics.to(batch.traffic.device))

    def train_step(self, batch: Batch, step: int) -> dict[str, tuple[float, float]]:
        """One step: zero_grad, forward, one summed backward, step.

        Returns:
            Term -> (weighted sum, weight) over all ranks.

        Raises:
            DivergenceError: a term is not finite, or has exploded. Nothing was changed by the step.
        """
        started = time.perf_counter()
        with denormals_as_zero():
            self.begin(step)
            loss, terms = self.forward(batch, step)
            forward = time.perf_counter()
            loss.backward()
            backward = time.perf_counter()
            self.optimizers.step()
        done = time.perf_counter()
        self.clock.forward += forward - started
        self.clock.backward += backward - forward
        self.clock.optimizer += done - backward
        return terms

    def begin(self, step: int) -> None:
        """Make ready for a step: training mode, the step's learning rates, no gradients."""
        if not self.dmp.training:  # setting it walks through every module, a tenth of a small model's step
            self.dmp.train()
        self.optimizers.begin(step)

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, tuple[float, float]]]:
        """This rank's share of the loss, and the terms as `train_step` returns and refuses them."""
        if self.config.lost_labels is not None:
            batch = lose_labels(batch, self.config.lost_labels, self.schema)
        own = self.own_rows(batch)
        if own is not None:
            # Others' rows stay in the batch, so that every learner of the group reads the same one; they weigh nothing.
            batch = dataclasses.replace(batch, weight=batch.weight * own)
        masks = step_masks(self.config.seed, step, self.rank, self.device) if self._drops else nullcontext()
        with masks:
            if self._ahead:
                self._pre_step(batch)
            sums = self.dmp(batch)
        totals = self._reduce(sums)
        loss = self._loss(sums, totals)
        terms = {name: (total[0], total[1]) for name, total in zip(sums, totals.tolist(), strict=True)}
        self._check(terms, batch, step)
        return loss, terms

    def _check(self, terms: dict[str, tuple[float, float]], batch: Batch, step: int) -> None:
        """Raises DivergenceError where a term is not finite or has exploded: on every rank, since all have its sums."""
        for name, (total, weight) in terms.items():
            if not (math.isfinite(total) and math.isfinite(weight)):
                what = f"term {name} is not finite at step {step}"
            elif ratio := self._losses.exploded(name, total, weight):
                assert self.training.divergence is not None
                what = (
                    f"term {name} is {ratio:.3g} times its mean over the {self.training.divergence.window} steps "
                    f"before step {step}"
                )
            else:
                continue
            raise DivergenceError(
                f"{self.config.key}: {what}: {diagnose(self.dmp.state_dict(), batch, self.schema)}; lower the "
                "learning rate, add warmup_steps or dense.clippy, or look for extreme values in the features"
            )

    def _reduce(self, sums: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """(weighted sum, weight) of each term over all ranks: ``[terms, 2]``."""
        totals = torch.stack([torch.stack(pair).detach().double() for pair in sums.values()])
        if self.world > 1:
            dist.all_reduce(totals)
        return totals

    def _loss(self, sums: dict[str, tuple[Tensor, Tensor]], totals: Tensor) -> Tensor:
        """This rank's share of the loss.

        Gradients are averaged over ranks (DDP, and TorchRec's gradient division), so the share is multiplied by the
        number of ranks.
        """
        weights = totals[:, 1].clamp_min(1e-12).float()
        terms = [
            self.module.coefficients[name] * weighted_sum / weights[position]
            for position, (name, (weighted_sum, _)) in enumerate(sums.items())
        ]
        return self.world * torch.stack(terms).sum()

    def _pre_step(self, batch: Batch) -> None:
        """Algorithm 1, line 1 (ExFM): the adapter learns first, by its own optimiser, gradients summed over ranks."""
        optimizer = self.optimizers.ahead
        assert optimizer is not None
        optimizer.zero_grad(set_to_none=False)
        sums = self.module.pre_step(batch)
        totals = self._reduce(sums)
        weights = totals[:, 1].clamp_min(1e-12).float()
        loss = torch.stack([s / weights[i] for i, (s, _) in enumerate(sums.values())]).sum()
        loss.backward(inputs=self._ahead)
        if self.world > 1:
            for parameter in self._ahead:
                dist.all_reduce(parameter.grad)
        optimizer.step()

    @torch.no_grad()
    def predict(self, batch: Batch) -> ModelOutput:
        """The model's output, without gradients."""
        self.dmp.eval()
        output: ModelOutput = self.module.predict(batch)
        return output

    def state(self) -> dict[str, Any]:
        """Model and optimiser state for `torch.distributed.checkpoint`.

        What has no state (a table under SGD) is left out: whether TorchRec names it depends on what else its rank has.
        """
        optimizer = self.optimizers.combined().state_dict()
        held = {name: state for name, state in optimizer["state"].items() if state}
        return {"model": self.dmp.state_dict(), "optimizer": {**optimizer, "state": held}}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over a state that `torch.distributed.checkpoint` filled."""
        self.dmp.load_state_dict(state["model"])
        optimizer = self.optimizers.combined()
        named: dict[str, Any] = {name: {} for name in optimizer.state_dict()["state"]}
        optimizer.load_state_dict({**state["optimizer"], "state": named | state["optimizer"]["state"]})

    def slices(self) -> Iterator[TensorSlice]:
        """This rank's part of the model to publish: its table slices, and on rank 0 what is replicated."""
        for name, value in self.dmp.state_dict().items():
            if not name.startswith("model."):
                continue  # what objectives own is not served
            name = name.removeprefix("model.")
            if isinstance(value, ShardedTensor | DTensor):
                shape = tuple(value.shape)
                for shard, row, column in local_shards(value):
                    yield TensorSlice(name, shard, (row, column), shape)
            elif self.rank == 0:
                yield TensorSlice.whole(name, value)


class _Alone(DataParallelWrapper):  # type: ignore[misc]
    """Of one worker, which has nobody to reduce gradients with: DDP would copy them into buckets and back."""

    def wrap(self, dmp: DistributedModelParallel, env: ShardingEnv, device: torch.device) -> None:
        dmp._dmp_wrapped_module.to(device)


def _init_std(table: BaseEmbeddingConfig) -> float:
    """Standard deviation of a table's first values, from the partial that a model gave as ``init_fn``; 0 for zeros."""
    return float(table.init_fn.keywords["std"]) if isinstance(table.init_fn, functools.partial) else 0.0
