"""What every model is: ``Batch -> ModelOutput``, with embeddings through TorchRec collections alone.

Shape letters: B examples, H width of the representation, F embedded features, E embedding dimension, D dense features.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn

from rayfm.config import Config, Registry
from rayfm.data.batch import Batch
from rayfm.models.embeddings import select_features
from rayfm.models.histories import HistoryFeature
from rayfm.models.scaling import Width, scaled
from rayfm.schema import Schema

MODELS = Registry("model", "rayfm.models")


@dataclasses.dataclass
class ModelOutput:
    """What a model predicts, before any objective looks at it."""

    representation: Tensor
    """float32 ``[B, H]``, to objectives bfloat16 where a model is trained so: the backbone's last shared layer, which
    auxiliary heads read (ExFM's x)."""
    logits: dict[str, Tensor]
    """Task -> float32 ``[B]``: a logit for a binary task, the (transformed) value for a regression."""


class ModelConfig(Config):
    """What every model's config has. A model's own ``Config`` adds ``type: Literal[...]`` and its sizes."""

    features: tuple[str, ...] | None = None
    """Names of the features that the model reads; by default all of the schema's."""
    embedding_dim: Width = Field(16, multiple_of=4)
    """E. The fused tables of fbgemm need a multiple of 4."""
    histories: tuple[HistoryFeature, ...] = ()
    """Teachers' representations of an entity's earlier examples, read as further embedded features (LoopFM)."""
    scale: float = Field(1.0, gt=0, le=64)
    """Factor of all widths: with 2 every layer and every embedding is twice as wide."""
    activation_clip: float | None = Field(None, gt=0)
    """Limit of what a ReLU gives, in training and serving; by default none. Against divergence of large models."""

    @model_validator(mode="after")
    def _can_be_scaled(self) -> ModelConfig:
        try:
            scaled(self)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(str(part) for part in first["loc"])
            reason = f"{key}: {first['msg']}" if key else first["msg"].removeprefix("Value error, ")
            raise ValueError(f"scale {self.scale:g} does not fit: {reason}; take another, or other widths") from None
        return self

    @model_validator(mode="after")
    def _histories_apart(self) -> ModelConfig:
        names = [history.name for history in self.histories]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"history {name!r} stands twice; name it once")
        return self

    def unpooled_tables(self, schema: Schema) -> frozenset[str]:
        """Tables that the model looks up item by item; they are sharded, never replicated."""
        return frozenset()

    def check(self, schema: Schema, tasks: tuple[str, ...]) -> None:
        """Refuse, before anything is trained, what does not fit a schema or the tasks to predict.

        Raises:
            ConfigError: naming the key.
        """
        select_features(schema, self.features)
        for history in self.histories:
            history.check(schema)


class Model(nn.Module):
    """Base of the models. A subclass registers itself with ``@MODELS.register(name)`` and nests a ``Config``.

    Every subclass also takes the keyword ``embedding_device``, where its embedding collections are built: ``meta`` for
    a model that will be sharded, by default the device of everything else. Models are built by ``build_model``.

    Args:
        config: the model's own config.
        schema: the pipeline's schema.
        tasks: the tasks to predict, each with a logit.

    Attributes:
        representation_dim: H.
    """

    representation_dim: int

    def __init__(self, config: ModelConfig, schema: Schema, tasks: tuple[str, ...]) -> None:
        super().__init__()
        self.config, self.schema, self.tasks = config, schema, tasks

    def forward(self, batch: Batch) -> ModelOutput:
        raise NotImplementedError


Precision = Literal["fp32", "bf16"]
