"""Cross-stage distillation (UKDSL section 4.1.1): a stage's model learns the next stage's predictions.

Shape letters: B examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor

from rayfm.data.batch import Batch
from rayfm.distill.base import OBJECTIVES, Objective, Term
from rayfm.distill.losses import task_loss, weighted_term
from rayfm.distill.rows import rows_mask
from rayfm.distill.teacher import DistillationConfig, distilled_tasks
from rayfm.models.base import ModelOutput
from rayfm.schema import Schema

COVERAGE = "coverage"
"""How the names of terms begin, after their task, that say where supervision is from."""


def first_prediction(batch: Batch, sources: Sequence[str], task: str) -> tuple[Tensor, Tensor]:
    """Each row's prediction from the first of ``sources`` that has one, and the mask of rows with any; ``[B]`` each."""
    prediction, found = batch.supervised(f"{sources[0]}/{task}")
    for source in sources[1:]:
        other, there = batch.supervised(f"{source}/{task}")
        prediction, found = torch.where(found, prediction, other), found | there
    return prediction, found


def rows_by_source(batch: Batch, sources: Sequence[str], task: str) -> list[Tensor]:
    """For each of ``sources`` the rows whose prediction `first_prediction` takes from it: bool ``[B]`` each."""
    rows: list[Tensor] = []
    taken = torch.zeros_like(batch.kind, dtype=torch.bool)
    for source in sources:
        there = batch.supervised(f"{source}/{task}")[1]
        rows.append(there & ~taken)
        taken = taken | there
    return rows


@OBJECTIVES.register("cross_stage")
class CrossStage(Objective):
    """``L_BCE(z_T, z)`` (UKDSL Eq. 3 with the next stage's prediction z_T as label), on labelled and unlabelled rows.

    The next stage's model saw what this stage passed on, considerations among them, and its predictions were logged: a
    teacher at no cost. Where the log has none, a teacher's labels stand in row by row; the metrics then say which share
    of the rows has its prediction from where (``<task>/coverage <source>``), and the rest have none.

    A stage overestimates what it selects itself (section 3.2), so that the gain is on considerations: calibration and
    NE against the next stage. The serving head takes the next stage's bias over with it.
    """

    class Config(DistillationConfig):
        """Whose predictions, and what becomes of the true labels. A weight of its own for considerations: list the
        objective twice, each with a ``name``, ``rows`` and ``weight``."""

        type: Literal["cross_stage"] = "cross_stage"
        next_stage: str
        """``logged/<model>`` for the predictions that the next stage's model logged, or a teacher's name."""
        fallback: str | None = None
        """The same for the rows that ``next_stage`` has no prediction for."""
        replace_labels: bool = False
        """Learn the predictions instead of the true labels, as section 4.1.1 has it, rather than beside them. A
        labelled row without a prediction keeps its true label. The term has the task's weight, times ``weight``."""

        def sources(self) -> tuple[str, ...]:
            """Where predictions come from, the preferred one first."""
            return (self.next_stage,) if self.fallback is None else (self.next_stage, self.fallback)

        def supervision(self, tasks: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(f"{source}/{task}" for source in self.sources() for task in self.distilled(tasks))

        def replaces_supervised(self, tasks: tuple[str, ...]) -> tuple[str, ...]:
            return self.distilled(tasks) if self.replace_labels else ()

        @model_validator(mode="after")
        def _consistent(self) -> CrossStage.Config:
            if self.fallback == self.next_stage:
                raise ValueError(f"fallback is next_stage itself, {self.fallback!r}; name another one, or leave it out")
            if self.replace_labels and self.rows in ("considerations", "unlabelled"):
                raise ValueError(
                    f"with replace_labels and rows {self.rows!r} nothing would learn from the other rows; take 'rows: "
                    "all', or leave replace_labels out"
                )
            return self

    config: Config

    def __init__(self, config: Config, schema: Schema, tasks: tuple[str, ...], representation_dim: int) -> None:
        super().__init__(config, schema, tasks, representation_dim)
        self.distilled = distilled_tasks(config, schema, tasks)

    def forward(self, batch: Batch, output: ModelOutput) -> dict[str, Term]:
        terms = {}
        for task in self.distilled:
            label, mask = first_prediction(batch, self.config.sources(), task.name)
            coefficient = self.config.weight
            if self.config.replace_labels:
                truth, known = batch.label(task.name)
                label, mask = torch.where(mask, label, truth), mask | known
                coefficient *= task.weight
            chosen = rows_mask(batch, self.config.rows, task.name)
            loss = task_loss(task, output.logits[task.name], label)
            terms[task.name] = weighted_term(loss, batch.weight, mask & chosen, coefficient)
            terms |= self._coverage(batch, task.name, chosen)
        return terms

    def _coverage(self, batch: Batch, task: str, chosen: Tensor) -> dict[str, Term]:
        """The share of the chosen rows that learns from each source, where there are two: terms that weigh nothing."""
        sources = self.config.sources()
        if len(sources) == 1:
            return {}
        pairs = zip(sources, rows_by_source(batch, sources, task), strict=True)
        return {
            f"{task}/{COVERAGE} {source}": weighted_term(there.float(), batch.weight, chosen, 0.0)
            for source, there in pairs
        }
