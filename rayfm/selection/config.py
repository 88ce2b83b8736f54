"""What `rayfm select` does: the ``select`` section of a pipeline's config."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from rayfm.config import Config
from rayfm.models.base import MODELS, ModelConfig


class SelectConfig(Config):
    """Semi-supervised feature selection (UKDSL section 4.2), on the periods before the first test period alone."""

    teacher: str | None = None
    """The teacher that labels considerations; by default the only one there is."""
    candidates: tuple[str, ...] | None = Field(None, min_length=2)
    """Features to choose from; by default all that the teacher reads."""
    model: Annotated[ModelConfig, MODELS] | None = None
    """The simplified student, which reads every candidate; by default a small DeepFM."""
    tasks: tuple[str, ...] | None = Field(None, min_length=1)
    """Tasks whose loss is measured; by default all of the teacher's."""
    withheld: int = Field(1, ge=1)
    """Warm-up periods, the last ones, that importance is measured on; teacher and student are trained on those
    before."""
    first_labels: int = Field(1, ge=1)
    """Position (from 0) of the first period whose pseudo-labels the student learns, as a student's ``labels.first``."""
    consideration_share: float = Field(1.0, gt=0, le=1)
    """Share of the considerations in the student's batches."""
    consideration_weight: float = Field(1.0, gt=0)
    """Weight of the considerations' term of its loss; with 1, all considerations weigh as much as all impressions."""
    group: str | None = None
    """Worker group whose training the student takes; by default the first."""
    batch_size: int = Field(1024, ge=2)
    """Rows among which a feature's values are shuffled. Fewer rows give more batches, and more of them deviate."""
    batches_per_lane: int | None = Field(None, ge=1)
    """Most batches of a lane and kind, spread evenly over it; by default all."""
    shuffles: int = Field(5, ge=1)
    """Shuffles of each feature in each batch."""
    top_k: int | None = Field(None, ge=1)
    """Features that each ranking gives; by default half of the candidates."""
    threshold: float = Field(0.002, ge=0)
    """Importance, as a share of the loss, that a feature must exceed. On considerations noise has some: the teacher's
    labels repeat what it mistook for a pattern, and the student learned it from them."""
    sigmas: float = Field(3.0, ge=0)
    """Standard errors by which it must exceed it: what lies within is noise, and no ranking gives it."""
    average_weight: float = Field(0.5, ge=0, le=1)
    """Weight of considerations in average rank and average importance; impressions have the rest."""
    features_per_item: int = Field(64, ge=1)
    """Features of a work item, which are all scored from one pass of embeddings; an item is also of one lane."""
    cpus: float = Field(1.0, gt=0)
    """CPUs of a scoring worker."""
    seed: int = 0
    """Of the student and of the shuffles."""

    @model_validator(mode="after")
    def _once(self) -> SelectConfig:
        for name in self.candidates or ():
            if (self.candidates or ()).count(name) > 1:
                raise ValueError(f"candidate {name!r} stands twice; name it once")
        if self.model is not None and self.model.features is not None:
            raise ValueError("the simplified student reads all candidates; leave 'model.features' out")
        return self
