"""Sequences that a model reads item by item: unpooled embeddings through a TorchRec EmbeddingCollection.

TorchRec cannot share a table between a pooled and an unpooled collection. So every table that a sequence reads is
looked up here for all of its features, and what is to be pooled is pooled after the look-up; the tables that no
sequence reads stay in `FeatureEmbeddings`.

Shape letters: B examples, F features of one vector each, L longest sequence, E embedding dimension.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from rayfm.config import ConfigError
from rayfm.data.batch import Batch
from rayfm.models.backbone import Backbone, DeepConfig
from rayfm.models.embeddings import (
    INIT_STD,
    DenseFeatures,
    FeatureEmbeddings,
    LookUp,
    require_module_names,
    select_features,
)
from rayfm.models.histories import HistoryFeature
from rayfm.models.jagged import KeyOrder, join, no_rows, padded
from rayfm.schema import Feature, Schema


@dataclasses.dataclass(frozen=True)
class PaddedSequence:
    """One sequence feature of a batch, oldest item first, padded at its end."""

    values: Tensor
    """float32 ``[B, L, E]``, zeros where there is no item."""
    lengths: Tensor
    """int64 ``[B]``."""

    @property
    def mask(self) -> Tensor:
        """bool ``[B, L]``: there is an item."""
        return torch.arange(self.values.shape[1], device=self.lengths.device) < self.lengths.unsqueeze(1)

    @property
    def ages(self) -> Tensor:
        """int64 ``[B, L]``: 0 for the newest item, 1 for the one before; 0 where there is no item."""
        positions = torch.arange(self.values.shape[1], device=self.lengths.device)
        return (self.lengths.unsqueeze(1) - 1 - positions).clamp_min(0)


class SequenceEmbeddings(LookUp):
    """Sequences unpooled, and one vector for every other feature, ``[B, F, E]``, in the schema's order.

    Where the collections are sharded, the result is the same. Lists that are no sequences are averaged; an empty list
    is a zero vector, an empty sequence is all zeros.

    Args:
        schema: the pipeline's schema.
        features: what to embed; dense ones are passed over.
        embedding_dim: E, a multiple of 4.
        reader: who reads, for messages: the model's name.
        histories: teachers' representations to embed beside the features of one vector.
        device: where the tables are built; ``meta`` where they will be sharded.

    Attributes:
        names: the features of one vector in the order of axis 1.
        sequences: the sequence features, in the schema's order.

    Raises:
        ConfigError: no feature is a sequence, one has no ``max_len``, or a weighted feature shares a sequence's table.

    Example::

        >>> from rayfm.models.synthetic import synthetic_batch
        >>> from rayfm.schema import Feature, Schema, Table, Task
        >>> schema = Schema(
        ...     tables={"video": Table(rows=1000)},
        ...     features=(
        ...         Feature(name="video", kind="sparse"),
        ...         Feature(name="watched", kind="sequence", table="video", max_len=20),
        ...     ),
        ...     tasks=(Task(name="click"),),
        ... )
        >>> embeddings = SequenceEmbeddings(schema, list(schema.features), embedding_dim=16, reader="dmin")
        >>> vectors_BFE, sequences = embeddings(synthetic_batch(schema, rows=5))
        >>> vectors_BFE.shape, sequences["watched"].values.shape
        (torch.Size([5, 1, 16]), torch.Size([5, 20, 16]))
    """

    def __init__(
        self,
        schema: Schema,
        features: list[Feature],
        embedding_dim: int,
        *,
        reader: str,
        histories: tuple[HistoryFeature, ...] = (),
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.sequences = require_sequences(features, reader)
        unpooled = {feature.table_name for feature in self.sequences}
        here = [feature for feature in features if feature.kind != "dense" and feature.table_name in unpooled]
        vectors = [feature.name for feature in features if feature.kind not in ("dense", "sequence")]
        self.names = (*vectors, *(history.name for history in histories))
        self._pooled = tuple(feature.name for feature in here if feature.kind != "sequence")
        self.unpooled = _collection(schema, here, embedding_dim, device)
        self.pooled = FeatureEmbeddings(
            schema,
            [feature for feature in features if feature not in here],
            embedding_dim,
            histories=histories,
            device=device,
        )
        self._order = KeyOrder(
            tuple(name for table in self.unpooled.embedding_configs() for name in table.feature_names)
        )

    @property
    def num_features(self) -> int:
        """F."""
        return len(self.names)

    def ids(self, batch: Batch) -> dict[str, KeyedJaggedTensor]:
        """What ``unpooled`` looks up for ``batch``; ``pooled`` is asked for its own.

        Raises:
            DataError: the batch lacks a feature.
        """
        rows = len(batch)
        # No collection takes a batch without rows, yet a rank that has none must take part in the sharded ones'
        # exchange. (Unlike the pooled ones', row-wise exchanges of sequences do not need equally many rows.)
        ids = self._order.select(join(batch.sparse, batch.sequence)) if rows else no_rows(self._order.keys, batch)
        wide = padded(ids, max(1, rows))
        return {} if wide is None else {"unpooled": wide}

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, PaddedSequence]]:
        """The vectors, ``[B, F, E]``, and each sequence padded to its ``max_len``.

        Raises:
            DataError: the batch lacks a feature.
        """
        rows = len(batch)
        ids = self.given if self.given is not None else self.ids(batch)
        found: dict[str, JaggedTensor] = dict(self.unpooled(ids["unpooled"]).items())
        sequences = {}
        for feature in self.sequences:
            jagged = found[feature.name]
            # Encoders cut a sequence to its newest max_len, so nothing is lost here.
            values_BLE = torch.ops.fbgemm.jagged_to_padded_dense(
                jagged.values(), [jagged.offsets().long()], [feature.max_len], 0.0
            )
            sequences[feature.name] = PaddedSequence(values_BLE[:rows], jagged.lengths().long()[:rows])
        vectors = dict(zip(self.pooled.names, self.pooled(batch).unbind(dim=1), strict=True))
        for name in self._pooled:
            vectors[name] = averages(found[name].values(), found[name].lengths())[:rows]
        if not vectors:
            return batch.dense.new_zeros(rows, 0, self.embedding_dim), sequences
        return torch.stack([vectors[name] for name in self.names], dim=1), sequences


class SequenceConfig(DeepConfig):
    """What models that read sequences item by item have."""

    def unpooled_tables(self, schema: Schema) -> frozenset[str]:
        features = select_features(schema, self.features)
        return frozenset(feature.table_name for feature in features if feature.kind == "sequence")

    def check(self, schema: Schema, tasks: tuple[str, ...]) -> None:
        super().check(schema, tasks)
        require_sequences(select_features(schema, self.features), str(vars(self)["type"]))


class SequenceBackbone(Backbone):
    """Base of the models that read sequences item by item.

    Attributes:
        inputs: ``Batch -> [B, F, E]`` and the sequences, in place of ``embeddings``.
    """

    inputs: SequenceEmbeddings

    def embed(self, features: list[Feature], device: torch.device | None) -> None:
        """Make ``inputs`` and ``dense``."""
        reader = str(vars(self.config)["type"])
        self.inputs = SequenceEmbeddings(
            self.schema,
            features,
            self.config.embedding_dim,
            reader=reader,
            histories=self.config.histories,
            device=device,
        )
        self.dense = DenseFeatures(self.schema, features)


def require_sequences(features: list[Feature], reader: str) -> tuple[Feature, ...]:
    """The sequences among ``features``, once they are known to be readable item by item.

    Raises:
        ConfigError: there is none, one has no ``max_len``, or a weighted feature shares a sequence's table.
    """
    sequences = tuple(feature for feature in features if feature.kind == "sequence")
    if not sequences:
        raise ConfigError(
            f"{reader} reads what a user did item by item, and none of its features is a sequence; add one of "
            "kind sequence to the schema (and to 'features'), or take another model"
        )
    for feature in sequences:
        if feature.max_len is None:
            raise ConfigError(f"feature {feature.name!r}: {reader} pads it to its longest; give it a 'max_len'")
    tables = {feature.table_name for feature in sequences}
    for feature in features:
        if feature.kind == "weighted" and feature.table_name in tables:
            raise ConfigError(
                f"feature {feature.name!r} is weighted and shares table {feature.table_name!r} with a sequence, "
                "which is not; give it a table of its own"
            )
    return sequences


def averages(values_NE: Tensor, lengths_B: Tensor) -> Tensor:
    """Averages of lists that lie one after the other: ``[N, E]`` -> ``[B, E]``, zeros for an empty list."""
    rows = torch.repeat_interleave(
        torch.arange(lengths_B.shape[0], device=lengths_B.device), lengths_B, output_size=values_NE.shape[0]
    )
    sums_BE = values_NE.new_zeros(lengths_B.shape[0], values_NE.shape[1]).index_add(0, rows, values_NE)
    return sums_BE / lengths_B.clamp_min(1).unsqueeze(1)


def _collection(
    schema: Schema, features: list[Feature], embedding_dim: int, device: torch.device | None
) -> EmbeddingCollection:
    tables: dict[str, list[Feature]] = {}
    for feature in features:
        tables.setdefault(feature.table_name, []).append(feature)
    require_module_names("table", list(tables))
    return EmbeddingCollection(
        tables=[
            EmbeddingConfig(
                name=table,
                num_embeddings=schema.tables[table].rows,
                embedding_dim=embedding_dim,
                feature_names=[feature.name for feature in readers],
                init_fn=partial(nn.init.normal_, std=INIT_STD),
            )
            for table, readers in tables.items()
        ],
        device=device,
    )
