"""Pairwise distillation within a request: the student orders two rows as the teacher does."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional

from rayfm.data.batch import Batch
from rayfm.distill.base import OBJECTIVES, Objective, Term
from rayfm.distill.requests import count_once, request_pairs, request_rows, require_requests
from rayfm.distill.teacher import TeacherConfig, distilled_tasks, teacher_label
from rayfm.models.base import ModelOutput
from rayfm.schema import Schema


def ranknet(difference: Tensor) -> Tensor:
    """``log(1 + exp(-(z_i - z_j)))`` for a pair whose row i belongs first (Burges et al. 2005, section 3), ``[P]``."""
    return functional.softplus(-difference)


def hinge(difference: Tensor, margin: float) -> Tensor:
    """``max(0, margin - (z_i - z_j))`` for a pair whose row i belongs first (Herbrich et al. 2000), ``[P]``."""
    return functional.relu(margin - difference)


@OBJECTIVES.register("pairwise")
class Pairwise(Objective):
    """A loss of ``z_i - z_j`` for rows i, j of one request (``Batch.group``) where the teacher puts i before j.

    Only the teacher's order counts, not its calibration: a teacher whose bias is the same for all rows of a request
    passes none of it on. A pair has the product of its rows' weights; pairs that the teacher is undecided about, and
    rows without a request or without the teacher's prediction, are left out.

    A pair needs both rows in one step: a request whose rows lie on both sides of a step's end is cut there. Within a
    step the ranks gather what they compare (`rayfm.distill.requests`), so the pairs do not depend on the number of
    workers, although ``prepare`` deals the rows of a request to different lanes.
    """

    class Config(TeacherConfig):
        """The teacher, and the loss of a pair."""

        needs_requests = True

        type: Literal["pairwise"] = "pairwise"
        loss: Literal["ranknet", "hinge"] = "ranknet"
        """``ranknet``: log(1 + exp(-(z_i - z_j))); ``hinge``: max(0, margin - (z_i - z_j))."""
        margin: float = Field(1.0, gt=0)
        """Of ``hinge``."""
        max_pairs: int = Field(32, ge=1)
        """Other rows of its request that a row is paired with at most (chosen by their ids)."""

    config: Config

    def __init__(self, config: Config, schema: Schema, tasks: tuple[str, ...], representation_dim: int) -> None:
        super().__init__(config, schema, tasks, representation_dim)
        self.distilled = distilled_tasks(config, schema, tasks)
        self._checked = False

    def forward(self, batch: Batch, output: ModelOutput) -> dict[str, Term]:
        if not self._checked:
            require_requests(batch, self.config.label)
            self._checked = len(batch) > 0
        return {task.name: self._term(batch, output.logits[task.name], task.name) for task in self.distilled}

    def _term(self, batch: Batch, logit: Tensor, task: str) -> Term:
        prediction, mask = teacher_label(batch, self.config, task)
        rows = request_rows(batch, mask, logit, prediction)
        first, second = request_pairs(rows.request_N, rows.example_id_N, self.config.max_pairs)
        ours = rows.own_N[first] | rows.own_N[second]
        first, second = first[ours], second[ours]
        order = (rows.teacher_N[first] - rows.teacher_N[second]).sign()
        difference = order * (rows.score_N[first] - rows.score_N[second])
        loss = ranknet(difference) if self.config.loss == "ranknet" else hinge(difference, self.config.margin)
        weight, counted = rows.weight_N[first] * rows.weight_N[second] * order.abs(), rows.own_N[first]
        return Term((weight * count_once(loss, counted)).sum(), (weight * counted).sum(), self.config.weight)
