"""The auxiliary head (ExFM section 3.3, Eq. 3 to 5): the teacher's prediction has a head of its own."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from rayfm.distill.base import OBJECTIVES
from rayfm.distill.head import HeadObjective
from rayfm.distill.scaling import scale_label
from rayfm.distill.teacher import HeadConfig
from rayfm.schema import Task


@OBJECTIVES.register("auxiliary_head")
class AuxiliaryHead(HeadObjective):
    """``w * h(psi(x), min(alpha * y_teacher, 1))``, with the gradient into x multiplied by beta.

    The serving head gets no gradient from it, so that a teacher's bias reaches it only through the shared backbone.
    The head may distil tasks that the student does not serve. Label scaling is for probabilities: regressions keep
    the teacher's value and are fitted by squared error.
    """

    class Config(HeadConfig):
        """The teacher, and the three scalings of section 3.3 (``weight``, ``label_scale``, ``gradient_scale``)."""

        type: Literal["auxiliary_head"] = "auxiliary_head"
        label_scale: float = Field(1.0, gt=0)
        """Factor of the teacher's probability before it is clipped to 1 (ExFM's alpha)."""

    config: Config

    def target(self, task: Task, label: Tensor) -> Tensor:
        return scale_label(label, self.config.label_scale) if task.kind == "binary" else label
