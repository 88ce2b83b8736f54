"""FmFM: a factorization machine in which a matrix for each pair of fields stands between their factors.

Source: Sun et al., FM2: Field-matrixed Factorization Machines for Recommender Systems, WWW 2021, arXiv 2102.12994,
section 3.

Shape letters: B examples, F fields (embedded features, then dense ones), P = F * (F - 1) / 2 pairs of fields,
E embedding dimension.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from rayfm.models.base import MODELS, ModelConfig
from rayfm.models.fm import FM
from rayfm.models.mlp import full_precision
from rayfm.schema import Schema


def field_interactions(factors_BFE: Tensor, matrices_PEE: Tensor) -> Tensor:
    """``sum_j (sum_{i<j} v_i M_ij) * v_j``: ``[B, F, E] -> [B, E]``; its sum over E is ``sum_{i<j} v_i M_ij v_j^T``.

    Summing over i before the product with v_j takes one matrix product a field, and no memory for the pairs.

    Args:
        factors_BFE: v_i.
        matrices_PEE: M_ij of the pairs (0, 1), (0, 2), (1, 2), (0, 3), ...: by j, then by i.
    """
    count, dim = factors_BFE.shape[1:]
    flat_BI = factors_BFE.flatten(1)
    total_BE = torch.zeros_like(factors_BFE[:, 0]) if count else factors_BFE.sum(dim=1)
    for j in range(1, count):
        first = j * (j - 1) // 2
        matrices_IE = matrices_PEE[first : first + j].reshape(j * dim, dim)
        total_BE = total_BE + (flat_BI[:, : j * dim] @ matrices_IE) * factors_BFE[:, j]
    return total_BE


class FieldMatrices(nn.Module):
    """The matrices of all pairs of fields, and `field_interactions` with them: ``[B, F, E] -> [B, E]``, float32.

    Args:
        num_fields: F.
        dim: E.
    """

    def __init__(self, num_fields: int, dim: int) -> None:
        super().__init__()
        self.matrices_PEE = nn.Parameter(torch.empty(num_fields * (num_fields - 1) // 2, dim, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Identities: training starts from the FM."""
        with torch.no_grad():
            identity = torch.eye(self.matrices_PEE.shape[1], device=self.matrices_PEE.device)
            self.matrices_PEE.copy_(identity.expand_as(self.matrices_PEE))

    def forward(self, factors_BFE: Tensor) -> Tensor:
        with full_precision(factors_BFE):
            return field_interactions(factors_BFE.float(), self.matrices_PEE)


@MODELS.register("fmfm")
class FmFM(FM):
    """``z = b + sum_i w_i x_i + sum_{i<j} v_i M_ij v_j^T x_i x_j``, i and j being fields of the schema.

    Several tasks, linear weights and the representation are as in the FM. A field is a feature of the schema, a dense
    one too; the ids of a list are one field. The matrices are dense parameters: E^2 P of them.

    Left out: fields of different widths, and with them matrices that are not square (section 3.3); every table has
    the width E.

    Example::

        >>> from rayfm.models.synthetic import synthetic_batch
        >>> from rayfm.schema import Feature, Schema, Table, Task
        >>> schema = Schema(
        ...     tables={"user": Table(rows=100), "video": Table(rows=100)},
        ...     features=(Feature(name="user", kind="sparse"), Feature(name="video", kind="sparse")),
        ...     tasks=(Task(name="click"),),
        ... )
        >>> model = FmFM(FmFM.Config(embedding_dim=8), schema, tasks=("click",))
        >>> output = model(synthetic_batch(schema, rows=4))
        >>> output.representation.shape, output.logits["click"].shape
        (torch.Size([4, 16]), torch.Size([4]))
    """

    class Config(ModelConfig):
        """Sizes of an FmFM: ``embedding_dim`` is the number of factors."""

        type: Literal["fmfm"] = "fmfm"

    def __init__(
        self,
        config: Config,
        schema: Schema,
        tasks: tuple[str, ...],
        *,
        embedding_device: torch.device | None = None,
    ) -> None:
        super().__init__(config, schema, tasks, embedding_device=embedding_device)
        fields = self.terms.factors.num_features + self.terms.dense.num_features
        self.matrices = FieldMatrices(fields, config.embedding_dim)

    def pairwise(self, factors_BFE: Tensor) -> Tensor:
        pairwise_BE: Tensor = self.matrices(factors_BFE)
        return pairwise_BE
