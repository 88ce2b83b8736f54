"""Self-auxiliary distillation (SEAD section 2): an auxiliary head learns a mixture of labels and own predictions."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from rayfm.data.batch import Batch
from rayfm.distill.base import OBJECTIVES, Objective, Term
from rayfm.distill.losses import binary_cross_entropy, weighted_term
from rayfm.distill.rows import rows_mask, traffic_mask, traffic_positions
from rayfm.distill.scaling import scale_gradient
from rayfm.distill.selector import Curriculum, LabelSelector, Selector, check_selector, selected_tasks
from rayfm.distill.teacher import DistillationConfig
from rayfm.models.base import ModelOutput
from rayfm.models.embeddings import require_module_names
from rayfm.models.mlp import Head
from rayfm.schema import Schema


@OBJECTIVES.register("self_auxiliary")
class SelfAuxiliary(Objective):
    """``w * h(g(x), f(y, y'))`` with ``y' = SG[s(z)]``, the serving head's own prediction as a constant.

    The main head is the serving head: it learns true labels alone (``supervised``), so that it stays calibrated, and
    teaches. The auxiliary head g on the shared representation x is the student; its two branches are the true label y
    and y', which the selector f merges. No teacher is needed, and nothing is served in addition.
    """

    class Config(DistillationConfig):
        """The selector, and the auxiliary head."""

        type: Literal["self_auxiliary"] = "self_auxiliary"
        selector: Selector = "max"
        """What the auxiliary head learns from y and y': ``max`` (positives as they are, negatives with the resolution
        of y'), ``min``, ``original`` (y), ``distilled`` (y', also on rows without a label), ``positives`` (y on
        positive rows alone), or ``curriculum``."""
        curriculum: Curriculum | None = None
        """The schedule of ``selector: curriculum``, by default its own defaults."""
        traffics: tuple[str, ...] | None = Field(None, min_length=1)
        """Traffics whose rows the auxiliary head learns from, by default all."""
        hidden: tuple[int, ...] = (64,)
        """Hidden widths of the auxiliary head, one a task."""
        gradient_scale: float = Field(1.0, ge=0)
        """Factor of the gradient from the auxiliary head into the backbone; 0 stops it (the paper's ablation SGA)."""

        def check(self, schema: Schema, tasks: tuple[str, ...]) -> None:
            selected_tasks(self, schema, tasks)
            traffic_positions(self.label, self.traffics, schema)

        @model_validator(mode="after")
        def _selectable(self) -> SelfAuxiliary.Config:
            check_selector(self.selector, self.curriculum, self.rows)
            return self

    config: Config

    def __init__(self, config: Config, schema: Schema, tasks: tuple[str, ...], representation_dim: int) -> None:
        super().__init__(config, schema, tasks, representation_dim)
        self.selected = selected_tasks(config, schema, tasks)
        self.traffics = traffic_positions(config.label, config.traffics, schema)
        names = [task.name for task in self.selected]
        require_module_names("task", names)
        self.heads = nn.ModuleDict({name: Head(representation_dim, config.hidden) for name in names})
        self.selector = LabelSelector(config.selector, config.curriculum)

    def forward(self, batch: Batch, output: ModelOutput) -> dict[str, Term]:
        representation_BH = scale_gradient(output.representation, self.config.gradient_scale)
        seen = traffic_mask(batch, self.traffics)
        terms = {}
        for task in self.selected:
            label, known = batch.label(task.name)
            prediction = output.logits[task.name].detach().sigmoid()
            target, factor = self.selector(label, known, prediction, torch.ones_like(known))
            kept = factor * (seen & rows_mask(batch, self.config.rows, task.name))
            loss = binary_cross_entropy(self.heads[task.name](representation_BH), target)
            terms[task.name] = weighted_term(loss, batch.weight, kept, self.config.weight)
        self.selector.advance()
        return terms
