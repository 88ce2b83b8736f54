"""The module that DistributedModelParallel wraps: a model with its objectives."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from rayfm.data.batch import Batch
from rayfm.distill.base import Objective, Term
from rayfm.models.base import Model, ModelOutput


class TrainModule(nn.Module):
    """``Batch -> {term: (weighted sum, weight)}``, each a scalar of this rank's rows.

    The loop divides by the weights summed over all ranks, so that 1 and N workers have the same loss.

    Args:
        model: the model that will serve.
        objectives: the terms of its loss, the tasks' own loss among them. What they own is not exported.
        bf16: run the model, and the hidden layers of the objectives' heads, under bfloat16 autocast. Objectives are
            given the representation in bfloat16; logits and losses are always float32.
    """

    def __init__(self, model: Model, objectives: Sequence[Objective], bf16: bool = False) -> None:
        super().__init__()
        self.model = model
        self.objectives = nn.ModuleList(objectives)
        self.bf16 = bf16
        self.coefficients: dict[str, float] = {}
        """Term -> its factor in the loss, known after the first forward."""

    def predict(self, batch: Batch) -> ModelOutput:
        """The model's output in float32."""
        with self._autocast(batch):
            output: ModelOutput = self.model(batch)
        if not self.bf16:
            return output
        return ModelOutput(
            output.representation.float(), {task: logit.float() for task, logit in output.logits.items()}
        )

    def forward(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        output = self.predict(batch)
        if self.bf16:  # rounded once, not once for each head
            output = ModelOutput(output.representation.bfloat16(), output.logits)
        sums: dict[str, tuple[Tensor, Tensor]] = {}
        with self._autocast(batch):
            for position, objective in enumerate(self.objectives):
                sums |= self._flatten(position, objective(batch, output))
        return sums

    def _autocast(self, batch: Batch) -> AbstractContextManager[object]:
        return torch.autocast(batch.example_id.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def pre_step(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """The terms of what learns before the student does, by the same names and rules."""
        sums: dict[str, tuple[Tensor, Tensor]] = {}
        for position, objective in enumerate(self.objectives):
            terms = objective.pre_step(batch)  # type: ignore[operator]
            sums |= self._flatten(position, terms or {})
        return sums

    def pre_step_parameters(self) -> list[nn.Parameter]:
        """Parameters that only ``pre_step`` trains."""
        return [p for objective in self.objectives for p in objective.pre_step_parameters()]  # type: ignore[operator]

    def _flatten(self, position: int, terms: dict[str, Term]) -> dict[str, tuple[Tensor, Tensor]]:
        config = self.objectives[position].config
        prefix = getattr(config, "name", None) or getattr(config, "type", type(self.objectives[position]).__name__)
        sums = {}
        for name, term in terms.items():
            key = f"{prefix}/{name}"
            self.coefficients[key] = term.coefficient
            sums[key] = (term.weighted_sum, term.weight)
        return sums
