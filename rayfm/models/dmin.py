"""DMIN: several interests of a user, each attended to by what is to be ranked.

Source: Xiao et al., Deep Multi-Interest Network for Click-through Rate Prediction, CIKM 2020, section 2.

Shape letters: B examples, F features of one vector, E embedding dimension, D dense features, L longest sequence,
K interests, C = E / K, P width of a position's embedding, I inputs of the deep network, H representation.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from rayfm.config import ConfigError, nearest
from rayfm.data.batch import Batch
from rayfm.models.attention import AttentionBlock, attended, masked_softmax, require_heads, split_heads
from rayfm.models.base import MODELS
from rayfm.models.embeddings import flat_inputs, select_features
from rayfm.models.scaling import Widths
from rayfm.models.sequences import PaddedSequence, SequenceBackbone, SequenceConfig, require_sequences
from rayfm.schema import Feature, Schema


class HeadLinear(nn.Module):
    """A linear layer of its own for each head: ``[B, K, L, in] -> [B, K, L, out]``.

    Args:
        heads: K.
        in_dim, out_dim: widths.
    """

    def __init__(self, heads: int, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight_KIO = nn.Parameter(torch.empty(heads, in_dim, out_dim))
        self.bias_KO = nn.Parameter(torch.empty(heads, out_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As ``torch.nn.Linear``."""
        bound = 1 / math.sqrt(self.weight_KIO.shape[1])
        nn.init.uniform_(self.weight_KIO, -bound, bound)
        nn.init.uniform_(self.bias_KO, -bound, bound)

    def forward(self, x_BKLI: Tensor) -> Tensor:
        return torch.matmul(x_BKLI, self.weight_KIO) + self.bias_KO.unsqueeze(1)


