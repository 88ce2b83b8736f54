"""The tables of a served model, all of one width in one, looked up in one go for each kind of feature.

A collection of TorchRec looks up table by table and wraps each result, which takes longer than the rows themselves in
a request of some hundred rows. Here ids become rows of one matrix: single ids and padded sequences are gathered, lists
are summed as bags.

Shape letters: B examples, F features, E embedding dimension, L longest sequence, N ids.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from rayfm.config import DataError
from rayfm.data.batch import Batch
from rayfm.export.ports import Embeddings, Port, vector_names
from rayfm.models.embeddings import DenseFeatures, FeatureEmbeddings
from rayfm.models.jagged import KeyOrder
from rayfm.models.sequences import SequenceEmbeddings
from rayfm.schema import Feature, Schema


class MergedTables:
    """The tables of one embeddings module as one matrix; gives what the module gave.

    Args:
        embeddings: a module with its values. Its tables are empty afterwards: a table is in memory once.
        schema: the schema that it was built with.
    """

    def __init__(self, embeddings: Embeddings, schema: Schema) -> None:
        tables = _tables(embeddings)
        self.embedding_dim = embeddings.embedding_dim
        total = sum(int(weight.shape[0]) for weight, _ in tables)
        # The last row is of zeros: what stands for an id that is not there.
        self.weight_RE = torch.zeros(total + 1, self.embedding_dim)
        first: dict[str, int] = {}
        row = 0
        for weight, readers in tables:
            self.weight_RE[row : row + weight.shape[0]] = weight.detach()
            first |= dict.fromkeys(readers, row)
            row += int(weight.shape[0])
            weight.data = weight.data.new_empty(0, self.embedding_dim)
        self._none = total
        vectors = [schema.feature(name) for name in vector_names(embeddings)]
        unpooled = embeddings.sequences if isinstance(embeddings, SequenceEmbeddings) else ()
        self._single = [f for f in vectors if f.kind == "sparse"]
        self._multi = [f for f in vectors if f.kind == "multi"]
        self._pooled = [f for f in vectors if f.kind == "sequence"]
        self._weighted = [f for f in vectors if f.kind == "weighted"]
        self._unpooled = list(unpooled)
        self._sparse_order = _order([*self._single, *self._multi])
        self._sequence_order = _order([*self._pooled, *self._unpooled])
        self._weighted_order = _order(self._weighted)

        def bases(features: list[Feature]) -> Tensor:
            return torch.tensor([first[feature.name] for feature in features], dtype=torch.int64)

        self._single_base = bases(self._single).unsqueeze(1)
        self._list_base = bases([*self._multi, *self._pooled])
        self._weighted_base = bases(self._weighted)
        self._unpooled_base = [first[feature.name] for feature in self._unpooled]
        found = [f.name for f in (*self._single, *self._multi, *self._pooled, *self._weighted)]
        wanted = [feature.name for feature in vectors]
        self._columns = None if found == wanted else torch.tensor([found.index(name) for name in wanted])

    def __call__(self, batch: Batch) -> tuple[Tensor | None, dict[str, tuple[Tensor, Tensor]]]:
        """Vectors ``[B, F, E]`` (None where there is no such feature), and sequence -> values ``[B, L, E]``, lengths.

        Raises:
            DataError: the batch lacks a feature, or a sequence is longer than its ``max_len``.
        """
        rows = len(batch)
        values, lengths_KB = _parts(self._sparse_order, batch.sparse, rows)
        split = len(self._single)
        singles = int(lengths_KB[:split].sum()) if self._multi else values.numel()
        parts = [self._gather(values[:singles], lengths_KB[:split])] if self._single else []
        listed, listed_KB = [values[singles:]], [lengths_KB[split:]]
        sequence_values, sequence_KB = _parts(self._sequence_order, batch.sequence, rows)
        pooled = len(self._pooled)
        taken = int(sequence_KB[:pooled].sum()) if pooled else 0
        if self._multi or self._pooled:
            listed.append(sequence_values[:taken])
            listed_KB.append(sequence_KB[:pooled])
            parts.append(self._average(torch.cat(listed), torch.cat(listed_KB)))
        if self._weighted:
            weighted = self._weighted_order.select(batch.weighted)
            assert weighted is not None
            parts.append(self._sum(weighted.values(), weighted.lengths().view(-1, rows), weighted.weights()))
        sequences = {}
        for position, feature in enumerate(self._unpooled):
            lengths_B = sequence_KB[pooled + position]
            count = int(lengths_B.sum())
            part = sequence_values[taken : taken + count]
            sequences[feature.name] = self._pad(part, lengths_B, feature, self._unpooled_base[position])
            taken += count
        if not parts:
            return None, sequences
        vectors_BFE = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        if self._columns is not None:
            vectors_BFE = vectors_BFE.index_select(1, self._columns)
        return vectors_BFE, sequences

    def _gather(self, values_N: Tensor, lengths_FB: Tensor) -> Tensor:
        """Single ids: ``[B, F, E]``, zeros where an id is missing."""
        if values_N.numel() == lengths_FB.numel():
            rows_FB = values_N.view(lengths_FB.shape) + self._single_base
        else:
            rows_FB = torch.full(lengths_FB.shape, self._none)
            known_FB = lengths_FB.bool()
            rows_FB.masked_scatter_(known_FB, values_N)
            rows_FB = torch.where(known_FB, rows_FB + self._single_base, rows_FB)
        return functional.embedding(rows_FB.t(), self.weight_RE)

    def _average(self, values_N: Tensor, lengths_FB: Tensor) -> Tensor:
        sums_FBE = self._bags(values_N, lengths_FB, self._list_base, None)
        return (sums_FBE / lengths_FB.clamp_min(1).unsqueeze(2)).transpose(0, 1)

    def _sum(self, values_N: Tensor, lengths_FB: Tensor, weights_N: Tensor) -> Tensor:
        return self._bags(values_N, lengths_FB, self._weighted_base, weights_N).transpose(0, 1)

    def _bags(self, values_N: Tensor, lengths_FB: Tensor, base_F: Tensor, weights_N: Tensor | None) -> Tensor:
        features, rows = lengths_FB.shape
        ids_N = values_N + base_F.repeat_interleave(lengths_FB.sum(dim=1), output_size=values_N.numel())
        ends = lengths_FB.reshape(-1).cumsum(0, dtype=torch.int64)
        sums = functional.embedding_bag(
            ids_N, self.weight_RE, ends - lengths_FB.reshape(-1), mode="sum", per_sample_weights=weights_N
        )
        return sums.view(features, rows, self.embedding_dim)

    def _pad(self, values_N: Tensor, lengths_B: Tensor, feature: Feature, base: int) -> tuple[Tensor, Tensor]:
        longest = feature.max_len or 0
        if lengths_B.numel() and int(lengths_B.max()) > longest:
            raise DataError(f"feature {feature.name!r}: a sequence is longer than its max_len {longest}; cut it")
        rows_BL = torch.full((lengths_B.shape[0], longest), self._none)
        rows_BL.masked_scatter_(torch.arange(longest) < lengths_B.unsqueeze(1), values_N + base)
        return functional.embedding(rows_BL, self.weight_RE), lengths_B.long()


class LookUps:
    """All look-ups of a served model: a batch to the tensors of its ports, in their order.

    Args:
        embeddings: path -> module, from `rayfm.export.ports.cut`; they are empty afterwards.
        dense: picks the dense columns.
        ports: the inputs of the part that follows.
        schema: the schema of the model.
    """

    def __init__(
        self,
        embeddings: dict[str, Embeddings],
        dense: DenseFeatures | None,
        ports: tuple[Port, ...],
        schema: Schema,
    ) -> None:
        self._merged = {path: MergedTables(module, schema) for path, module in embeddings.items()}
        self._dense, self._ports = dense, ports

    def __call__(self, batch: Batch) -> tuple[Tensor, ...]:
        """The ports' tensors for a batch of at least one row.

        Raises:
            DataError: the batch lacks a feature.
        """
        found: dict[tuple[str, str, str], Tensor] = {}
        for path, merged in self._merged.items():
            vectors, sequences = merged(batch)
            if vectors is not None:
                found["vectors", path, ""] = vectors
            for name, (values, lengths) in sequences.items():
                found["values", path, name], found["lengths", path, name] = values, lengths
        for port in self._ports:
            if port.kind == "dense" and self._dense is not None:
                found["dense", "", ""] = self._dense(batch)
            elif port.kind == "history":
                value, known = _represented(batch, port)
                found["history", port.owner, ""], found["history_mask", port.owner, ""] = value, known
        return tuple(found[port.kind, port.owner, port.sequence] for port in self._ports)


def _represented(batch: Batch, port: Port) -> tuple[Tensor, Tensor]:
    if batch.representation is None:
        rows = len(batch)
        return torch.zeros(rows, *port.shape), torch.zeros(rows, dtype=torch.bool)
    return batch.represented(port.owner)


def _tables(embeddings: Embeddings) -> list[tuple[Tensor, list[str]]]:
    """Each table's weight and the features that read it."""
    tables: list[tuple[Tensor, list[str]]] = []
    if isinstance(embeddings, SequenceEmbeddings):
        for config in embeddings.unpooled.embedding_configs():
            part: nn.Module = embeddings.unpooled.embeddings[config.name]
            tables.append((part.get_parameter("weight"), config.feature_names))
    pooled = embeddings if isinstance(embeddings, FeatureEmbeddings) else embeddings.pooled
    for collection in (pooled.bags, pooled.weighted_bags):
        if collection is not None:
            for config in collection.embedding_bag_configs():
                part = collection.embedding_bags[config.name]
                tables.append((part.get_parameter("weight"), config.feature_names))
    return tables


def _order(features: list[Feature]) -> KeyOrder:
    return KeyOrder(tuple(feature.name for feature in features))


def _parts(order: KeyOrder, batch_ids: KeyedJaggedTensor | None, rows: int) -> tuple[Tensor, Tensor]:
    """Values ``[N]`` and lengths ``[K, B]`` of the keys of ``order``."""
    ids = order.select(batch_ids) if order.keys else None
    if ids is None:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, rows, dtype=torch.int32)
    return ids.values(), ids.lengths().view(len(ids.keys()), rows)
