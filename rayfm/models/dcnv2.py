"""DCNv2: explicit feature crosses beside a deep network.

Source: Wang et al., DCN V2: Improved Deep & Cross Network, WWW 2021, arXiv 2008.13535, sections 3.2 to 3.4.

Shape letters: B examples, F embedded features, E embedding dimension, D dense features, I = F * E + D inputs,
H representation.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from rayfm.data.batch import Batch
from rayfm.models.base import MODELS, Model, ModelConfig, ModelOutput
from rayfm.models.embeddings import DenseFeatures, FeatureEmbeddings, flat_inputs, select_features
from rayfm.models.mlp import MLP, TaskHeads
from rayfm.schema import Schema


class CrossNetwork(nn.Module):
    """``x_{l+1} = x_0 * (W_l x_l + b_l) + x_l``, with ``W_l = U_l V_l`` where a rank is given: ``[B, I] -> [B, I]``.

    torchrec's CrossNet and LowRankCrossNet compute the same, but they cannot be built on the meta device (their weights
    are loose parameters without ``reset_parameters``), and CrossNet's layout takes a quarter more time.

    Args:
        in_dim: I.
        num_layers: number of crosses.
        low_rank: rank of each W, or None for full matrices.
    """

    def __init__(self, in_dim: int, num_layers: int, low_rank: int | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(in_dim, in_dim)
            if low_rank is None
            else nn.Sequential(nn.Linear(in_dim, low_rank, bias=False), nn.Linear(low_rank, in_dim))
            for _ in range(num_layers)
        )

    def forward(self, x0_BI: Tensor) -> Tensor:
        x_BI = x0_BI
        for layer in self.layers:
            x_BI = x0_BI * layer(x_BI) + x_BI
        return x_BI


@MODELS.register("dcnv2")
class DCNv2(Model):
    """The parallel structure: cross network and MLP read the same input, heads read both of their outputs.

    The representation is the cross network's output and the MLP's last layer side by side.

    Example::

        >>> from rayfm.models.synthetic import synthetic_batch
        >>> from rayfm.schema import Feature, Schema, Table, Task
        >>> schema = Schema(
        ...     tables={"user": Table(rows=100), "video": Table(rows=100)},
        ...     features=(Feature(name="user", kind="sparse"), Feature(name="video", kind="sparse")),
        ...     tasks=(Task(name="click"), Task(name="like")),
        ... )
        >>> model = DCNv2(DCNv2.Config(embedding_dim=8, hidden=(32, 16)), schema, tasks=("click", "like"))
        >>> output = model(synthetic_batch(schema, rows=4))
        >>> output.representation.shape, output.logits["like"].shape
        (torch.Size([4, 32]), torch.Size([4]))
    """

    class Config(ModelConfig):
        """Sizes of a DCNv2."""

        type: Literal["dcnv2"] = "dcnv2"
        cross_layers: int = Field(2, ge=1)
        low_rank: int | None = Field(None, ge=1)
        """Rank of the cross matrices; a quarter of I keeps most of their accuracy. None: full matrices."""
        hidden: tuple[int, ...] = (256, 128)
        """Widths of the deep network."""
        head: tuple[int, ...] = ()
        """Hidden widths of each task's head."""
        dropout: float = Field(0.0, ge=0, lt=1)
        layer_norm: bool = False

    def __init__(
        self,
        config: Config,
        schema: Schema,
        tasks: tuple[str, ...],
        *,
        embedding_device: torch.device | None = None,
    ) -> None:
        super().__init__(config, schema, tasks)
        features = select_features(schema, config.features)
        self.embeddings = FeatureEmbeddings(schema, features, config.embedding_dim, device=embedding_device)
        self.dense = DenseFeatures(schema, features)
        in_dim = self.embeddings.num_features * config.embedding_dim + self.dense.num_features
        self.cross = CrossNetwork(in_dim, config.cross_layers, config.low_rank)
        self.deep = MLP(in_dim, config.hidden, config.dropout, config.layer_norm)
        self.representation_dim = in_dim + self.deep.out_dim
        self.heads = TaskHeads(self.representation_dim, tasks, config.head)

    def forward(self, batch: Batch) -> ModelOutput:
        x_BI = flat_inputs(self.embeddings(batch), self.dense(batch))
        representation_BH = torch.cat([self.cross(x_BI), self.deep(x_BI)], dim=1)
        representation_BH = representation_BH.float()
        return ModelOutput(representation_BH, self.heads(representation_BH))
