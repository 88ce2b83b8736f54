"""The auxiliary task of SSLFM (UKDSL section 4.3, Fig. 6): a task on the shared representation."""

from __future__ import annotations

from typing import Literal

from rayfm.distill.base import OBJECTIVES
from rayfm.distill.head import HeadObjective
from rayfm.distill.teacher import HeadConfig


@OBJECTIVES.register("auxiliary_task")
class AuxiliaryTask(HeadObjective):
    """``w * h(a(x), y_teacher)`` on unlabelled rows: a head on the representation x learns the teacher's prediction.

    Labelled rows teach the serving head and nothing else, which is what sets it apart from ``auxiliary_head``.
    """

    class Config(HeadConfig):
        """The teacher, and the head on the representation."""

        type: Literal["auxiliary_task"] = "auxiliary_task"
        rows: Literal["unlabelled"] = "unlabelled"
        """Always the rows whose true label is not known: considerations, and impressions still without a label."""

    config: Config
