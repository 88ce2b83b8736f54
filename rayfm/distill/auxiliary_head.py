"""The auxiliary head (ExFM section 3.3, Eq. 3 to 5): the teacher's prediction has a head of its own."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import nn

from rayfm.data.batch import Batch
from rayfm.distill.base import OBJECTIVES, Objective, Term
from rayfm.distill.losses import task_loss, weighted_term
from rayfm.distill.scaling import scale_gradient, scale_label
from rayfm.distill.teacher import HeadConfig, distilled_tasks, teacher_label
from rayfm.models.base import ModelOutput
from rayfm.models.embeddings import require_module_names
from rayfm.models.mlp import Head
from rayfm.schema import Schema


@OBJECTIVES.register("auxiliary_head")
class AuxiliaryHead(Objective):
    """``w * h(psi(x), min(alpha * y_teacher, 1))``, with the gradient into x multiplied by beta.

    The serving head gets no gradient from it, so that a teacher's bias reaches it only through the shared backbone.
    The head may distil tasks that the student does not serve. Label scaling is for probabilities: regressions keep
    the teacher's value and are fitted by squared error.
    """

    class Config(HeadConfig):
        """The teacher, and the three scalings of section 3.3 (``weight``, ``label_scale``, ``gradient_scale``)."""

        type: Literal["auxiliary_head"] = "auxiliary_head"
        label_scale: float = Field(1.0, gt=0)
        """Factor of the teacher's probability before it is clipped to 1 (ExFM's alpha)."""

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
            if task.kind == "binary":
                label = scale_label(label, self.config.label_scale)
            loss = task_loss(task, self.heads[task.name](representation_BH), label)
            terms[task.name] = weighted_term(loss, batch.weight, mask, self.config.weight)
        return terms
