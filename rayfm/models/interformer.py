"""InterFormer: features and sequences learn from summaries of each other, layer by layer.

Source: Zeng et al., InterFormer: Effective Heterogeneous Interaction Learning for Click-Through Rate Prediction, CIKM
2025, arXiv 2411.09852, section 4.

Shape letters: B examples, N tokens of features, S tokens of a summary, L longest sequence, K sequences, E width of a
token (the embedding dimension), H representation.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from rayfm.config import ConfigError
from rayfm.data.batch import Batch
from rayfm.models.attention import Attention, require_heads
from rayfm.models.base import MODELS
from rayfm.models.dhen import EnsembleLayer, InteractionConfig, InteractionName
from rayfm.models.embeddings import select_features
from rayfm.models.scaling import Width, Widths
from rayfm.models.sequences import PaddedSequence, SequenceBackbone, SequenceConfig
from rayfm.models.tokens import TokenLinear, Tokens
from rayfm.schema import Feature, Schema


def newest_first(sequence: PaddedSequence, length: int) -> Tensor:
    """``[B, length, E]``: the newest item, then the one before; zeros behind the oldest."""
    values_BLE = sequence.values
    order_BL = sequence.ages.unsqueeze(2).expand_as(values_BLE)
    reversed_BLE = values_BLE.gather(1, order_BL) * sequence.mask.unsqueeze(2)
    return nn.functional.pad(reversed_BLE, (0, 0, 0, length - values_BLE.shape[1]))


class Gate(nn.Module):
    """``sigmoid(X W + b) * X``, by which a summary keeps what matters: ``[B, S, E]`` (section 4.4)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x_BSE: Tensor) -> Tensor:
        return torch.sigmoid(self.linear(x_BSE)) * x_BSE


class MaskNet(nn.Module):
    """``MLP_lce(S * MLP_mask(S))``: one sequence of K side by side (section 4.1), ``[B, L, K E] -> [B, L, E]``.

    Args:
        sequences: K.
        dim: E.
    """

    def __init__(self, sequences: int, dim: int) -> None:
        super().__init__()
        width = sequences * dim
        self.mask = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.compress = nn.Linear(width, dim)

    def forward(self, x_BLI: Tensor) -> Tensor:
        out: Tensor = self.compress(x_BLI * self.mask(x_BLI))
        return out


class FeatureSummary(nn.Module):
    """Cross arch, from features to sequences: ``Gate(LCE(X))``, ``[B, N, E] -> [B, S, E]`` (section 4.4)."""

    def __init__(self, in_tokens: int, out_tokens: int, dim: int) -> None:
        super().__init__()
        self.compress, self.gate = TokenLinear(in_tokens, out_tokens), Gate(dim)

    def forward(self, x_BNE: Tensor) -> Tensor:
        out: Tensor = self.gate(self.compress(x_BNE))
        return out


class SequenceSummary(nn.Module):
    """Cross arch, from sequences to features: ``Gate([S_CLS, S_PMA, S_recent])`` (section 4.4), ``-> [B, S, E]``.

    The leading tokens, which came from the features; what learned queries attend to (pooling by multi-head attention);
    and the newest items.

    Args:
        cls: leading tokens.
        config: the model's config.

    Attributes:
        out_tokens: S.
    """

    def __init__(self, cls: int, config: InterFormer.Config) -> None:
        super().__init__()
        dim = config.embedding_dim
        self.cls, self.recent = cls, config.recent_tokens
        self.queries = Queries(config.pooled_tokens, dim)
        self.pool = Attention(dim, config.heads)
        self.gate = Gate(dim)
        self.out_tokens = cls + config.pooled_tokens + config.recent_tokens

    def forward(self, s_BLE: Tensor, mask_BL: Tensor) -> Tensor:
        """``s_BLE`` holds the leading tokens, then items, newest first; ``mask_BL`` is True for the former."""
        pooled = self.pool(self.queries(s_BLE.shape[0]), s_BLE, mask_BL)
        recent = s_BLE[:, self.cls : self.cls + self.recent]
        out: Tensor = self.gate(torch.cat([s_BLE[:, : self.cls], pooled, recent], dim=1))
        return out


