"""What every objective that reads a teacher's predictions has in common.

A teacher's prediction is a probability for a binary task, and for a regression the value on the scale that students
train on (the task's transform applied).

Shape letters: B examples.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from rayfm.config import ConfigError, nearest
from rayfm.data.batch import CONSIDERATION, IMPRESSION, Batch
from rayfm.distill.base import ObjectiveConfig
from rayfm.schema import Schema, Task

Rows = Literal["all", "impressions", "considerations", "unlabelled"]


class TeacherConfig(ObjectiveConfig):
    """The keys of an objective with a teacher."""

    teacher: str
    """The teacher's name; its supervision columns are ``<teacher>/<task>``. ``logged/<model>`` for predictions that a
    production model logged."""
    tasks: tuple[str, ...] | None = None
    """Tasks to distil, by default the student's."""
    weight: float = Field(1.0, ge=0)
    """Factor of the objective in the loss (ExFM's w)."""
    rows: Rows = "all"
    """Rows to distil on, of those that have supervision; ``unlabelled``: those whose true label is not known."""

    def distilled(self, tasks: tuple[str, ...]) -> tuple[str, ...]:
        """The tasks to distil, for a student with ``tasks``."""
        return tasks if self.tasks is None else self.tasks

    def supervision(self, tasks: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(f"{self.teacher}/{task}" for task in self.distilled(tasks))


class HeadConfig(TeacherConfig):
    """The keys of an objective with a distillation head of its own on the representation."""

    hidden: tuple[int, ...] = (64,)
    """Hidden widths of the head (ExFM's psi), one a task."""
    gradient_scale: float = Field(1.0, ge=0)
    """Factor of the gradient from the head into the backbone (ExFM's beta)."""


def distilled_tasks(config: TeacherConfig, schema: Schema, known: tuple[str, ...]) -> list[Task]:
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
    if config.rows == "impressions":
        mask = mask & (batch.kind == IMPRESSION)
    elif config.rows == "considerations":
        mask = mask & (batch.kind == CONSIDERATION)
    elif config.rows == "unlabelled":
        mask = mask & ~batch.label(task)[1]
    return label, mask
