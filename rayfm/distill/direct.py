"""Direct distillation (ExFM Eq. 2): the serving head learns the true label and the teacher's prediction alike."""

from __future__ import annotations

from typing import Literal

from rayfm.data.batch import Batch
from rayfm.distill.base import OBJECTIVES, Objective, Term
from rayfm.distill.losses import task_loss, weighted_term
from rayfm.distill.teacher import TeacherConfig, distilled_tasks, teacher_label
from rayfm.models.base import ModelOutput
from rayfm.schema import Schema


@OBJECTIVES.register("direct")
class Direct(Objective):
    """``h(y_serving, y_teacher)``, the second term of Eq. 2; ``supervised`` is the first.

    The teacher's bias reaches the serving head (ExFM theorem 3.1): it is the baseline that ``auxiliary_head`` improves
    on, and the one objective that teaches the serving head on rows without labels.
    """

    class Config(TeacherConfig):
        """The teacher, and what of it is distilled."""

        type: Literal["direct"] = "direct"

    config: Config

    def __init__(self, config: Config, schema: Schema, tasks: tuple[str, ...], representation_dim: int) -> None:
        super().__init__(config, schema, tasks, representation_dim)
        self.distilled = distilled_tasks(config, schema, tasks)

    def forward(self, batch: Batch, output: ModelOutput) -> dict[str, Term]:
        terms = {}
        for task in self.distilled:
            label, mask = teacher_label(batch, self.config, task.name)
            loss = task_loss(task, output.logits[task.name], label)
            terms[task.name] = weighted_term(loss, batch.weight, mask, self.config.weight)
        return terms
