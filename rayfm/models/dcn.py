"""DCN: explicit feature crosses by one vector a layer, beside a deep network.

Source: Wang et al., Deep & Cross Network for Ad Click Predictions, ADKDD 2017, arXiv 1708.05123, sections 2.2 to 2.4.

Shape letters: B examples, I = F * E + D inputs, H representation.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from rayfm.data.batch import Batch
from rayfm.models.backbone import Backbone, DeepConfig
from rayfm.models.base import MODELS
from rayfm.models.scaling import Widths


class VectorCross(nn.Module):
    """``x_{l+1} = x_0 (x_l . w_l) + b_l + x_l`` (section 2.2, Eq. 3): ``[B, I], [B, I] -> [B, I]``.

    Args:
        in_dim: I.
    """

    def __init__(self, in_dim: int) -> None:
        super().__init__()
        self.weight_I = nn.Parameter(torch.empty(in_dim))
        self.bias_I = nn.Parameter(torch.empty(in_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A weight as of a linear layer, a bias of zero."""
        bound = 1 / math.sqrt(self.weight_I.shape[0])
        nn.init.uniform_(self.weight_I, -bound, bound)
        nn.init.zeros_(self.bias_I)

    def forward(self, x0_BI: Tensor, x_BI: Tensor) -> Tensor:
        return x0_BI * (x_BI @ self.weight_I).unsqueeze(1) + self.bias_I + x_BI


@MODELS.register("dcn")
class DCN(Backbone):
    """Cross network and MLP read the same input, heads read both of their outputs.

    Each cross adds 2 I parameters; DCNv2's matrices tell more features apart, at I^2. The representation is the cross
    network's output and the MLP's last layer side by side.

    Example::

        >>> from rayfm.models.synthetic import synthetic_batch
        >>> from rayfm.schema import Feature, Schema, Table, Task
        >>> schema = Schema(
        ...     tables={"user": Table(rows=100), "video": Table(rows=100)},
        ...     features=(Feature(name="user", kind="sparse"), Feature(name="video", kind="sparse")),
        ...     tasks=(Task(name="click"), Task(name="like")),
        ... )
        >>> model = DCN(DCN.Config(embedding_dim=8, hidden=(32, 16)), schema, tasks=("click", "like"))
        >>> output = model(synthetic_batch(schema, rows=4))
        >>> output.representation.shape, output.logits["like"].shape
        (torch.Size([4, 32]), torch.Size([4]))
    """

    class Config(DeepConfig):
        """Sizes of a DCN."""

        type: Literal["dcn"] = "dcn"
        cross_layers: int = Field(2, ge=1)
        hidden: Widths = (256, 128)
        """Widths of the deep network."""

    config: Config

    def build(self) -> int:
        self.cross = nn.ModuleList(VectorCross(self.input_dim) for _ in range(self.config.cross_layers))
        self.deep = self.config.mlp(self.input_dim, self.config.hidden)
        return self.input_dim + self.deep.out_dim

    def represent(self, batch: Batch) -> Tensor:
        x0_BI = x_BI = self.flat_inputs(batch)
        for layer in self.cross:
            x_BI = layer(x0_BI, x_BI)
        return torch.cat([x_BI, self.deep(x0_BI)], dim=1)
