"""DHEN: each layer is an ensemble of different interaction modules, and layers are stacked.

Source: Zhang et al., DHEN: A Deep and Hierarchical Ensemble Network for Large-Scale Click-Through Rate Prediction,
DLP-KDD 2022, arXiv 2203.11014, section 3.

Shape letters: B examples, N tokens in, M tokens of a module, E width of a token (the embedding dimension),
H representation.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from rayfm.data.batch import Batch
from rayfm.models.attention import AttentionBlock, require_heads
from rayfm.models.backbone import Backbone, DeepConfig
from rayfm.models.base import MODELS
from rayfm.models.dcnv2 import CrossNetwork
from rayfm.models.dlrm import dot_interaction
from rayfm.models.scaling import Width, Widths
from rayfm.models.tokens import TokenLinear, Tokens, ToTokens, token_shortcut

InteractionName = Literal["dot", "linear", "cross", "attention"]


class DotInteraction(nn.Module):
    """Dot products of all pairs of tokens, then an MLP cut into tokens: ``[B, N, E] -> [B, M, E]``."""

    def __init__(self, in_tokens: int, out_tokens: int, dim: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.tokens = ToTokens(in_tokens * (in_tokens - 1) // 2, hidden, out_tokens, dim)

    def forward(self, x_BNE: Tensor) -> Tensor:
        out: Tensor = self.tokens(dot_interaction(x_BNE))
        return out


class CrossInteraction(nn.Module):
    """A cross of the flat tokens with themselves (DCNv2, low rank), then M weighted sums of the N tokens."""

    def __init__(self, in_tokens: int, out_tokens: int, dim: int, rank: int) -> None:
        super().__init__()
        self.cross = CrossNetwork(in_tokens * dim, 1, rank)
        self.linear = TokenLinear(in_tokens, out_tokens)

    def forward(self, x_BNE: Tensor) -> Tensor:
        out: Tensor = self.linear(self.cross(x_BNE.flatten(1)).view_as(x_BNE))
        return out


class AttentionInteraction(nn.Module):
    """A transformer's layer over the tokens, then M weighted sums of them: ``[B, N, E] -> [B, M, E]``."""

    def __init__(self, in_tokens: int, out_tokens: int, dim: int, heads: int) -> None:
        super().__init__()
        self.block = AttentionBlock(dim, heads)
        self.linear = TokenLinear(in_tokens, out_tokens)

    def forward(self, x_BNE: Tensor) -> Tensor:
        out: Tensor = self.linear(self.block(x_BNE, x_BNE.new_ones(x_BNE.shape[:2], dtype=torch.bool)))
        return out


class InteractionConfig(DeepConfig):
    """Sizes of the interaction modules."""

    interactions: tuple[InteractionName, ...] = Field(("dot", "linear", "cross", "attention"), min_length=1)
    """Modules of each layer's ensemble: dot products, weighted sums, crosses (DCNv2), self-attention."""
    dot_hidden: Widths = (128,)
    """Hidden widths of the MLP behind the dot products."""
    cross_rank: Width = 32
    """Rank of the crosses' matrices."""
    heads: int = Field(2, ge=1)
    """Heads of the self-attention, a divisor of ``embedding_dim``."""
    dense: Widths = (64,)
    """Hidden widths of the MLP that makes a token of the dense features."""

    @model_validator(mode="after")
    def _interactions_fit(self) -> InteractionConfig:
        for name in self.interactions:
            if self.interactions.count(name) > 1:
                raise ValueError(f"interactions: {name!r} stands twice; name it once")
        require_heads(self.embedding_dim, self.heads)
        return self

    def interaction(self, name: InteractionName, in_tokens: int, out_tokens: int) -> nn.Module:
        """The module called ``name``: ``[B, N, E] -> [B, M, E]``."""
        dim = self.embedding_dim
        if name == "dot":
            return DotInteraction(in_tokens, out_tokens, dim, self.dot_hidden)
        if name == "linear":
            return TokenLinear(in_tokens, out_tokens)
        if name == "cross":
            return CrossInteraction(in_tokens, out_tokens, dim, self.cross_rank)
        return AttentionInteraction(in_tokens, out_tokens, dim, self.heads)


class EnsembleLayer(nn.Module):
    """``Norm(ensemble of u_i(X) + shortcut(X))`` (section 3, Eq. 1 and 2): ``[B, N, E] -> [B, out_tokens, E]``.

    Args:
        in_tokens: N.
        tokens: M, which each module u_i makes.
        config: which modules, and their sizes.
        ensemble: side by side, or their sum.

    Attributes:
        out_tokens: M times the number of modules side by side, M of their sum.
    """

    def __init__(
        self, in_tokens: int, tokens: int, config: InteractionConfig, ensemble: Literal["concat", "sum"]
    ) -> None:
        super().__init__()
        self.interactions = nn.ModuleList(config.interaction(name, in_tokens, tokens) for name in config.interactions)
        self.concat = ensemble == "concat"
        self.out_tokens = tokens * (len(self.interactions) if self.concat else 1)
        self.shortcut = token_shortcut(in_tokens, self.out_tokens)
        self.norm = nn.LayerNorm(config.embedding_dim)

    def forward(self, x_BNE: Tensor) -> Tensor:
        outputs = [interaction(x_BNE) for interaction in self.interactions]
        ensemble = torch.cat(outputs, dim=1) if self.concat else torch.stack(outputs).sum(dim=0)
        out: Tensor = self.norm(ensemble + self.shortcut(x_BNE))
        return out


@MODELS.register("dhen")
class DHEN(Backbone):
    """Tokens (an embedding a feature, one for all dense features) through a stack of ensembles, then an MLP.

    The representation is the MLP's last layer.

    Left out: the convolution module, a weighted sum as ensemble, modules that differ from layer to layer, and the
    training system (section 4; sharding is TorchRec's).

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
        >>> model = DHEN(DHEN.Config(embedding_dim=8, hidden=(32, 16)), schema, tasks=("click",))
        >>> output = model(synthetic_batch(schema, rows=4))
        >>> output.representation.shape, output.logits["click"].shape
        (torch.Size([4, 16]), torch.Size([4]))
    """

    class Config(InteractionConfig):
        """Sizes of a DHEN."""

        type: Literal["dhen"] = "dhen"
        layers: int = Field(2, ge=1)
        tokens: Width = 8
        """Tokens that each module of a layer makes."""
        ensemble: Literal["concat", "sum"] = "concat"
        """How a layer joins its modules' tokens: side by side, or their sum."""
        hidden: Widths = (256, 128)
        """Widths of the last MLP."""

    config: Config

    def build(self) -> int:
        config = self.config
        self.tokens = Tokens(self.embeddings.num_features, self.dense.num_features, config.embedding_dim, config.dense)
        layers, count = [], self.tokens.count
        for _ in range(config.layers):
            layers.append(EnsembleLayer(count, config.tokens, config, config.ensemble))
            count = layers[-1].out_tokens
        self.layers = nn.Sequential(*layers)
        self.deep = config.mlp(count * config.embedding_dim, config.hidden)
        return self.deep.out_dim

    def represent(self, batch: Batch) -> Tensor:
        tokens_BNE = self.tokens(self.embeddings(batch), self.dense(batch))
        deep_BH: Tensor = self.deep(self.layers(tokens_BNE).flatten(1))
        return deep_BH
