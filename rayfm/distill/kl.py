"""Distillation of softened probabilities (Hinton, Vinyals, Dean 2015, section 2), for binary tasks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional

from rayfm.config import ConfigError
from rayfm.data.batch import Batch
from rayfm.distill.base import OBJECTIVES, Objective, Term
from rayfm.distill.losses import weighted_term
from rayfm.distill.teacher import TeacherConfig, distilled_tasks, teacher_label, teacher_score
from rayfm.models.base import ModelOutput
from rayfm.schema import Schema


def softened_kl(logit: Tensor, teacher_logit: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(s(z_t / T) || s(z_s / T))`` of two Bernoulli distributions, elementwise.

    T^2 keeps the size of the gradient when T changes (Hinton et al. 2015, section 2.1). At T = 1 the gradient is that
    of the cross-entropy with the teacher's probability; the value is less by the teacher's entropy, so 0 means equal.

    Args:
        logit: the student's z_s, ``[B]``.
        teacher_logit: z_t, ``[B]``.
        temperature: T > 0.
    """
    z_s, z_t = logit / temperature, teacher_logit / temperature
    positive, negative = functional.logsigmoid(z_t), functional.logsigmoid(-z_t)
    on_positive = positive.exp() * (positive - functional.logsigmoid(z_s))
    on_negative = negative.exp() * (negative - functional.logsigmoid(-z_s))
    return temperature**2 * (on_positive + on_negative)


@OBJECTIVES.register("kl")
class SoftenedKL(Objective):
    """The serving head learns the teacher's probability, both softened by a temperature.

    Like ``direct`` (its case of T = 1) it passes the teacher's bias on to the serving head. Above 1, rows that the
    teacher is sure of weigh less against the others.
    """

    class Config(TeacherConfig):
        """The teacher, and the temperature."""

        type: Literal["kl"] = "kl"
        temperature: float = Field(2.0, gt=0)
        """Both logits are divided by it."""

        def check(self, schema: Schema, tasks: tuple[str, ...]) -> None:
            super().check(schema, tasks)
            for task in distilled_tasks(self, schema, tasks):
                if task.kind != "binary":
                    raise ConfigError(
                        f"objective {self.label!r}: task {task.name!r} is a regression, which has no probability to "
                        "soften; name the binary tasks under 'tasks', and distil this one by 'direct'"
                    )

    config: Config

    def __init__(self, config: Config, schema: Schema, tasks: tuple[str, ...], representation_dim: int) -> None:
        super().__init__(config, schema, tasks, representation_dim)
        config.check(schema, tasks)
        self.distilled = distilled_tasks(config, schema, tasks)

    def forward(self, batch: Batch, output: ModelOutput) -> dict[str, Term]:
        terms = {}
        for task in self.distilled:
            prediction, mask = teacher_label(batch, self.config, task.name)
            loss = softened_kl(output.logits[task.name], teacher_score(task, prediction), self.config.temperature)
            terms[task.name] = weighted_term(loss, batch.weight, mask, self.config.weight)
        return terms
