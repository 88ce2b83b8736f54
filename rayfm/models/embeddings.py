"""What models read from a batch: embedded features through TorchRec collections, and dense columns.

Shape letters: B examples, F embedded features, E embedding dimension, D dense features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from rayfm.config import ConfigError, DataError, nearest
from rayfm.data.batch import Batch
from rayfm.models.histories import HistoryEmbeddings, HistoryFeature
from rayfm.models.jagged import KeyOrder, join, no_rows, padded
from rayfm.schema import Feature, Schema

INIT_STD = 0.01
"""Standard deviation of a table's first values."""

_ROW_WISE = ("row_wise", "table_row_wise", "grid_shard")


def select_features(schema: Schema, names: tuple[str, ...] | None) -> list[Feature]:
    """The schema's features that a model reads, in the schema's order; all of them where ``names`` is None.

    Raises:
        ConfigError: a name is not in the schema, or none is left.
    """
    if names is None:
        return list(schema.features)
    known = [feature.name for feature in schema.features]
    for name in names:
        if name not in known:
            raise ConfigError(f"features: {name!r} is not in the schema{nearest(name, known)}")
    if not names:
        raise ConfigError("features: the list is empty; leave it out to read all of the schema's")
    return [feature for feature in schema.features if feature.name in names]


class LookUp(nn.Module):
    """A module that looks features up in embedding collections of its own.

    Attributes:
        given: what ``ids`` says of the next batch, where a training pipeline has asked ahead of the forward.
    """

    given: dict[str, KeyedJaggedTensor] | None = None

    def ids(self, batch: Batch) -> dict[str, KeyedJaggedTensor]:
        """What each of its collections, by the name of its attribute, looks up for a batch."""
        raise NotImplementedError


