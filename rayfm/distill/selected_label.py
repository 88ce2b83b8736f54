"""The serving head learns a selection of true labels and a teacher's predictions (SEAD sections 1 and 3)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator

from rayfm.data.batch import Batch
from rayfm.distill.base import OBJECTIVES, Objective, Term
from rayfm.distill.losses import binary_cross_entropy, weighted_term
from rayfm.distill.rows import rows_mask, traffic_mask, traffic_positions
from rayfm.distill.selector import Curriculum, LabelSelector, check_selector, selected_tasks
from rayfm.distill.teacher import TeacherConfig
from rayfm.models.base import ModelOutput
from rayfm.schema import Schema


@OBJECTIVES.register("selected_label")
class SelectedLabel(Objective):
    """``h(z, f(y, y_teacher))`` in place of the task's own loss: with ``max`` the student of SEAD's signal-loss model.

    Where a privacy policy hides conversions, a label of 0 may be a lost 1, and a teacher that learnt from unbiased
    traffic knows better: max(y, y') trusts a 1 and replaces a 0. The mean prediction then moves away from the labels'
    mean, so calibrate what is served, on aggregated labels where those alone are true
    (`rayfm.export.aggregated.fit_platt_aggregated`). Where labels are true, ``self_auxiliary`` keeps calibration.

    A row without a teacher's prediction learns its true label; one without either is left out.
    """

    class Config(TeacherConfig):
        """The teacher, and the selector. The term has the task's weight, times ``weight``."""

        type: Literal["selected_label"] = "selected_label"
        selector: Literal["max", "min", "distilled", "curriculum"] = "max"
        """What is learnt of y and y': ``max``, ``min``, ``distilled`` (y', also on rows without a label), or
        ``curriculum``. (A serving head that learnt from positives alone would predict 1.)"""
        curriculum: Curriculum | None = None
        """The schedule of ``selector: curriculum``, by default its own defaults."""
        traffics: tuple[str, ...] | None = Field(None, min_length=1)
        """Traffics whose labels are selected, by default all; on the others the true label stands."""

        def replaces_supervised(self, tasks: tuple[str, ...]) -> tuple[str, ...]:
            return self.distilled(tasks)

        def check(self, schema: Schema, tasks: tuple[str, ...]) -> None:
            selected_tasks(self, schema, tasks)
            traffic_positions(self.label, self.traffics, schema)

        @model_validator(mode="after")
        def _selectable(self) -> SelectedLabel.Config:
            check_selector(self.selector, self.curriculum, self.rows)
            if self.rows in ("considerations", "unlabelled"):
                raise ValueError(
                    f"rows {self.rows!r}: the term takes the place of the tasks' own loss, and labelled rows would "
                    "teach nothing; take 'all'"
                )
            return self

    config: Config

    def __init__(self, config: Config, schema: Schema, tasks: tuple[str, ...], representation_dim: int) -> None:
        super().__init__(config, schema, tasks, representation_dim)
        self.selected = selected_tasks(config, schema, tasks)
        self.traffics = traffic_positions(config.label, config.traffics, schema)
        self.selector = LabelSelector(config.selector, config.curriculum)

    def forward(self, batch: Batch, output: ModelOutput) -> dict[str, Term]:
        affected = traffic_mask(batch, self.traffics)
        terms = {}
        for task in self.selected:
            label, known = batch.label(task.name)
            prediction, predicted = batch.supervised(f"{self.config.teacher}/{task.name}")
            target, factor = self.selector(label, known, prediction, predicted)
            target = torch.where(affected, target, label)
            factor = torch.where(affected, factor, known.to(factor.dtype))
            kept = factor * rows_mask(batch, self.config.rows, task.name)
            loss = binary_cross_entropy(output.logits[task.name], target)
            coefficient = self.config.weight * task.weight
            terms[task.name] = weighted_term(loss, batch.weight, kept, coefficient)
        self.selector.advance()
        return terms
