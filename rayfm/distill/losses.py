"""Elementwise losses that the objectives are made of."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from rayfm.distill.base import Term
from rayfm.schema import Task


def binary_cross_entropy(logit: Tensor, label: Tensor) -> Tensor:
    """ExFM Eq. 1 with the sign that makes it a loss: ``-(y log s(z) + (1 - y) log(1 - s(z)))``, elementwise.

    Args:
        logit: z, ``[B]``.
        label: y in [0, 1], ``[B]``: a true label, or a teacher's probability.
    """
    return functional.binary_cross_entropy_with_logits(logit, label, reduction="none")


def squared_error(prediction: Tensor, label: Tensor) -> Tensor:
    """``(prediction - label)^2``, elementwise."""
    return (prediction - label).square()


def task_loss(task: Task, output: Tensor, label: Tensor) -> Tensor:
    """The loss of a task's kind: cross-entropy of a logit, or squared error of a value; ``[B]``."""
    return binary_cross_entropy(output, label) if task.kind == "binary" else squared_error(output, label)


def weighted_term(loss: Tensor, weight: Tensor, mask: Tensor, coefficient: float = 1.0) -> Term:
    """Sums over the rows that ``mask`` keeps, each ``[B]``; none gives zero over zero weight."""
    kept = weight * mask
    return Term((kept * loss).sum(), kept.sum(), coefficient)
