"""The student adapter (ExFM section 3.4, Eq. 6 and 7, Algorithm 1): the teacher's prediction, corrected as labels come.

Shape letters: B examples.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from rayfm.data.batch import Batch
from rayfm.distill.base import OBJECTIVES, Objective, Term
from rayfm.distill.losses import task_loss, weighted_term
from rayfm.distill.scaling import scale_gradient
from rayfm.distill.teacher import HeadConfig, distilled_tasks, teacher_label, teacher_score
from rayfm.models.base import ModelOutput
from rayfm.models.embeddings import require_module_names
from rayfm.models.mlp import Head, full_precision
from rayfm.schema import Schema, Task


class Adapter(nn.Module):
    """``z + MLP(z)`` on one number, ``[B] -> [B]``; the MLP starts at zero, so that it first returns the teacher's.

    The paper's adapter is an MLP of the teacher's prediction; the residual keeps its first labels from being noise.

    Args:
        hidden: widths of the hidden layers.
    """

    def __init__(self, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.correction = Head(1, hidden)
        nn.init.zeros_(self.correction.output.weight)
        nn.init.zeros_(self.correction.output.bias)

    def forward(self, z: Tensor) -> Tensor:
        with full_precision(z):
            correction: Tensor = self.correction(z.unsqueeze(1))
            return z + correction


@OBJECTIVES.register("student_adapter")
class StudentAdapter(Objective):
    """An adapter learns the true labels from the teacher's predictions, then its output is a label for the student.

    One iteration is Algorithm 1: ``pre_step`` gives the adapter's loss (Eq. 6) on rows with both a true label and
    supervision; the loop updates the adapter; ``forward`` takes the updated adapter's output as a constant and gives
    the loss of a distillation head of its own (Eq. 7), on labelled and unlabelled rows. The adapter is fed the
    supervision alone, and it works on logits: the sigmoid of its output is the label.

    With ``auxiliary_head`` beside it in the list of objectives, the loss is the paper's full one (Algorithm 1, line 3).
    For a regression the adapter maps a value to a value, and both losses are squared errors.
    """

    class Config(HeadConfig):
        """The teacher, the head and the adapter."""

        type: Literal["student_adapter"] = "student_adapter"
        adapter: tuple[int, ...] = Field((16,), min_length=1)
        """Hidden widths of the adapter."""

    config: Config

    def __init__(self, config: Config, schema: Schema, tasks: tuple[str, ...], representation_dim: int) -> None:
        super().__init__(config, schema, tasks, representation_dim)
        self.distilled = distilled_tasks(config, schema, config.allowed(schema, tasks))
        names = [task.name for task in self.distilled]
        require_module_names("task", names)
        self.heads = nn.ModuleDict({name: Head(representation_dim, config.hidden) for name in names})
        self.adapters = nn.ModuleDict({name: Adapter(config.adapter) for name in names})

    def pre_step(self, batch: Batch) -> dict[str, Term]:
        terms = {}
        for task in self.distilled:
            prediction, supervised = batch.supervised(f"{self.config.teacher}/{task.name}")
            label, labelled = batch.label(task.name)
            loss = task_loss(task, self._adapt(task, prediction), label)
            terms[f"adapter/{task.name}"] = weighted_term(loss, batch.weight, labelled & supervised)
        return terms

    def pre_step_parameters(self) -> list[nn.Parameter]:
        return list(self.adapters.parameters())

    def forward(self, batch: Batch, output: ModelOutput) -> dict[str, Term]:
        representation_BH = scale_gradient(output.representation, self.config.gradient_scale)
        terms = {}
        for task in self.distilled:
            prediction, mask = teacher_label(batch, self.config, task.name)
            with torch.no_grad():  # SG in Eq. 7
                label = self._adapt(task, prediction)
                if task.kind == "binary":
                    label = label.sigmoid()
            loss = task_loss(task, self.heads[task.name](representation_BH), label)
            terms[f"adapted/{task.name}"] = weighted_term(loss, batch.weight, mask, self.config.weight)
        return terms

    def _adapt(self, task: Task, prediction: Tensor) -> Tensor:
        """The adapter's output for a teacher's prediction: a logit for a binary task; ``[B]``."""
        adapted: Tensor = self.adapters[task.name](teacher_score(task, prediction))
        return adapted
