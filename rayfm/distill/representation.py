"""Distillation of a representation: the student's, through a projection, is drawn to the one that the teacher stored.

Sources: Romero et al. 2015, FitNets: Hints for Thin Deep Nets, section 2.1 (a learned map from the student's layer to
the teacher's, squared distance); cosine distance as in Sanh et al. 2019, DistilBERT, section 2.

Shape letters: B examples, H width of the student's representation, R of the teacher's.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from rayfm.config import ConfigError
from rayfm.data.batch import CONSIDERATION, IMPRESSION, Batch
from rayfm.distill.base import OBJECTIVES, Objective, ObjectiveConfig, Term
from rayfm.distill.losses import weighted_term
from rayfm.distill.scaling import scale_gradient
from rayfm.models.base import ModelOutput
from rayfm.models.mlp import full_precision
from rayfm.schema import Schema


def l2_distance(projected_BR: Tensor, teacher_BR: Tensor) -> Tensor:
    """``|P x - r|^2 / R``, ``[B]``: the mean over the R elements, so that the width does not set the weight."""
    return (projected_BR - teacher_BR).square().mean(1)


def cosine_distance(projected_BR: Tensor, teacher_BR: Tensor) -> Tensor:
    """``1 - cos(P x, r)``, ``[B]``, in [0, 2]; 1 where either is zero."""
    return 1 - functional.cosine_similarity(projected_BR, teacher_BR, dim=1)


@OBJECTIVES.register("representation")
class Representation(Objective):
    """``w * d(P x, r)`` with the teacher's stored representation r and a linear projection P of the student's x.

    P is learned with the student and is not published. The serving heads get no gradient; the teacher's representation
    is a constant. The teacher must store it (``store_representation: true``). Its axes move from one version to the
    next, which P has to follow: where that is fast, ``cosine`` and a small ``weight`` hold the student less tightly.
    """

    class Config(ObjectiveConfig):
        """The teacher, and the distance."""

        type: Literal["representation"] = "representation"
        teacher: str
        """The teacher's name."""
        distance: Literal["l2", "cosine"] = "l2"
        """``l2``: mean squared difference of the elements; ``cosine``: 1 - cosine, which leaves the length free."""
        width: int | None = Field(None, ge=1)
        """Width of the teacher's representation, by default that of its model in this config."""
        weight: float = Field(1.0, ge=0)
        """Factor of the objective in the loss."""
        rows: Literal["all", "impressions", "considerations"] = "all"
        """Rows to distil on, of those that have a stored representation."""
        gradient_scale: float = Field(1.0, ge=0)
        """Factor of the gradient from the projection into the backbone."""

        def representations(self) -> dict[str, int | None]:
            return {self.teacher: self.width}

        def with_widths(self, widths: dict[str, int]) -> ObjectiveConfig:
            known = self.width or widths.get(self.teacher)
            return self.model_copy(update={"width": known})

    config: Config

    def __init__(self, config: Config, schema: Schema, tasks: tuple[str, ...], representation_dim: int) -> None:
        super().__init__(config, schema, tasks, representation_dim)
        if config.width is None:
            raise ConfigError(
                f"objective {config.label!r}: how wide is the representation of {config.teacher!r}? set 'width'"
            )
        self.projection = nn.Linear(representation_dim, config.width)

    def forward(self, batch: Batch, output: ModelOutput) -> dict[str, Term]:
        teacher_BR, mask = batch.represented(self.config.teacher)
        if self.config.rows != "all":
            mask = mask & (batch.kind == (IMPRESSION if self.config.rows == "impressions" else CONSIDERATION))
        representation_BH = scale_gradient(output.representation, self.config.gradient_scale)
        with full_precision(representation_BH):  # a distance to what the teacher stored is no hidden layer
            projected_BR = self.projection(representation_BH.float())
        distance = l2_distance if self.config.distance == "l2" else cosine_distance
        loss = distance(projected_BR, teacher_BR)
        return {self.config.distance: weighted_term(loss, batch.weight, mask, self.config.weight)}