class FeatureEmbeddings(LookUp):
    """One vector a feature and example, ``[B, F, E]``, in the schema's order, histories last.

    A table is looked up once for all features that share it: single ids, multi-valued features and sequences are in
    one collection, weighted features in another. Lists are averaged, weighted lists are summed with their weights, and
    an empty list is a zero vector. Where a collection is sharded, the result is the same.

    Args:
        schema: the pipeline's schema.
        features: what to embed; dense ones are passed over.
        embedding_dim: E, a multiple of 4.
        init_std: standard deviation of the tables' first values; 0 for tables of zeros.
        histories: teachers' representations to embed beside the features.
        device: where the tables are built; ``meta`` where they will be sharded, by default torch's default device.

    Attributes:
        names: the embedded features and histories in the order of axis 1.

    Raises:
        ConfigError: a table is shared between a weighted feature and another kind, or cannot carry its name.

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
        >>> embeddings = FeatureEmbeddings(schema, list(schema.features), embedding_dim=16)
        >>> embeddings(synthetic_batch(schema, rows=5)).shape
        torch.Size([5, 2, 16])
    """

    def __init__(
        self,
        schema: Schema,
        features: list[Feature],
        embedding_dim: int,
        *,
        init_std: float = INIT_STD,
        histories: tuple[HistoryFeature, ...] = (),
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        embedded = [feature for feature in features if feature.kind != "dense"]
        self._looked_up = tuple(feature.name for feature in embedded)
        self.histories = HistoryEmbeddings(histories, embedding_dim, init_std) if histories else None
        self.names = self._looked_up + (self.histories.names if self.histories is not None else ())
        self.embedding_dim = embedding_dim
        weighted = [feature for feature in embedded if feature.kind == "weighted"]
        others = [feature for feature in embedded if feature.kind != "weighted"]
        for feature in weighted:
            shared = [other.name for other in others if other.table_name == feature.table_name]
            if shared:
                raise ConfigError(
                    f"feature {feature.name!r} is weighted and shares table {feature.table_name!r} with {shared[0]!r}, "
                    "which is not; give it a table of its own"
                )
        init_fn: Callable[[Tensor], Tensor] = partial(nn.init.normal_, std=init_std) if init_std else nn.init.zeros_
        self.bags = _collection(schema, others, embedding_dim, init_fn, device) if others else None
        self.weighted_bags = (
            _collection(schema, weighted, embedding_dim, init_fn, device, is_weighted=True) if weighted else None
        )
        self._order = KeyOrder(_keys(self.bags))
        self._weighted_order = KeyOrder(_keys(self.weighted_bags))
        # Averages are taken here: torchrec 1.8 divides a table-wise table's average twice where another table of the
        # collection is row-wise.
        self._averaged = {feature.name: self._order.keys.index(feature.name) for feature in others if feature.is_list}

    @property
    def num_features(self) -> int:
        """F."""
        return len(self.names)

    def forward(self, batch: Batch) -> Tensor:
        """Embed the features of ``batch``, which may have others too: ``[B, F, E]``, float32.

        Raises:
            DataError: the batch lacks a feature.
        """
        looked_up_BFE = self._features(batch)
        if self.histories is None:
            return looked_up_BFE
        return torch.cat([looked_up_BFE, self.histories(batch).to(looked_up_BFE.dtype)], dim=1)

    def ids(self, batch: Batch) -> dict[str, KeyedJaggedTensor]:
        """What each collection (``bags``, ``weighted_bags``) looks up for ``batch``, empty lists for rows beyond it.

        A collective call in training where a collection is sharded by rows.

        Raises:
            DataError: the batch lacks a feature.
        """
        if not self._looked_up:
            return {}
        looked_up = self._rows_to_look_up(batch)
        found: dict[str, KeyedJaggedTensor | None] = {}
        if self.bags is not None:
            found["bags"] = (
                self._order.select(join(batch.sparse, batch.sequence))
                if len(batch)
                else no_rows(self._order.keys, batch)
            )
        if self.weighted_bags is not None:
            found["weighted_bags"] = (
                self._weighted_order.select(batch.weighted)
                if len(batch)
                else no_rows(self._weighted_order.keys, batch, is_weighted=True)
            )
        # `select` gives None for no keys alone, and a collection has some.
        wide = {name: ids if looked_up == len(batch) else padded(ids, looked_up) for name, ids in found.items()}
        return {name: ids for name, ids in wide.items() if ids is not None}

    def _features(self, batch: Batch) -> Tensor:
        """The features alone."""
        if not self._looked_up:
            return batch.dense.new_zeros(len(batch), 0, self.embedding_dim)
        ids = self.given if self.given is not None else self.ids(batch)
        vectors_BFE = self._look_up(ids.get("bags"), ids.get("weighted_bags"))
        return vectors_BFE if len(vectors_BFE) == len(batch) else vectors_BFE[: len(batch)]

    def _rows_to_look_up(self, batch: Batch) -> int:
        """Rows to look up, those beyond the batch's as empty lists.

        No collection takes a batch without rows, yet a rank that has none this step must take part in the exchange of
        the sharded ones. And row-wise shards return their gradients through an all-gather that, over gloo, needs
        equally many rows on every rank, which the last steps of a period do not have.
        """
        rows = max(1, len(batch))
        if not torch.is_grad_enabled() or not (_is_row_wise(self.bags) or _is_row_wise(self.weighted_bags)):
            return rows
        most = torch.tensor(rows, device=batch.example_id.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most)

    def _look_up(self, ids: KeyedJaggedTensor | None, weighted: KeyedJaggedTensor | None) -> Tensor:
        pooled = []
        if self.bags is not None:
            pooled.append(self.bags(ids))
        if self.weighted_bags is not None:
            pooled.append(self.weighted_bags(weighted))
        # The plan of a sharded collection decides the order of its columns, so they are taken by name.
        if len(pooled) == 1 and not self._averaged and tuple(pooled[0].keys()) == self._looked_up:
            values: Tensor = pooled[0].values()
            return values.view(-1, len(self._looked_up), self.embedding_dim)
        columns: dict[str, Tensor] = {}
        for keyed in pooled:
            columns |= keyed.to_dict()
        if ids is not None and self._averaged:
            counts_KB = ids.lengths().view(len(self._order.keys), -1).clamp_min(1)
            for name, key in self._averaged.items():
                columns[name] = columns[name] / counts_KB[key].unsqueeze(1)
        return torch.stack([columns[name] for name in self._looked_up], dim=1)


class DenseFeatures(nn.Module):
    """The dense columns that a model reads: ``Batch.dense`` to ``[B, D]``, in the schema's order.

    Args:
        schema: the pipeline's schema, whose dense features are the columns of ``Batch.dense``.
        features: what to read; features of other kinds are passed over.

    Attributes:
        names: the dense features in the order of axis 1.
    """

    def __init__(self, schema: Schema, features: list[Feature]) -> None:
        super().__init__()
        columns = [feature.name for feature in schema.features if feature.kind == "dense"]
        self.names = tuple(feature.name for feature in features if feature.kind == "dense")
        self._width = len(columns)
        self._columns = [columns.index(name) for name in self.names]

    @property
    def num_features(self) -> int:
        """D."""
        return len(self.names)

    def forward(self, batch: Batch) -> Tensor:
        """The columns, ``[B, D]``. The batch has all of the schema's, or just those that the model reads.

        Raises:
            DataError: the batch has another number of dense columns.
        """
        width = batch.dense.shape[1]
        if width == len(self._columns):
            return batch.dense
        if width != self._width:
            raise DataError(
                f"the batch has {width} dense columns, the schema {self._width} and the model {len(self._columns)}; "
                "read the batch with all of the schema's dense features"
            )
        return batch.dense[:, self._columns]


def flat_inputs(embeddings_BFE: Tensor, dense_BD: Tensor) -> Tensor:
    """Embeddings side by side, then the dense features: ``[B, F * E + D]``."""
    flat = embeddings_BFE.flatten(1)
    return torch.cat([flat, dense_BD], dim=1) if dense_BD.shape[1] else flat


def require_module_names(kind: str, names: list[str], owner: nn.Module | None = None) -> None:
    """Refuse names that PyTorch cannot give to a submodule of ``owner``, by default of a ``ModuleDict``.

    Raises:
        ConfigError: naming the ``kind`` and the name.
    """
    owner = owner or nn.ModuleDict()
    for name in names:
        if "." in name or hasattr(owner, name):
            raise ConfigError(f"{kind} {name!r}: PyTorch cannot call a part so (a dot, or a word it uses); rename it")


def _collection(
    schema: Schema,
    features: list[Feature],
    embedding_dim: int,
    init_fn: Callable[[Tensor], Tensor],
    device: torch.device | None,
    is_weighted: bool = False,
) -> EmbeddingBagCollection:
    tables: dict[str, list[Feature]] = {}
    for feature in features:
        tables.setdefault(feature.table_name, []).append(feature)
    require_module_names("table", list(tables))
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=table,
                num_embeddings=schema.tables[table].rows,
                embedding_dim=embedding_dim,
                feature_names=[feature.name for feature in readers],
                pooling=PoolingType.SUM,
                init_fn=init_fn,
            )
            for table, readers in tables.items()
        ],
        is_weighted=is_weighted,
        device=device,
    )


def _keys(bags: EmbeddingBagCollection | None) -> tuple[str, ...]:
    return tuple(name for table in bags.embedding_bag_configs() for name in table.feature_names) if bags else ()


def _is_row_wise(bags: nn.Module | None) -> bool:
    """Whether a collection is sharded, and some of its tables by rows."""
    plan = getattr(bags, "module_sharding_plan", None) or {}
    return any(table.sharding_type in _ROW_WISE for table in plan.values())
