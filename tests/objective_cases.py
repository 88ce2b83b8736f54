"""Objectives on small batches of the schema of ``model_batches``, and the numbers to check them by."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from model_batches import SCHEMA, TASKS, random_batch

from rayfm.data.batch import CONSIDERATION, Batch
from rayfm.distill import OBJECTIVES, Term
from rayfm.models import ModelOutput
from rayfm.schema import Schema

H = 6

SURFACES = Schema.model_validate({**SCHEMA.dump(), "traffics": ["feed", "search"]})
"""The schema with two traffics."""


def objective(kind: str, student: tuple[str, ...] = TASKS, **config: Any) -> Any:
    """An objective of a student with these tasks, with fixed first weights."""
    torch.manual_seed(0)
    part = OBJECTIVES[kind]
    return part(part.Config(**config), SURFACES, student, H)


def five_rows() -> tuple[Batch, ModelOutput]:
    """A positive, a negative, a negative without supervision, an unlabelled impression, a consideration.

    Weights 1, 2, 3, 4, 5; traffics feed, search, feed, search, feed; supervision columns ``fm`` and ``logged/next``
    of both tasks, the latter on rows 0 and 4 alone.
    """
    drawn = random_batch(5)
    batch = dataclasses.replace(
        drawn,
        labels=torch.tensor([[1.0, 2.0], [0.0, 1.0], [0.0, 3.0], [0.0, 0.0], [0.0, 0.0]]),
        label_mask=torch.tensor([[True, True], [True, True], [True, False], [False, False], [False, False]]),
        supervision=torch.tensor(
            [
                [0.4, 1.5, 0.9, 1.0],
                [0.3, 0.0, 0.0, 0.0],
                [0.0, 0.0, 0.0, 0.0],
                [0.6, 0.5, 0.0, 0.0],
                [0.8, 0.2, 0.7, 2.0],
            ]
        ),
        supervision_mask=torch.tensor(
            [
                [True, True, True, True],
                [True, False, False, False],
                [False, False, False, False],
                [True, True, False, False],
                [True, True, True, True],
            ]
        ),
        supervision_names=("fm/click", "fm/watch", "logged/next/click", "logged/next/watch"),
        kind=torch.tensor([0, 0, 0, 0, CONSIDERATION]),
        traffic=torch.tensor([0, 1, 0, 1, 0]),
        weight=torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]),
    )
    logits = {
        "click": torch.tensor([0.5, -1.0, 1.5, 0.2, 1.0], requires_grad=True),
        "watch": torch.tensor([1.0, 3.0, 0.0, -1.0, 0.5], requires_grad=True),
    }
    generator = torch.Generator().manual_seed(3)
    return batch, ModelOutput(torch.randn(5, H, generator=generator, requires_grad=True), logits)


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def h(logit: float, label: float) -> float:
    """Binary cross-entropy by hand."""
    p = sigmoid(logit)
    return -(label * math.log(p) + (1 - label) * math.log(1 - p))


def backward(terms: dict[str, Term]) -> None:
    torch.stack([term.coefficient * term.weighted_sum for term in terms.values()]).sum().backward()


def part_of(batch: Batch, output: ModelOutput, start: int, stop: int) -> tuple[Batch, ModelOutput]:
    """Rows ``[start, stop)`` of what objectives read."""
    names = ("labels", "label_mask", "supervision", "supervision_mask", "kind", "traffic", "weight", "example_id")
    cut = {name: getattr(batch, name)[start:stop] for name in names}
    rows = dataclasses.replace(batch, sparse=None, weighted=None, sequence=None, **cut)
    logits = {task: z[start:stop] for task, z in output.logits.items()}
    return rows, ModelOutput(output.representation[start:stop], logits)
