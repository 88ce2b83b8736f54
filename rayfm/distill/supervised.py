"""The tasks' own losses on true labels (ExFM Eq. 3): every student and teacher has them."""

from __future__ import annotations

from typing import Literal

from rayfm.data.batch import Batch
from rayfm.distill.base import OBJECTIVES, Objective, ObjectiveConfig, Term
from rayfm.distill.losses import task_loss, weighted_term
from rayfm.models.base import ModelOutput


@OBJECTIVES.register("supervised")
class Supervised(Objective):
    """One term a task, over the rows whose label is known, each with its sampling weight."""

    class Config(ObjectiveConfig):
        """Nothing to set: a task's weight stands with the task."""

        type: Literal["supervised"] = "supervised"

    def forward(self, batch: Batch, output: ModelOutput) -> dict[str, Term]:
        terms = {}
        for name in self.tasks:
            task = self.schema.task(name)
            label, mask = batch.label(name)
            terms[name] = weighted_term(task_loss(task, output.logits[name], label), batch.weight, mask, task.weight)
        return terms
