"""Listwise distillation within a request: the student shares out probability among the rows as the teacher does.

Shape letters: B examples of the batch, N rows that are compared, G requests.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from rayfm.data.batch import Batch
from rayfm.distill.base import OBJECTIVES, Objective, Term
from rayfm.distill.requests import count_once, request_rows, require_requests
from rayfm.distill.teacher import TeacherConfig, distilled_tasks, teacher_label, teacher_score
from rayfm.models.base import ModelOutput
from rayfm.schema import Schema, Task


def segment_log_softmax(score_N: Tensor, segment_N: Tensor, segments: int) -> Tensor:
    """``log_softmax`` over the rows of each segment: ``[N] -> [N]``.

    Args:
        score_N: float.
        segment_N: the number of each row's segment, in [0, G); each segment has a row.
        segments: G.
    """
    highest_G = score_N.new_full((segments,), -torch.inf)
    highest_G = highest_G.scatter_reduce(0, segment_N, score_N.detach(), "amax")
    shifted_N = score_N - highest_G[segment_N]
    sums_G = score_N.new_zeros(segments).index_add(0, segment_N, shifted_N.exp())
    return shifted_N - sums_G.log()[segment_N]


def listnet(score_N: Tensor, teacher_score_N: Tensor, segment_N: Tensor, segments: int, temperature: float) -> Tensor:
    """``-T^2 sum_i softmax(t / T)_i log softmax(z / T)_i`` of each segment, ``[G]``.

    Cross-entropy of the top-one probabilities (Cao et al. 2007, Learning to Rank: From Pairwise Approach to Listwise
    Approach, section 4.3), both softened as in Hinton et al. 2015, section 2.

    Args:
        score_N, teacher_score_N: z and t.
        segment_N, segments: as `segment_log_softmax`'s.
        temperature: T > 0.
    """
    target_N = segment_log_softmax(teacher_score_N / temperature, segment_N, segments).exp()
    loss_N = -target_N * segment_log_softmax(score_N / temperature, segment_N, segments)
    return temperature**2 * score_N.new_zeros(segments).index_add(0, segment_N, loss_N)


@OBJECTIVES.register("listwise")
class Listwise(Objective):
    """ListNet's loss of each request (``Batch.group``) against the teacher's softened scores.

    A score is a logit for a binary task, the value for a regression. A softmax does not change when all scores of a
    request move alike: what the teacher says of the request as a whole is not learned, nor its bias there. A request
    counts with the mean weight of its rows; rows without a request or without the teacher's prediction, and requests
    with one row left, are left out.

    A request is compared as far as its rows lie in one step: one whose rows lie on both sides of a step's end is cut
    there. Within a step the ranks gather what they compare (`rayfm.distill.requests`), so the lists do not depend on
    the number of workers, although ``prepare`` deals the rows of a request to different lanes.
    """

    class Config(TeacherConfig):
        """The teacher, and the temperature."""

        needs_requests = True

        type: Literal["listwise"] = "listwise"
        temperature: float = Field(1.0, gt=0)
        """The teacher's scores and the student's are divided by it."""

    config: Config

    def __init__(self, config: Config, schema: Schema, tasks: tuple[str, ...], representation_dim: int) -> None:
        super().__init__(config, schema, tasks, representation_dim)
        self.distilled = distilled_tasks(config, schema, tasks)
        self._checked = False

    def forward(self, batch: Batch, output: ModelOutput) -> dict[str, Term]:
        if not self._checked:
            require_requests(batch, self.config.label)
            self._checked = len(batch) > 0
        return {task.name: self._term(batch, output.logits[task.name], task) for task in self.distilled}

    def _term(self, batch: Batch, logit: Tensor, task: Task) -> Term:
        prediction, mask = teacher_label(batch, self.config, task.name)
        rows = request_rows(batch, mask, logit, teacher_score(task, prediction))
        loss_G = listnet(rows.score_N, rows.teacher_N, rows.request_N, rows.requests, self.config.temperature)
        sizes_G = torch.bincount(rows.request_N, minlength=rows.requests)
        weight_G = torch.zeros_like(loss_G).index_add(0, rows.request_N, rows.weight_N) / sizes_G
        # Counted by the rank that has the request's first row.
        counted_G = rows.own_N[sizes_G.cumsum(0) - sizes_G]
        return Term((weight_G * count_once(loss_G, counted_G)).sum(), (weight_G * counted_G).sum(), self.config.weight)
