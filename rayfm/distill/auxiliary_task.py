"""The auxiliary task of SSLFM (UKDSL section 4.3, Fig. 6): a task on the shared representation."""

from __future__ import annotations

from typing import Literal

from torch import nn

from rayfm.data.batch import Batch
from rayfm.distill.base import OBJECTIVES, Objective, Term
from rayfm.distill.losses import task_loss, weighted_term
from rayfm.distill.scaling import scale_gradient
from rayfm.distill.teacher import HeadConfig, distilled_tasks, teacher_label
from rayfm.models.base import ModelOutput
from rayfm.models.embeddings import require_module_names
from rayfm.models.mlp import Head
from rayfm.schema import Schema


@OBJECTIVES.register("auxiliary_task")
class AuxiliaryTask(Objective):
    """``w * h(a(x), y_teacher)`` on unlabelled rows: a head on the representation x learns the teacher's prediction.

    Labelled rows teach the serving head and nothing else, which is what sets it apart from ``auxiliary_head``.
    """

    class Config(HeadConfig):
        """The teacher, and the head on the representation."""

        type: Literal["auxiliary_task"] = "auxiliary_task"
        rows: Literal["unlabelled"] = "unlabelled"
        """Always the rows whose true label is not known: considerations, and impressions still without a label."""

    config: Config

    def __init__(self, config: Config, schema: Schema, tasks: tuple[str, ...], representation_dim: int) -> None:
        super().__init__(config, schema, tasks, representation_dim)
        self.distilled = distilled_tasks(config, schema, config.allowed(schema, tasks))
        require_module_names("task", [task.name for task in self.distilled])
        self.heads = nn.ModuleDict({task.name: Head(representation_dim, config.hidden) for task in self.distilled})

    def forward(self, batch: Batch, output: ModelOutput) -> dict[str, Term]:
        representation_BH = scale_gradient(output.representation, self.config.gradient_scale)
        terms = {}
        for task in self.distilled:
            label, mask = teacher_label(batch, self.config, task.name)
            loss = task_loss(task, self.heads[task.name](representation_BH), label)
            terms[task.name] = weighted_term(loss, batch.weight, mask, self.config.weight)
        return terms
