"""What most models are: features of a batch to one representation that all tasks' heads read.

Shape letters: B examples, F embedded features, E embedding dimension, D dense features, I = F * E + D inputs,
H representation.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from rayfm.data.batch import Batch
from rayfm.models.base import Model, ModelConfig, ModelOutput
from rayfm.models.embeddings import DenseFeatures, FeatureEmbeddings, flat_inputs, select_features
from rayfm.models.heads import MultiTask, SharedBottomConfig, TaskHeads
from rayfm.models.mlp import MLP
from rayfm.models.scaling import Widths
from rayfm.schema import Feature, Schema


class DeepConfig(ModelConfig):
    """What models with MLPs and task heads also have."""

    head: Widths = ()
    """Hidden widths of each task's head."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of an MLP layer's outputs dropped in training."""
    layer_norm: bool = False
    """Normalise each MLP layer before its ReLU."""
    multi_task: MultiTask = SharedBottomConfig()
    """How tasks share the representation, and which task's head reads another one's logit."""

    def check(self, schema: Schema, tasks: tuple[str, ...]) -> None:
        super().check(schema, tasks)
        self.multi_task.check(tasks)

    def mlp(self, in_dim: int, widths: tuple[int, ...]) -> MLP:
        """An MLP of ``widths`` with this config's dropout and layer norm."""
        return MLP(in_dim, widths, self.dropout, self.layer_norm)


class Backbone(Model):
    """Base of the models whose tasks share one representation: ``embed``, then ``build``, then a head per task.

    A subclass nests a ``Config`` of ``DeepConfig``, makes its layers in ``build``, and computes the representation in
    ``represent``. One that reads its features in another way than pooled side by side also overrides ``embed``.

    Attributes:
        features: what the model reads, in the schema's order.
        embeddings: ``Batch -> [B, F, E]``.
        dense: ``Batch -> [B, D]``.
        heads: ``[B, H] -> {task: [B]}``.
    """

    config: DeepConfig
    embeddings: FeatureEmbeddings
    dense: DenseFeatures

    def __init__(
        self,
        config: DeepConfig,
        schema: Schema,
        tasks: tuple[str, ...],
        *,
        embedding_device: torch.device | None = None,
    ) -> None:
        super().__init__(config, schema, tasks)
        self.features = select_features(schema, config.features)
        self.embed(self.features, embedding_device)
        self.representation_dim = self.build()
        self.heads = TaskHeads(self.representation_dim, tasks, config.head, config.multi_task)

    def embed(self, features: list[Feature], device: torch.device | None) -> None:
        """Make ``embeddings`` and ``dense`` for ``features``, the tables on ``device``."""
        self.embeddings = FeatureEmbeddings(
            self.schema, features, self.config.embedding_dim, histories=self.config.histories, device=device
        )
        self.dense = DenseFeatures(self.schema, features)

    def build(self) -> int:
        """Make the layers between the inputs and the heads; returns H."""
        raise NotImplementedError

    def represent(self, batch: Batch) -> Tensor:
        """The representation ``[B, H]``, in any floating type."""
        raise NotImplementedError

    @property
    def input_dim(self) -> int:
        """I, the width of ``flat_inputs``."""
        return self.embeddings.num_features * self.config.embedding_dim + self.dense.num_features

    def flat_inputs(self, batch: Batch) -> Tensor:
        """All embeddings side by side, then the dense features: ``[B, I]``."""
        return flat_inputs(self.embeddings(batch), self.dense(batch))

    def forward(self, batch: Batch) -> ModelOutput:
        representation_BH = self.represent(batch).float()
        return ModelOutput(representation_BH, self.heads(representation_BH))
