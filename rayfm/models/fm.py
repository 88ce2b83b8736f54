"""The factorization machine, and its terms for models that build on it.

Source: Rendle, Factorization Machines, ICDM 2010, Eq. 1 and lemma 3.1 (the pairwise sum in linear time).

Shape letters: B examples, F embedded features, E embedding dimension, D dense features, T tasks, H representation.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from rayfm.data.batch import Batch
from rayfm.models.base import MODELS, Model, ModelConfig, ModelOutput
from rayfm.models.embeddings import INIT_STD, DenseFeatures, FeatureEmbeddings, flat_inputs, select_features
from rayfm.models.histories import HistoryFeature
from rayfm.models.mlp import full_precision, per_task
from rayfm.schema import Feature, Schema


def pairwise_interactions(factors_BFE: Tensor) -> Tensor:
    """Sum over all pairs of different features of the products of their factors: ``[B, F, E] -> [B, E]``.

    Half of (the square of the sum minus the sum of the squares): O(F E) instead of O(F^2 E).
    """
    total_BE = factors_BFE.sum(dim=1)
    return 0.5 * (total_BE.square() - factors_BFE.square().sum(dim=1))


class DenseFactors(nn.Module):
    """A linear weight per task and a factor vector for each dense feature (Rendle's real-valued x_i)."""

    def __init__(self, num_features: int, num_tasks: int, embedding_dim: int) -> None:
        super().__init__()
        self.weights_DT = nn.Parameter(torch.empty(num_features, num_tasks))
        self.factors_DE = nn.Parameter(torch.empty(num_features, embedding_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Linear weights of zero, small normal factors."""
        nn.init.zeros_(self.weights_DT)
        nn.init.normal_(self.factors_DE, std=INIT_STD)

    def forward(self, dense_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Linear terms ``[B, T]`` and factors ``[B, D, E]``."""
        with full_precision(dense_BD):
            return dense_BD @ self.weights_DT, dense_BD.unsqueeze(2) * self.factors_DE


class ProductHeads(nn.Module):
    """A logit per task from a vector of products: its sum for one task, a weighted sum of its own for each of several.

    ``z_t = x . a_t + b_t`` with a_t = 1 at first; with one task a stays 1, which the embeddings can absorb.

    Args:
        width: length of the vector.
        num_tasks: T.
    """

    def __init__(self, width: int, num_tasks: int) -> None:
        super().__init__()
        self.scale_TE = nn.Parameter(torch.empty(num_tasks, width)) if num_tasks > 1 else None
        self.bias_T = nn.Parameter(torch.empty(num_tasks))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scales of one, biases of zero."""
        if self.scale_TE is not None:
            nn.init.ones_(self.scale_TE)
        nn.init.zeros_(self.bias_T)

    def forward(self, products_BE: Tensor) -> Tensor:
        """Logits ``[B, T]``."""
        if self.scale_TE is None:
            return products_BE.sum(dim=1, keepdim=True) + self.bias_T
        with full_precision(products_BE):
            return products_BE.float() @ self.scale_TE.T + self.bias_T


class FactorizationTerms(nn.Module):
    """The linear and the pairwise terms of a factorization machine.

    Linear weights are a second set of collections: rowwise Adagrad keeps one step size a row, and weights and factors
    of one row would share it. Their width is T rounded up to a multiple of 4, as fbgemm's fused tables need; column t
    is task t's, and the columns after T get no gradient.

    Args:
        schema: the pipeline's schema.
        features: what the machine reads.
        num_tasks: T.
        embedding_dim: E.
        device: where the collections are built.
        histories: teachers' representations, each with a projection to a linear weight and one to factors.
    """

    def __init__(
        self,
        schema: Schema,
        features: list[Feature],
        num_tasks: int,
        embedding_dim: int,
        device: torch.device | None = None,
        histories: tuple[HistoryFeature, ...] = (),
    ) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.factors = FeatureEmbeddings(schema, features, embedding_dim, histories=histories, device=device)
        self.weights = FeatureEmbeddings(
            schema, features, -(-num_tasks // 4) * 4, init_std=0.0, histories=histories, device=device
        )
        self.dense = DenseFeatures(schema, features)
        self.dense_factors = (
            DenseFactors(self.dense.num_features, num_tasks, embedding_dim) if self.dense.num_features else None
        )

    def parts(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings ``[B, F, E]``, factors of all features ``[B, F + D, E]``, linear terms ``[B, T]``."""
        embeddings_BFE = self.factors(batch)
        linear_BT = self.weights(batch)[:, :, : self.num_tasks].sum(dim=1)
        factors_BFE = embeddings_BFE
        if self.dense_factors is not None:
            dense_linear_BT, dense_BDE = self.dense_factors(self.dense(batch))
            linear_BT = linear_BT + dense_linear_BT
            factors_BFE = torch.cat([embeddings_BFE, dense_BDE], dim=1)
        return embeddings_BFE, factors_BFE, linear_BT

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings ``[B, F, E]``, pairwise terms before their sum ``[B, E]``, linear terms ``[B, T]``."""
        embeddings_BFE, factors_BFE, linear_BT = self.parts(batch)
        return embeddings_BFE, pairwise_interactions(factors_BFE), linear_BT


@MODELS.register("fm")
class FM(Model):
    """A bias, a weight of each feature, and the inner product of every two features' factors.

    ``z = b + sum_i w_i x_i + sum_{i<j} <v_i, v_j> x_i x_j``.

    With several tasks, each has its own b and w and its own weights on the E products; the factors are shared. What a
    distillation head shares with the serving head are the factors, so the representation is the factors side by side
    and the dense features, H = F * E + D: a head on the products themselves pulls the sum that is the logit, which made
    the NE of an FM on KuaiRand's warm-up days worse, while a head on the factors made it a little better.

    Example::

        >>> from rayfm.models.synthetic import synthetic_batch
        >>> from rayfm.schema import Feature, Schema, Table, Task
        >>> schema = Schema(
        ...     tables={"user": Table(rows=100), "video": Table(rows=100)},
        ...     features=(Feature(name="user", kind="sparse"), Feature(name="video", kind="sparse")),
        ...     tasks=(Task(name="click"),),
        ... )
        >>> model = FM(FM.Config(embedding_dim=8), schema, tasks=("click",))
        >>> output = model(synthetic_batch(schema, rows=4))
        >>> output.representation.shape, output.logits["click"].shape
        (torch.Size([4, 16]), torch.Size([4]))
    """

    class Config(ModelConfig):
        """Sizes of an FM: ``embedding_dim`` is the number of factors."""

        type: Literal["fm"] = "fm"

    def __init__(
        self,
        config: ModelConfig,
        schema: Schema,
        tasks: tuple[str, ...],
        *,
        embedding_device: torch.device | None = None,
    ) -> None:
        super().__init__(config, schema, tasks)
        features = select_features(schema, config.features)
        self.terms = FactorizationTerms(
            schema, features, len(tasks), config.embedding_dim, embedding_device, config.histories
        )
        self.heads = ProductHeads(config.embedding_dim, len(tasks))
        self.representation_dim = self.terms.factors.num_features * config.embedding_dim + self.terms.dense.num_features

    def pairwise(self, factors_BFE: Tensor) -> Tensor:
        """The pairwise terms before their sum: ``[B, F + D, E] -> [B, E]``."""
        return pairwise_interactions(factors_BFE)

    def forward(self, batch: Batch) -> ModelOutput:
        embeddings_BFE, factors_BFE, linear_BT = self.terms.parts(batch)
        logits_BT = self.heads(self.pairwise(factors_BFE)) + linear_BT
        representation_BH = flat_inputs(embeddings_BFE, self.terms.dense(batch))
        return ModelOutput(representation_BH.float(), per_task(logits_BT, self.tasks))
