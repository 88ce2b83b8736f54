"""How tasks share what a backbone learns, and the heads that make their logits.

Sources: Caruana, Multitask Learning, Machine Learning 28, 1997 (hard-shared bottom); Ma et al., Modeling Task
Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts, KDD 2018, section 4.2, Eq. 6 to 8 (MMoE).

Shape letters: B examples, H width of the representation, T tasks, X experts, W width of an expert's output.
"""

from __future__ import annotations

import graphlib
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from rayfm.config import Config, ConfigError, nearest
from rayfm.models.embeddings import require_module_names
from rayfm.models.mlp import MLP, Head, full_precision, per_task
from rayfm.models.scaling import Widths


class MultiTaskConfig(Config):
    """Which task's logit another one reads: what every way of sharing has."""

    depends_on: dict[str, str | tuple[str, ...]] = {}
    """Task -> the task or tasks whose logit (a regression's value) its head also reads."""
    detach: bool = True
    """Stop the gradient into the logit that another head reads, so that only its own task's loss shapes it."""

    @model_validator(mode="after")
    def _no_circle(self) -> MultiTaskConfig:
        evaluation_order(tuple(self.depends_on), self)
        return self

    def upstream(self, task: str) -> tuple[str, ...]:
        """The tasks whose logits the head of ``task`` reads."""
        found = self.depends_on.get(task, ())
        return (found,) if isinstance(found, str) else found

    def check(self, tasks: tuple[str, ...]) -> None:
        """Refuse dependencies of or on tasks that a model does not predict.

        Raises:
            ConfigError: naming the task.
        """
        for task in self.depends_on:
            for name in (task, *self.upstream(task)):
                if name not in tasks:
                    raise ConfigError(
                        f"multi_task.depends_on: {name!r} is not a task of the model{nearest(name, list(tasks))}"
                    )


class SharedBottomConfig(MultiTaskConfig):
    """Every task's head reads the representation itself."""

    type: Literal["shared"] = "shared"


class MixtureOfExpertsConfig(MultiTaskConfig):
    """Every task's head reads its own mixture of experts that read the representation (MMoE)."""

    type: Literal["mmoe"] = "mmoe"
    experts: int = Field(4, ge=2)
    """X. A model's ``scale`` leaves it as it is."""
    expert_hidden: Widths = Field((64,), min_length=1)
    """Widths of each expert's layers."""


MultiTask = Annotated[SharedBottomConfig | MixtureOfExpertsConfig, Field(discriminator="type")]


def evaluation_order(tasks: tuple[str, ...], config: MultiTaskConfig) -> tuple[str, ...]:
    """``tasks`` and what they depend on, each after the tasks whose logits it reads.

    Raises:
        ValueError: tasks depend on one another in a circle.
    """
    graph = {task: config.upstream(task) for task in tasks}
    try:
        return tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        circle = " -> ".join(reversed(error.args[1]))
        raise ValueError(f"depends_on goes in a circle ({circle}); leave one of them out") from None


def mix_experts(gates_BTX: Tensor, experts_BXW: Tensor) -> Tensor:
    """``f^k(x) = sum_i g^k(x)_i f_i(x)`` (MMoE, Eq. 7): ``[B, T, X], [B, X, W] -> [B, T, W]``."""
    return torch.bmm(gates_BTX, experts_BXW)


class MixtureOfExperts(nn.Module):
    """One mixture of shared experts for each task (MMoE): ``[B, H] -> [B, T, W]``.

    Args:
        in_dim: H.
        num_tasks: T.
        experts: X.
        hidden: widths of an expert's layers, the last of them W.

    Attributes:
        out_dim: W.
    """

    def __init__(self, in_dim: int, num_tasks: int, experts: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.experts = nn.ModuleList(MLP(in_dim, hidden) for _ in range(experts))
        self.gate = nn.Linear(in_dim, num_tasks * experts, bias=False)
        """W_g of all tasks, one below the other."""
        self.out_dim = hidden[-1]

    def gates(self, x_BH: Tensor) -> Tensor:
        """``g^k(x) = softmax(W_gk x)`` (MMoE, Eq. 8): ``[B, T, X]``, float32."""
        scores_BTX: Tensor = self.gate(x_BH).unflatten(1, (self.num_tasks, len(self.experts)))
        return scores_BTX.float().softmax(dim=2)

    def forward(self, x_BH: Tensor) -> Tensor:
        return mix_experts(self.gates(x_BH), torch.stack([expert(x_BH) for expert in self.experts], dim=1))


class TaskHeads(nn.Module):
    """The serving heads: ``[B, H] -> {task: [B]}``, float32 also under autocast.

    A head that depends on other tasks reads their logits beside its other input.

    Args:
        in_dim: H.
        tasks: the tasks, each with a head.
        hidden: widths of each head's own hidden layers. Without any, and without experts and dependencies, the heads
            are one matrix, so that the representation is read once for all tasks.
        sharing: what lies between the representation and the heads; by default nothing.

    Raises:
        ConfigError: a dependency of or on something that is not a task, or a task's name that PyTorch cannot take.

    Example::

        >>> import torch
        >>> heads = TaskHeads(6, ("click", "buy"), sharing=MixtureOfExpertsConfig(depends_on={"buy": "click"}))
        >>> logits = heads(torch.rand(3, 6))
        >>> logits["buy"].shape
        torch.Size([3])
    """

    def __init__(
        self, in_dim: int, tasks: tuple[str, ...], hidden: tuple[int, ...] = (), sharing: MultiTaskConfig | None = None
    ) -> None:
        super().__init__()
        sharing = sharing or SharedBottomConfig()
        sharing.check(tasks)
        self.tasks, self.detach = tasks, sharing.detach
        self.order = evaluation_order(tasks, sharing)
        self.upstream = {task: sharing.upstream(task) for task in tasks}
        self.mixture: MixtureOfExperts | None = None
        if isinstance(sharing, MixtureOfExpertsConfig):
            self.mixture = MixtureOfExperts(in_dim, len(tasks), sharing.experts, sharing.expert_hidden)
            in_dim = self.mixture.out_dim
        one_matrix = not hidden and self.mixture is None and not sharing.depends_on
        self.linear = nn.Linear(in_dim, len(tasks)) if one_matrix else None
        self.towers: nn.ModuleDict | None = None
        if not one_matrix:
            require_module_names("task", list(tasks))
            self.towers = nn.ModuleDict({task: Head(in_dim + len(self.upstream[task]), hidden) for task in tasks})

    def forward(self, representation_BH: Tensor, offsets: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Logits by task, in the tasks' order.

        Args:
            representation_BH: what the tasks share.
            offsets: task -> ``[B]`` that its logit has besides (a factorization machine's), before others read it.
        """
        if self.linear is not None:
            with full_precision(representation_BH):
                logits = per_task(self.linear(representation_BH.float()), self.tasks)
            return logits if offsets is None else {task: offsets[task] + logit for task, logit in logits.items()}
        assert self.towers is not None
        inputs = dict.fromkeys(self.tasks, representation_BH)
        if self.mixture is not None:
            inputs = dict(zip(self.tasks, self.mixture(representation_BH).unbind(dim=1), strict=True))
        logits = {}
        for task in self.order:
            read = [logits[name].detach() if self.detach else logits[name] for name in self.upstream[task]]
            columns = [inputs[task], *(logit.unsqueeze(1) for logit in read)]
            logit = self.towers[task](torch.cat(columns, dim=1) if read else inputs[task])
            logits[task] = logit if offsets is None else offsets[task] + logit
        return {task: logits[task] for task in self.tasks}
