"""Wukong: stacked factorization machines, so that layer l holds interactions of up to 2^l features.

Source: Zhang et al., Wukong: Towards a Scaling Law for Large-Scale Recommendation, ICML 2024, arXiv 2403.02545,
sections 3.2 to 3.6.

Shape letters: B examples, N tokens in, M tokens out, K columns of the low-rank projection, E width of a token (the
embedding dimension), H representation.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from rayfm.data.batch import Batch
from rayfm.models.backbone import Backbone, DeepConfig
from rayfm.models.base import MODELS
from rayfm.models.scaling import Width, Widths
from rayfm.models.tokens import TokenLinear, Tokens, ToTokens, token_shortcut


def low_rank_products(x_BNE: Tensor, projected_BKE: Tensor) -> Tensor:
    """Inner products of all tokens with K combinations of them, ``X X^T Y`` (section 3.6): ``-> [B, N, K]``.

    O(N K E) in place of the O(N^2 E) of all pairs.

    Args:
        x_BNE: X.
        projected_BKE: ``Y^T X``.
    """
    return torch.matmul(x_BNE, projected_BKE.transpose(1, 2))


class FactorizationBlock(nn.Module):
    """FMB: ``MLP(LN(flat(X X^T Y)))`` cut into tokens (section 3.4): ``[B, N, E] -> [B, M, E]``.

    Args:
        in_tokens: N.
        out_tokens: M.
        rank: K.
        hidden: widths of the MLP.
        dim: E.
    """

    def __init__(self, in_tokens: int, out_tokens: int, rank: int, hidden: tuple[int, ...], dim: int) -> None:
        super().__init__()
        self.projection = TokenLinear(in_tokens, rank)
        self.norm = nn.LayerNorm(in_tokens * rank)
        self.tokens = ToTokens(in_tokens * rank, hidden, out_tokens, dim)

    def forward(self, x_BNE: Tensor) -> Tensor:
        products_BNK = low_rank_products(x_BNE, self.projection(x_BNE))
        tokens_BME: Tensor = self.tokens(self.norm(products_BNK.flatten(1)))
        return tokens_BME


class WukongLayer(nn.Module):
    """``LN([FMB(X), LCB(X)] + X)`` (section 3.3): ``[B, N, E] -> [B, M, E]``, M the tokens of both blocks.

    The linear compression block passes on what the layers below found, so that a layer holds interactions of all lower
    orders too. Where M differs from N, a linear layer over the tokens stands in the short-cut.

    Args:
        in_tokens: N.
        config: the model's config.

    Attributes:
        out_tokens: M.
    """

    def __init__(self, in_tokens: int, config: Wukong.Config) -> None:
        super().__init__()
        dim = config.embedding_dim
        self.out_tokens = config.fm_tokens + config.linear_tokens
        self.factorization = FactorizationBlock(in_tokens, config.fm_tokens, config.rank, config.fm_hidden, dim)
        self.linear = TokenLinear(in_tokens, config.linear_tokens)
        self.shortcut = token_shortcut(in_tokens, self.out_tokens)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x_BNE: Tensor) -> Tensor:
        blocks_BME = torch.cat([self.factorization(x_BNE), self.linear(x_BNE)], dim=1)
        out: Tensor = self.norm(blocks_BME + self.shortcut(x_BNE))
        return out


@MODELS.register("wukong")
class Wukong(Backbone):
    """Tokens (an embedding a feature, one for all dense features) through a stack of layers, then an MLP.

    The representation is the MLP's last layer. To grow a Wukong, the paper adds layers, then tokens, rank and widths.

    Left out: the projection Y that depends on the example (section 3.6's attentive one; here it is learned, the same
    for all), and embeddings of several vectors for an important feature (section 3.2).

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
        >>> model = Wukong(Wukong.Config(embedding_dim=8, hidden=(32, 16)), schema, tasks=("click",))
        >>> output = model(synthetic_batch(schema, rows=4))
        >>> output.representation.shape, output.logits["click"].shape
        (torch.Size([4, 16]), torch.Size([4]))
    """

    class Config(DeepConfig):
        """Sizes of a Wukong."""

        type: Literal["wukong"] = "wukong"
        layers: int = Field(2, ge=1)
        fm_tokens: Width = 16
        """Tokens that a layer's factorization machine makes."""
        linear_tokens: Width = 16
        """Tokens that a layer's linear compression makes."""
        rank: Width = 8
        """Columns of the projection that each token is multiplied with."""
        fm_hidden: Widths = (128,)
        """Hidden widths of the MLP behind each factorization machine."""
        dense: Widths = (64,)
        """Hidden widths of the MLP that makes a token of the dense features."""
        hidden: Widths = (256, 128)
        """Widths of the last MLP."""

    config: Config

    def build(self) -> int:
        config = self.config
        self.tokens = Tokens(self.embeddings.num_features, self.dense.num_features, config.embedding_dim, config.dense)
        layers, count = [], self.tokens.count
        for _ in range(config.layers):
            layers.append(WukongLayer(count, config))
            count = layers[-1].out_tokens
        self.layers = nn.Sequential(*layers)
        self.deep = config.mlp(count * config.embedding_dim, config.hidden)
        return self.deep.out_dim

    def represent(self, batch: Batch) -> Tensor:
        tokens_BNE = self.tokens(self.embeddings(batch), self.dense(batch))
        deep_BH: Tensor = self.deep(self.layers(tokens_BNE).flatten(1))
        return deep_BH
