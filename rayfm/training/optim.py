"""Optimisers: fused ones for the tables, Adam or Adagrad for the rest, with or without Clippy; one warm-up for all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from rayfm.config import ConfigError, nearest
from rayfm.training.clippy import ClippyAdagrad, ClippyAdam
from rayfm.training.config import DenseOptimizer, TableOptimizer, TrainingConfig
from rayfm.training.sharding import collections, table_configs, weight_name

_FUSED: dict[str, type[torch.optim.Optimizer]] = {
    "rowwise_adagrad": RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
}


def fuse_table_optimizers(module: nn.Module, config: TrainingConfig, known: Iterable[str]) -> None:
    """Attach the fused optimisers to the tables of an unsharded module; the sharded one steps them in its backward.

    Args:
        module: the module.
        config: how it is trained.
        known: the schema's tables. Models of one group share a config, so an override may be for another one's table.

    Raises:
        ConfigError: an override names a table that is not known.
    """
    known = list(known)
    for name in (*config.table_overrides, *config.sharding_overrides, *config.table_memory_overrides):
        if name not in known:
            raise ConfigError(f"training override for table {name!r}, which is not in the schema{nearest(name, known)}")
    for path, collection in collections(module).items():
        for table in table_configs(collection):
            optimizer = config.optimizer_of(table.name)
            if optimizer.type == "adam":
                continue
            weight = module.get_parameter(weight_name(path, collection, table.name))
            _apply_optimizer_in_backward(_FUSED[optimizer.type], [weight], _arguments(optimizer))


def _arguments(optimizer: TableOptimizer) -> dict[str, Any]:
    return {"lr": optimizer.lr} if optimizer.type == "sgd" else {"lr": optimizer.lr, "eps": optimizer.eps}


def dense_optimizer(parameters: list[nn.Parameter], config: DenseOptimizer) -> torch.optim.Optimizer:
    """The optimiser of parameters that every rank holds whole.

    Their gradients are reduced over the ranks before it steps, so Clippy's factors are the same on all of them.
    """
    shared: dict[str, Any] = {"lr": config.lr, "eps": config.eps, "weight_decay": config.weight_decay, "foreach": True}
    if config.type == "adagrad":
        shared["initial_accumulator_value"] = config.initial_accumulator
    else:
        shared["betas"] = config.betas
    if config.clippy is None:
        return (torch.optim.Adagrad if config.type == "adagrad" else torch.optim.Adam)(parameters, **shared)
    clipped = ClippyAdagrad if config.type == "adagrad" else ClippyAdam
    return clipped(parameters, relative=config.clippy.relative, absolute=config.clippy.absolute, **shared)


class Optimizers:
    """The optimisers of one sharded module, stepped together.

    fbgemm takes a fused learning rate at ``zero_grad`` and captures it in the forward, so the order within a step is
    ``begin`` (sets the rates, clears gradients), forward, backward, ``step``.

    Args:
        dmp: the sharded module.
        dense: its parameters that are no fused table and not ``ahead``.
        ahead: parameters that only ``pre_step`` trains.
        config: the training's config.
    """

    def __init__(
        self,
        dmp: nn.Module,
        dense: dict[str, nn.Parameter],
        replicated_tables: dict[str, tuple[nn.Parameter, TableOptimizer]],
        ahead: dict[str, nn.Parameter],
        config: TrainingConfig,
    ) -> None:
        self.config = config
        self.fused: Any = dmp.fused_optimizer
        self._dense: dict[str, KeyedOptimizerWrapper] = {}
        if dense:
            self._dense["dense"] = KeyedOptimizerWrapper(dense, lambda p: dense_optimizer(p, config.dense))
        for name, (parameter, table) in replicated_tables.items():
            adam = config.dense.model_copy(
                update={"type": "adam", "lr": table.lr, "eps": table.eps, "clippy": table.clippy}
            )
            self._dense[f"table.{name}"] = KeyedOptimizerWrapper(
                {name: parameter}, lambda p, adam=adam: dense_optimizer(p, adam)
            )
        self.ahead = KeyedOptimizerWrapper(ahead, lambda p: dense_optimizer(p, config.dense)) if ahead else None
        self._rates = [
            (group, float(group["lr"]))
            for optimizer in (self.fused, *self._dense.values(), *([self.ahead] if self.ahead else []))
            for group in optimizer.param_groups
        ]

    def warmup(self, step: int) -> float:
        """Factor of the learning rates at a step (0, 1, ...): rises linearly to 1 over the warm-up."""
        return min(1.0, (step + 1) / self.config.warmup_steps) if self.config.warmup_steps else 1.0

    def begin(self, step: int) -> None:
        """Set the rates of this step and clear the gradients. Call before the forward."""
        factor = self.warmup(step)
        for group, rate in self._rates:
            group["lr"] = rate * factor
        self.fused.zero_grad()
        for optimizer in self._dense.values():
            optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Apply the dense gradients (the fused tables stepped in the backward)."""
        for optimizer in self._dense.values():
            optimizer.step()

    def init_state(self) -> None:
        """Make the dense optimisers' state exist, as loading a checkpoint needs."""
        for optimizer in (*self._dense.values(), *([self.ahead] if self.ahead else [])):
            optimizer.init_state()

    def combined(self) -> CombinedOptimizer:
        """All of them as one keyed optimiser, for checkpoints."""
        ahead = [("ahead", self.ahead)] if self.ahead else []
        return CombinedOptimizer([self.fused, *self._dense.items(), *ahead])
