"""The selector f(y, y') of self-auxiliary distillation (SEAD section 2): which label a head learns.

y is the true label, y' a prediction in its place: the distillation branch gives y', the scratch branch gives y, and the
selector merges them. The paper leaves f and the curriculum open; its choice in production is ``max``.

Shape letters: B examples.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from rayfm.config import Config, ConfigError
from rayfm.distill.rows import Rows
from rayfm.distill.teacher import DistillationConfig, distilled_tasks
from rayfm.schema import Schema, Task

Branch = Literal["max", "min", "original", "distilled", "positives"]
Selector = Literal["max", "min", "original", "distilled", "positives", "curriculum"]


class Curriculum(Config):
    """Moves from one selector to another over the first steps, with more weight on positive labels at first.

    The paper finds that positive labels are best emphasised early in training, and gives no schedule; this one is
    linear in optimiser steps.
    """

    steps: int = Field(1000, gt=0)
    """Optimiser steps until the curriculum is over."""
    positive_weight: float = Field(4.0, ge=0)
    """Weight of the rows with label 1 at step 0; it goes to 1."""
    first: Branch = "max"
    """Selector at step 0."""
    last: Branch = "max"
    """Selector at the end. Between the two the loss is a mixture of both."""


def select_label(branch: Branch, label: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
    """The label to learn and the rows' factor in the loss, each ``[B]``.

    Args:
        branch: ``max`` (positives keep their label, negatives get the prediction), ``min`` (the other way round),
            ``original`` (y), ``distilled`` (y'), ``positives`` (y, on the rows where it is 1 alone).
        label: y, ``[B]``, 0 or 1.
        prediction: y', ``[B]``, in [0, 1].
    """
    ones = torch.ones_like(label)
    if branch == "max":
        return torch.maximum(label, prediction), ones
    if branch == "min":
        return torch.minimum(label, prediction), ones
    if branch == "distilled":
        return prediction, ones
    return label, ones if branch == "original" else (label > 0.5).to(label.dtype)


def mix_labels(
    first: tuple[Tensor, Tensor], last: tuple[Tensor, Tensor], progress: Tensor | float
) -> tuple[Tensor, Tensor]:
    """One (label, factor) whose cross-entropy is ``(1 - progress) * first's + progress * last's``; ``[B]`` each.

    Cross-entropy is linear in the label, so the mixture is exact.
    """
    weight_first, weight_last = (1 - progress) * first[1], progress * last[1]
    weight = weight_first + weight_last
    label = (weight_first * first[0] + weight_last * last[0]) / weight.clamp_min(torch.finfo(weight.dtype).tiny)
    return label, weight


class LabelSelector(nn.Module):
    """A selector that knows how far training is.

    Its buffer ``step`` counts the optimiser steps: it is equal on every rank and lies in the checkpoint, so that a
    resumed training goes on with its curriculum where it stopped.

    Args:
        selector: which label is learnt.
        curriculum: the schedule of ``selector: curriculum``.
    """

    step: Tensor

    def __init__(self, selector: Selector, curriculum: Curriculum | None = None) -> None:
        super().__init__()
        self.selector = selector
        self.curriculum = (curriculum or Curriculum()) if selector == "curriculum" else None
        if self.curriculum is not None:
            self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def progress(self) -> Tensor:
        """How much of the curriculum is over, a scalar in [0, 1]."""
        assert self.curriculum is not None
        return (self.step.float() / self.curriculum.steps).clamp_max(1.0)

    def advance(self) -> None:
        """A step of training is done; nothing happens in evaluation mode. Call once a step, after ``forward``."""
        if self.curriculum is not None and self.training:
            self.step += 1

    def forward(self, label: Tensor, known: Tensor, prediction: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
        """The label to learn and the rows' factor in the loss, 0 where there is nothing to learn; ``[B]`` each.

        Args:
            label: y, ``[B]``.
            known: bool ``[B]``, where y is known. Rows without y are left out, but by ``distilled``.
            prediction: y', ``[B]``.
            predicted: bool ``[B]``, where there is a y'. The true label stands in for it elsewhere: f(y, y).
        """
        prediction = torch.where(predicted, prediction, label)
        if self.selector == "distilled":
            return prediction, (predicted | known).to(prediction.dtype)
        if self.curriculum is None:
            selected, factor = select_label(self.selector, label, prediction)  # type: ignore[arg-type]
            return selected, factor * known
        progress = self.progress()
        selected, factor = mix_labels(
            select_label(self.curriculum.first, label, prediction),
            select_label(self.curriculum.last, label, prediction),
            progress,
        )
        emphasis = 1 + (self.curriculum.positive_weight - 1) * (1 - progress)
        return selected, factor * torch.where(label > 0.5, emphasis, 1.0) * known


def check_selector(selector: Selector, curriculum: Curriculum | None, rows: Rows) -> None:
    """Refuse what cannot be meant.

    Raises:
        ValueError: the rows have no label to select, or a schedule stands beside another selector.
    """
    if selector != "distilled" and rows in ("considerations", "unlabelled"):
        raise ValueError(
            f"selector {selector!r} needs true labels, and rows {rows!r} have none; take 'distilled', or other rows"
        )
    if curriculum is not None and selector != "curriculum":
        raise ValueError(f"the selector is {selector!r}; remove 'curriculum', or set 'selector: curriculum'")


def selected_tasks(config: DistillationConfig, schema: Schema, tasks: tuple[str, ...]) -> list[Task]:
    """The tasks whose labels a selector chooses.

    Raises:
        ConfigError: a task that the model lacks, or one whose labels are not 0 and 1.
    """
    found = distilled_tasks(config, schema, tasks)
    for task in found:
        if task.kind != "binary":
            raise ConfigError(
                f"objective {config.label!r}: task {task.name!r} is a regression, and a selector chooses between "
                "labels of 0 and 1; name the binary tasks under 'tasks'"
            )
    return found
