"""A distillation head of its own on the representation: what ``auxiliary_head`` and ``auxiliary_task`` share."""

from __future__ import annotations

from torch import Tensor, nn

from rayfm.data.batch import Batch
from rayfm.distill.base import Objective, Term
from rayfm.distill.losses import task_loss, weighted_term
from rayfm.distill.scaling import scale_gradient
from rayfm.distill.teacher import HeadConfig, distilled_tasks, teacher_label
from rayfm.models.base import ModelOutput
from rayfm.models.embeddings import require_module_names
from rayfm.models.mlp import Head
from rayfm.schema import Schema, Task


class HeadObjective(Objective):
    """``w * h(g(x), target(y_teacher))`` for each distilled task, with the gradient into x multiplied by beta."""

    config: HeadConfig

    def __init__(self, config: HeadConfig, schema: Schema, tasks: tuple[str, ...], representation_dim: int) -> None:
        super().__init__(config, schema, tasks, representation_dim)
        self.distilled = distilled_tasks(config, schema, config.allowed(schema, tasks))
        require_module_names("task", [task.name for task in self.distilled])
        self.heads = nn.ModuleDict({task.name: Head(representation_dim, config.hidden) for task in self.distilled})

    def target(self, task: Task, label: Tensor) -> Tensor:
        """What the head learns of the teacher's prediction, ``[B] -> [B]``."""
        return label

    def forward(self, batch: Batch, output: ModelOutput) -> dict[str, Term]:
        representation_BH = scale_gradient(output.representation, self.config.gradient_scale)
        terms = {}
        for task in self.distilled:
            label, mask = teacher_label(batch, self.config, task.name)
            loss = task_loss(task, self.heads[task.name](representation_BH), self.target(task, label))
            terms[task.name] = weighted_term(loss, batch.weight, mask, self.config.weight)
        return terms
