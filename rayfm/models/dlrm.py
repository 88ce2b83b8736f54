"""DLRM: dot products between embedded features and a dense vector.

Source: Naumov et al., Deep Learning Recommendation Model for Personalization and Recommendation Systems, 2019,
arXiv 1906.00091.

Shape letters: B examples, F embedded features, E embedding dimension, D dense features, H representation.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rayfm.data.batch import Batch
from rayfm.models.backbone import Backbone, DeepConfig
from rayfm.models.base import MODELS
from rayfm.models.mlp import MLP
from rayfm.models.scaling import Widths


def dot_interaction(vectors_BFE: Tensor) -> Tensor:
    """Dot products of all pairs of different vectors: ``[B, F, E] -> [B, F * (F - 1) / 2]``."""
    count = vectors_BFE.shape[1]
    rows, columns = torch.triu_indices(count, count, offset=1, device=vectors_BFE.device)
    products_BFF = torch.bmm(vectors_BFE, vectors_BFE.transpose(1, 2))
    # A flat index_select: its gradient takes half the time of indexing with two tensors.
    return products_BFF.flatten(1).index_select(1, rows * count + columns)


@MODELS.register("dlrm")
class DLRM(Backbone):
    """Dense architecture, dot interaction, over architecture, a head per task.

    The dense features go through an MLP to a vector of width E that interacts as one more feature and is passed on as
    it is. Without dense features, the flat embeddings are passed on in its place: the dot products alone have
    vanishing gradients where tables start near zero. The representation is the over architecture's last hidden layer.

    Example::

        >>> from rayfm.models.synthetic import synthetic_batch
        >>> from rayfm.schema import Feature, Schema, Table, Task
        >>> schema = Schema(
        ...     tables={"user": Table(rows=100), "video": Table(rows=100)},
        ...     features=(
        ...         Feature(name="age", kind="dense"),
        ...         Feature(name="user", kind="sparse"),
        ...         Feature(name="video", kind="sparse"),
        ...     ),
        ...     tasks=(Task(name="click"),),
        ... )
        >>> model = DLRM(DLRM.Config(over=(64, 32)), schema, tasks=("click",))
        >>> output = model(synthetic_batch(schema, rows=4))
        >>> output.representation.shape, output.logits["click"].shape
        (torch.Size([4, 32]), torch.Size([4]))
    """

    class Config(DeepConfig):
        """Sizes of a DLRM."""

        type: Literal["dlrm"] = "dlrm"
        dense: Widths = (64,)
        """Hidden widths of the dense architecture, before its last layer of width E."""
        over: Widths = (256, 128)
        """Widths of the over architecture."""

    config: Config

    def build(self) -> int:
        dim, dense = self.config.embedding_dim, self.dense.num_features
        self.dense_arch = MLP(dense, (*self.config.dense, dim)) if dense else None
        vectors = self.embeddings.num_features + (self.dense_arch is not None)
        passed_on = dim if self.dense_arch is not None else self.embeddings.num_features * dim
        self.over_arch = self.config.mlp(passed_on + vectors * (vectors - 1) // 2, self.config.over)
        return self.over_arch.out_dim

    def represent(self, batch: Batch) -> Tensor:
        vectors_BFE = self.embeddings(batch)
        if self.dense_arch is not None:
            passed_on_BP = self.dense_arch(self.dense(batch))
            vectors_BFE = torch.cat([passed_on_BP.unsqueeze(1), vectors_BFE], dim=1)
        else:
            passed_on_BP = vectors_BFE.flatten(1)
        representation_BH: Tensor = self.over_arch(torch.cat([passed_on_BP, dot_interaction(vectors_BFE)], dim=1))
        return representation_BH