class InterestExtractor(nn.Module):
    """The multi-interest extractor: each head of a self-attention becomes a sequence of its own (section 2.3).

    What the heads see is not joined again: head k's output goes through a projection, a short-cut with a layer norm and
    a feed-forward network with a short-cut, all of them its own but the norm.

    Args:
        dim: E.
        interests: K, a divisor of E.
    """

    def __init__(self, dim: int, interests: int) -> None:
        super().__init__()
        require_heads(dim, interests, key="interests")
        self.interests = interests
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.project = HeadLinear(interests, dim // interests, dim)
        self.norm = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(
            HeadLinear(interests, dim, 2 * dim), nn.ReLU(), HeadLinear(interests, 2 * dim, dim)
        )

    def forward(self, x_BLE: Tensor, mask_BL: Tensor) -> Tensor:
        """``[B, K, L, E]``; without meaning where ``mask_BL`` is False."""
        query, key, value = (split_heads(x, self.interests) for x in self.query_key_value(x_BLE).chunk(3, dim=-1))
        mask = attended(mask_BL)[:, None, None, :]
        head_BKLC = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x_BKLE = self.norm(x_BLE.unsqueeze(1) + self.project(head_BKLC))
        out: Tensor = x_BKLE + self.feed_forward(x_BKLE)
        return out


class TargetAttention(nn.Module):
    """Each interest is the average of its sequence, weighted by what an MLP makes of item, target and position.

    ``sum_l softmax_l(a(i_kl, t, p_l)) i_kl`` (section 2.3). The MLP reads item, target, their product and the embedding
    of the item's age, by which the newest item of a short and of a long sequence are at one position.

    Args:
        dim: E.
        max_len: L.
        position_dim: P.
        hidden: widths of the MLP.
        config: makes the MLP.
    """

    def __init__(self, dim: int, max_len: int, position_dim: int, hidden: tuple[int, ...], config: DMIN.Config) -> None:
        super().__init__()
        self.positions = nn.Embedding(max_len, position_dim)
        self.mlp = config.mlp(3 * dim + position_dim, hidden)
        self.score = nn.Linear(self.mlp.out_dim, 1, bias=False)  # a bias would not change the softmax

    def forward(self, items_BKLE: Tensor, target_BE: Tensor, sequence: PaddedSequence) -> Tensor:
        """``[B, K, E]``, zeros for an empty sequence."""
        target_BKLE = target_BE[:, None, None, :].expand_as(items_BKLE)
        position_BLP = self.positions(sequence.ages)
        position_BKLP = position_BLP.unsqueeze(1).expand(-1, items_BKLE.shape[1], -1, -1)
        read = torch.cat([items_BKLE, target_BKLE, items_BKLE * target_BKLE, position_BKLP.to(items_BKLE.dtype)], dim=3)
        scores_BKL = self.score(self.mlp(read)).squeeze(3)
        weights_BKL = masked_softmax(scores_BKL, sequence.mask)
        return (weights_BKL.unsqueeze(3) * items_BKLE).sum(dim=2)


class SequenceInterests(nn.Module):
    """Behaviour refiner, multi-interest extractor and target attention of one sequence feature: ``-> [B, K, E]``.

    Args:
        max_len: L.
        config: the model's config.
    """

    def __init__(self, max_len: int, config: DMIN.Config) -> None:
        super().__init__()
        dim = config.embedding_dim
        self.refiner = AttentionBlock(dim, config.heads)
        self.extractor = InterestExtractor(dim, config.interests)
        self.attention = TargetAttention(dim, max_len, config.position_dim, config.attention, config)

    def forward(self, sequence: PaddedSequence, target_BE: Tensor) -> Tensor:
        """``sequence`` is of one feature, ``target_BE`` what is to be ranked."""
        refined_BLE = self.refiner(sequence.values, sequence.mask)
        interests: Tensor = self.attention(self.extractor(refined_BLE, sequence.mask), target_BE, sequence)
        return interests


@MODELS.register("dmin")
class DMIN(SequenceBackbone):
    """Self-attention refines what a user did, several heads extract interests, the target attends to each of them.

    Each sequence feature has its own three layers; its target is the feature of one vector that stands for what is
    ranked (the item of the impression). The deep network reads the vectors of all other features, the dense features
    and the interests of all sequences; the representation is its last layer.

    Left out: the auxiliary loss of the refiner (section 2.2), which needs items that the user did not choose, and with
    it the order in which items attend to each other: each sees the whole sequence, which ended before the impression.

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
        >>> model = DMIN(DMIN.Config(embedding_dim=8, hidden=(32, 16)), schema, tasks=("click",))
        >>> output = model(synthetic_batch(schema, rows=4))
        >>> output.representation.shape, output.logits["click"].shape
        (torch.Size([4, 16]), torch.Size([4]))
    """

    class Config(SequenceConfig):
        """Sizes of a DMIN. The schema needs a feature of kind sequence, with a ``max_len``."""

        type: Literal["dmin"] = "dmin"
        targets: dict[str, str] = {}
        """Sequence -> the feature that attends to it; by default the first of kind sparse that shares its table."""
        heads: int = Field(2, ge=1)
        """Heads of the behaviour refiner, a divisor of ``embedding_dim``."""
        interests: int = Field(4, ge=1)
        """Interests of each sequence, a divisor of ``embedding_dim``."""
        position_dim: int = Field(4, ge=1)
        """Width of a position's embedding."""
        attention: Widths = (32,)
        """Hidden widths of the target attention."""
        hidden: Widths = (256, 128)
        """Widths of the deep network."""

        @model_validator(mode="after")
        def _divide(self) -> DMIN.Config:
            require_heads(self.embedding_dim, self.heads)
            require_heads(self.embedding_dim, self.interests, key="interests")
            return self

        def check(self, schema: Schema, tasks: tuple[str, ...]) -> None:
            super().check(schema, tasks)
            target_features(self, select_features(schema, self.features))

    config: Config

    def build(self) -> int:
        config, sequences = self.config, self.inputs.sequences
        targets = target_features(config, self.features)
        self._targets = {sequence: self.inputs.names.index(target) for sequence, target in targets.items()}
        self.interests = nn.ModuleList(SequenceInterests(feature.max_len or 0, config) for feature in sequences)
        vectors = self.inputs.num_features + len(sequences) * config.interests
        self.deep = config.mlp(vectors * config.embedding_dim + self.dense.num_features, config.hidden)
        return self.deep.out_dim

    def represent(self, batch: Batch) -> Tensor:
        vectors_BFE, sequences = self.inputs(batch)
        interests = [
            layer(sequences[name], vectors_BFE[:, target])
            for layer, (name, target) in zip(self.interests, self._targets.items(), strict=True)
        ]
        read_BVE = torch.cat([vectors_BFE, *(interest_BKE.float() for interest_BKE in interests)], dim=1)
        deep_BH: Tensor = self.deep(flat_inputs(read_BVE, self.dense(batch)))
        return deep_BH


def target_features(config: DMIN.Config, features: list[Feature]) -> dict[str, str]:
    """Sequence -> the feature of one vector that attends to it.

    Raises:
        ConfigError: a name in ``targets`` is not among ``features``, or a sequence has no target.
    """
    sequences = require_sequences(features, config.type)
    vectors = [feature.name for feature in features if feature.kind not in ("dense", "sequence")]
    for name, target in config.targets.items():
        known = [feature.name for feature in sequences]
        if name not in known:
            raise ConfigError(f"dmin: targets: {name!r} is no sequence that it reads{nearest(name, known)}")
        if target not in vectors:
            hint = nearest(target, vectors)
            raise ConfigError(f"dmin: targets: {target!r} is no feature of one vector that it reads{hint}")
    found = {}
    for sequence in sequences:
        shared = [f.name for f in features if f.kind == "sparse" and f.table_name == sequence.table_name]
        if sequence.name not in config.targets and not shared:
            raise ConfigError(
                f"dmin: no feature of kind sparse shares table {sequence.table_name!r} with sequence "
                f"{sequence.name!r}; say in 'targets' which feature is to be compared with its items"
            )
        found[sequence.name] = config.targets[sequence.name] if sequence.name in config.targets else shared[0]
    return found
