"""What every objective that reads a teacher's predictions has in common.

A teacher's prediction is a probability for a binary task, and for a regression the value on the scale that students
train on (the task's transform applied).

Shape letters: B examples.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from rayfm.config import ConfigError, nearest
from rayfm.data.batch import Batch
from rayfm.distill.base import ObjectiveConfig
from rayfm.distill.rows import Rows, rows_mask
from rayfm.schema import Schema, Task

PROBABILITY_FLOOR = 1e-6
"""A teacher's probability is clipped to [floor, 1 - floor] before its logit is taken."""


class DistillationConfig(ObjectiveConfig):
    """The keys of every objective that distils tasks."""

    tasks: tuple[str, ...] | None = None
    """Tasks to distil, by default the student's."""
    weight: float = Field(1.0, ge=0)
    """Factor of the objective in the loss (ExFM's w)."""
    rows: Rows = "all"
    """Rows to distil on, of those that have supervision; ``unlabelled``: those whose true label is not known."""

    def distilled(self, tasks: tuple[str, ...]) -> tuple[str, ...]:
        """The tasks to distil, for a student with ``tasks``."""
        return tasks if self.tasks is None else self.tasks

    def allowed(self, schema: Schema, tasks: tuple[str, ...]) -> tuple[str, ...]:
        """Tasks that may be distilled into a student with ``tasks``: its own, where its serving heads learn."""
        return tasks

    def check(self, schema: Schema, tasks: tuple[str, ...]) -> None:
        distilled_tasks(self, schema, self.allowed(schema, tasks))


class TeacherConfig(DistillationConfig):
    """The keys of an objective with a teacher."""

    teacher: str
    """The teacher's name; its supervision columns are ``<teacher>/<task>``. ``logged/<model>`` for predictions that a
    production model logged."""

    def supervision(self, tasks: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(f"{self.teacher}/{task}" for task in self.distilled(tasks))


class HeadConfig(TeacherConfig):
    """The keys of an objective with a distillation head of its own on the representation."""

    hidden: tuple[int, ...] = (64,)
    """Hidden widths of the head (ExFM's psi), one a task."""
    gradient_scale: float = Field(1.0, ge=0)
    """Factor of the gradient from the head into the backbone (ExFM's beta)."""

    def allowed(self, schema: Schema, tasks: tuple[str, ...]) -> tuple[str, ...]:
        """A head of its own may learn any of the schema's tasks that is named."""
        return tasks if self.tasks is None else tuple(task.name for task in schema.tasks)


def teacher_score(task: Task, prediction: Tensor) -> Tensor:
    """A teacher's prediction on the scale of the student's output, a binary task's as a logit: ``[B] -> [B]``."""
    return torch.logit(prediction, eps=PROBABILITY_FLOOR) if task.kind == "binary" else prediction


def distilled_tasks(config: DistillationConfig, schema: Schema, known: tuple[str, ...]) -> list[Task]:
    """The schema's tasks that an objective distils.

    Args:
        config: the objective's config.
        schema: the pipeline's schema.
        known: tasks that may be named: the student's where its serving heads learn, else all of the schema's.

    Raises:
        ConfigError: a task is not among ``known``, or is named twice.
    """
    tasks = config.distilled(known)
    for task in tasks:
        if tasks.count(task) > 1:
            raise ConfigError(f"objective {vars(config)['type']!r}: task {task!r} stands twice; name it once")
        if task not in known:
            raise ConfigError(
                f"objective {vars(config)['type']!r}: it cannot distil task {task!r}{nearest(task, list(known))}"
            )
    return [schema.task(task) for task in tasks]


def teacher_label(batch: Batch, config: TeacherConfig, task: str) -> tuple[Tensor, Tensor]:
    """The teacher's prediction and the mask of the rows to distil on, each ``[B]``."""
    label, mask = batch.supervised(f"{config.teacher}/{task}")
    return label, mask if config.rows == "all" else mask & rows_mask(batch, config.rows, task)