class Queries(nn.Module):
    """Learned tokens, the same for every example: ``-> [B, S, E]``."""

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.tokens_SE = nn.Parameter(torch.empty(count, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Standard normal."""
        nn.init.normal_(self.tokens_SE)

    def forward(self, rows: int) -> Tensor:
        return self.tokens_SE.expand(rows, -1, -1).contiguous()


class PersonalizedLinear(nn.Module):
    """PFFN: each example's sequence through a matrix made of its features' summary (section 4.3): ``[B, L, E]``.

    Args:
        summary: S.
        dim: E.
    """

    def __init__(self, summary: int, dim: int) -> None:
        super().__init__()
        self.matrix = nn.Linear(summary * dim, dim * dim)

    def forward(self, summary_BSE: Tensor, s_BLE: Tensor) -> Tensor:
        matrix_BEE: Tensor = self.matrix(summary_BSE.flatten(1)).unflatten(1, (s_BLE.shape[2], s_BLE.shape[2]))
        return torch.bmm(s_BLE.to(matrix_BEE.dtype), matrix_BEE)


class SequenceArch(nn.Module):
    """``Norm(S + MHA(PFFN(S, X_sum)))`` with rotary positions (section 4.3): ``[B, L, E]``, zeros at padding."""

    def __init__(self, summary: int, config: InterFormer.Config) -> None:
        super().__init__()
        self.personalized = PersonalizedLinear(summary, config.embedding_dim)
        self.attention = Attention(config.embedding_dim, config.heads, rotary=True)
        self.norm = nn.LayerNorm(config.embedding_dim)

    def forward(self, s_BLE: Tensor, summary_BSE: Tensor, mask_BL: Tensor) -> Tensor:
        read_BLE = self.personalized(summary_BSE, s_BLE)
        out_BLE: Tensor = self.norm(s_BLE + self.attention(read_BLE, read_BLE, mask_BL))
        return out_BLE * mask_BL.unsqueeze(2)


class InterFormerLayer(nn.Module):
    """Both ways at once: features read the sequence's summary, the sequence is read through the features' summary.

    ``X' = Interaction([X, S_sum])``, ``S' = MHA(PFFN(S, X_sum))`` (section 4.2 and 4.3). The interaction is a layer of
    DHEN's modules, summed, with as many tokens as there are features.

    Args:
        tokens: N.
        config: the model's config.
    """

    def __init__(self, tokens: int, config: InterFormer.Config) -> None:
        super().__init__()
        self.features = FeatureSummary(tokens, config.summary_tokens, config.embedding_dim)
        self.sequences = SequenceSummary(config.summary_tokens, config)
        self.interaction = EnsembleLayer(tokens + self.sequences.out_tokens, tokens, config, "sum")
        self.sequence_arch = SequenceArch(config.summary_tokens, config)

    def forward(self, x_BNE: Tensor, s_BLE: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        """X' and S', shaped as X and S."""
        x_sum, s_sum = self.features(x_BNE), self.sequences(s_BLE, mask_BL)
        return self.interaction(torch.cat([x_BNE, s_sum], dim=1)), self.sequence_arch(s_BLE, x_sum, mask_BL)


@MODELS.register("interformer")
class InterFormer(SequenceBackbone):
    """Interaction arch for features, sequence arch for what a user did, a cross arch that hands summaries over.

    Features are tokens (an embedding each, one for all dense features). All sequences become one, item by item from the
    newest on (so they should be columns of one history), headed by the features' first summary. Neither side is
    summarised before the last layer; then an MLP reads the summaries of both, and its last layer is the representation.

    The short-cuts and layer norms around both arches are DHEN's and the transformer's; the paper leaves them open. Left
    out: other interaction modules than DHEN's four.

    Example::

        >>> from rayfm.models.synthetic import synthetic_batch
        >>> from rayfm.schema import Feature, Schema, Table, Task
        >>> schema = Schema(
        ...     tables={"user": Table(rows=100), "video": Table(rows=100)},
        ...     features=(
        ...         Feature(name="user", kind="sparse"),
        ...         Feature(name="video", kind="sparse"),
        ...         Feature(name="watched", kind="sequence", table="video", max_len=20),
        ...     ),
        ...     tasks=(Task(name="click"),),
        ... )
        >>> model = InterFormer(InterFormer.Config(embedding_dim=8, hidden=(32, 16)), schema, tasks=("click",))
        >>> output = model(synthetic_batch(schema, rows=4))
        >>> output.representation.shape, output.logits["click"].shape
        (torch.Size([4, 16]), torch.Size([4]))
    """

    class Config(InteractionConfig, SequenceConfig):
        """Sizes of an InterFormer. The schema needs a feature of kind sequence, with a ``max_len``."""

        type: Literal["interformer"] = "interformer"
        layers: int = Field(2, ge=1)
        interactions: tuple[InteractionName, ...] = Field(("dot",), min_length=1)
        """Modules of the interaction arch: dot products, weighted sums, crosses (DCNv2), self-attention."""
        summary_tokens: Width = 4
        """Tokens of a summary of the features, and of the sequence's head."""
        pooled_tokens: Width = 2
        """Learned queries of a summary of the sequence."""
        recent_tokens: int = Field(2, ge=1)
        """Newest items in a summary of the sequence."""
        hidden: Widths = (256, 128)
        """Widths of the last MLP."""

        @model_validator(mode="after")
        def _rotary(self) -> InterFormer.Config:
            require_heads(self.embedding_dim, self.heads, rotary=True)
            return self

        def check(self, schema: Schema, tasks: tuple[str, ...]) -> None:
            super().check(schema, tasks)
            require_features(select_features(schema, self.features))

    config: Config

    def build(self) -> int:
        config, dim = self.config, self.config.embedding_dim
        sequences = self.inputs.sequences
        self.tokens = Tokens(self.inputs.num_features, self.dense.num_features, dim, config.dense)
        self._length = max(config.recent_tokens, *(feature.max_len or 0 for feature in sequences))
        self.merge = MaskNet(len(sequences), dim)
        self.head = FeatureSummary(self.tokens.count, config.summary_tokens, dim)
        self.layers = nn.ModuleList(InterFormerLayer(self.tokens.count, config) for _ in range(config.layers))
        self.last_features = FeatureSummary(self.tokens.count, config.summary_tokens, dim)
        self.last_sequences = SequenceSummary(config.summary_tokens, config)
        read = config.summary_tokens + self.last_sequences.out_tokens
        self.deep = config.mlp(read * dim, config.hidden)
        return self.deep.out_dim

    def represent(self, batch: Batch) -> Tensor:
        vectors_BFE, sequences = self.inputs(batch)
        x_BNE = self.tokens(vectors_BFE, self.dense(batch))
        side_by_side = torch.cat([newest_first(sequence, self._length) for sequence in sequences.values()], dim=2)
        longest_B = torch.stack([sequence.lengths for sequence in sequences.values()]).amax(dim=0)
        items_BL = torch.arange(self._length, device=longest_B.device) < longest_B.unsqueeze(1)
        head_BSE = self.head(x_BNE)
        s_BLE = torch.cat([head_BSE, self.merge(side_by_side) * items_BL.unsqueeze(2)], dim=1)
        mask_BL = torch.cat([items_BL.new_ones(head_BSE.shape[:2]), items_BL], dim=1)
        for layer in self.layers:
            x_BNE, s_BLE = layer(x_BNE, s_BLE, mask_BL)
        summaries = torch.cat([self.last_features(x_BNE), self.last_sequences(s_BLE, mask_BL)], dim=1)
        deep_BH: Tensor = self.deep(summaries.flatten(1))
        return deep_BH


def require_features(features: list[Feature]) -> None:
    """Refuse features that are all sequences.

    Raises:
        ConfigError: saying what to add.
    """
    if all(feature.kind == "sequence" for feature in features):
        raise ConfigError(
            "interformer reads sequences beside other features, and it has only sequences; add others to 'features'"
        )
