"""The tasks' own losses on true labels (ExFM Eq. 3): every student and teacher has them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rayfm.config import ConfigError, nearest
from rayfm.data.batch import Batch
from rayfm.distill.base import OBJECTIVES, Objective, ObjectiveConfig, Term
from rayfm.distill.losses import task_loss, weighted_term
from rayfm.distill.rows import traffic_mask, traffic_positions
from rayfm.models.base import ModelOutput
from rayfm.schema import Schema


@OBJECTIVES.register("supervised")
class Supervised(Objective):
    """One term a task, over the rows whose label is known, each with its sampling weight.

    A model has it without being told. It stands in a list of objectives only to learn from some traffics alone: it
    then takes the place of the default. (SEAD section 3 trains the serving head of a teacher so, on the traffic whose
    labels are unbiased, and an auxiliary head on the traffic that a privacy policy affects.)
    """

    class Config(ObjectiveConfig):
        """What is learnt, and where; a task's weight stands with the task."""

        type: Literal["supervised"] = "supervised"
        tasks: tuple[str, ...] | None = None
        """Tasks that it is for, by default the model's; the others keep the default term."""
        traffics: tuple[str, ...] | None = Field(None, min_length=1)
        """Traffics whose rows are learnt from, by default all."""

        def replaces_supervised(self, tasks: tuple[str, ...]) -> tuple[str, ...]:
            return tasks if self.tasks is None else self.tasks

        def check(self, schema: Schema, tasks: tuple[str, ...]) -> None:
            for task in self.tasks or ():
                if task not in tasks:
                    raise ConfigError(
                        f"objective {self.label!r}: the model has no task {task!r}{nearest(task, list(tasks))}"
                    )
            traffic_positions(self.label, self.traffics, schema)

    config: Config

    def __init__(self, config: Config, schema: Schema, tasks: tuple[str, ...], representation_dim: int) -> None:
        super().__init__(config, schema, tasks, representation_dim)
        config.check(schema, tasks)
        self.learnt = [schema.task(name) for name in config.replaces_supervised(tasks)]
        self.traffics = traffic_positions(config.label, config.traffics, schema)

    def forward(self, batch: Batch, output: ModelOutput) -> dict[str, Term]:
        terms = {}
        for task in self.learnt:
            label, mask = batch.label(task.name)
            if self.traffics is not None:
                mask = mask & traffic_mask(batch, self.traffics)
            loss = task_loss(task, output.logits[task.name], label)
            terms[task.name] = weighted_term(loss, batch.weight, mask, task.weight)
        return terms
