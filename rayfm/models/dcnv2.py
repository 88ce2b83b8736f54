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
from rayfm.models.backbone import Backbone, DeepConfig
from rayfm.models.base import MODELS
from rayfm.models.scaling import OptionalWidth, Widths


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
class DCNv2(Backbone):
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

    class Config(DeepConfig):
        """Sizes of a DCNv2."""

        type: Literal["dcnv2"] = "dcnv2"
        cross_layers: int = Field(2, ge=1)
        low_rank: OptionalWidth = None
        """Rank of the cross matrices; a quarter of I keeps most of their accuracy. None: full matrices."""
        hidden: Widths = (256, 128)
        """Widths of the deep network."""

    config: Config

    def build(self) -> int:
        self.cross = CrossNetwork(self.input_dim, self.config.cross_layers, self.config.low_rank)
        self.deep = self.config.mlp(self.input_dim, self.config.hidden)
        return self.input_dim + self.deep.out_dim

    def represent(self, batch: Batch) -> Tensor:
        x_BI = self.flat_inputs(batch)
        return torch.cat([self.cross(x_BI), self.deep(x_BI)], dim=1)
