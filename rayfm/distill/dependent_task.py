"""The dependent task of SSLFM (UKDSL section 4.3, Fig. 6): a task on top of the main task's output."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import nn

from rayfm.data.batch import Batch
from rayfm.distill.base import OBJECTIVES, Objective, Term
from rayfm.distill.losses import task_loss, weighted_term
from rayfm.distill.scaling import scale_gradient
from rayfm.distill.student_adapter import Adapter
from rayfm.distill.teacher import TeacherConfig, distilled_tasks, teacher_label
from rayfm.models.base import ModelOutput
from rayfm.models.embeddings import require_module_names
from rayfm.schema import Schema


@OBJECTIVES.register("dependent_task")
class DependentTask(Objective):
    """``w * h(d(z), y_teacher)`` on unlabelled rows: d maps the serving logit z to the teacher's prediction.

    Its gradient runs through z into the serving head and everything below, while d takes up what differs between the
    teacher's scale and the labels'. d starts as the identity. ``auxiliary_task`` beside it is the paper's best variant.
    """

    class Config(TeacherConfig):
        """The teacher, and the head on the main task's output."""

        type: Literal["dependent_task"] = "dependent_task"
        rows: Literal["unlabelled"] = "unlabelled"
        """Always the rows whose true label is not known: considerations, and impressions still without a label."""
        hidden: tuple[int, ...] = Field((8,), min_length=1)
        """Hidden widths of the head."""
        gradient_scale: float = Field(1.0, ge=0)
        """Factor of the gradient from the head into the serving logit."""

    config: Config

    def __init__(self, config: Config, schema: Schema, tasks: tuple[str, ...], representation_dim: int) -> None:
        super().__init__(config, schema, tasks, representation_dim)
        self.distilled = distilled_tasks(config, schema, config.allowed(schema, tasks))
        names = [task.name for task in self.distilled]
        require_module_names("task", names)
        self.heads = nn.ModuleDict({name: Adapter(config.hidden) for name in names})

    def forward(self, batch: Batch, output: ModelOutput) -> dict[str, Term]:
        terms = {}
        for task in self.distilled:
            label, mask = teacher_label(batch, self.config, task.name)
            logit = self.heads[task.name](scale_gradient(output.logits[task.name], self.config.gradient_scale))
            terms[task.name] = weighted_term(task_loss(task, logit, label), batch.weight, mask, self.config.weight)
        return terms
