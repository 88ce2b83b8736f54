"""A served model cut in two: what looks up rows of tables, and all that follows, on a fixed list of dense tensors.

The second part has no table, no jagged tensor and no branch on a batch, so that it can be traced and compiled for any
number of rows. The first part stays as it is (`rayfm.export.lookup` merges its tables).

Shape letters: B examples, F embedded features, E embedding dimension, D dense features, L longest sequence, R width of
a history.
"""

from __future__ import annotations

import dataclasses
from typing import Never, cast

import torch
from torch import Tensor, nn

from rayfm.data.batch import Batch
from rayfm.export.served import ServedModel, probabilities
from rayfm.models.embeddings import DenseFeatures, FeatureEmbeddings
from rayfm.models.histories import HistoryEmbeddings
from rayfm.models.sequences import PaddedSequence, SequenceEmbeddings

Embeddings = FeatureEmbeddings | SequenceEmbeddings


@dataclasses.dataclass(frozen=True)
class Port:
    """One input of the part that is compiled."""

    kind: str
    """``vectors``, ``values`` and ``lengths`` (of a sequence), ``dense``, ``history`` or ``history_mask``."""
    owner: str
    """Path of the module whose output it is; a history's name."""
    sequence: str
    """Name of the sequence feature, or empty."""
    shape: tuple[int, ...]
    """Without the rows."""

    def example(self, rows: int, generator: torch.Generator) -> Tensor:
        """Random values ``[rows, *shape]``; of a sequence's length, whole numbers up to ``shape`` of its values."""
        if self.kind == "lengths":
            return torch.randint(0, 2, (rows,), generator=generator)
        if self.kind == "history_mask":
            return torch.rand(rows, generator=generator) < 0.5
        return torch.randn(rows, *self.shape, generator=generator)


class PortValues:
    """What the compiled part reads in place of a batch: the ports' tensors, by owner.

    Of a `Batch` a model finds here what is an input of the compiled part: ``dense`` and ``represented``.
    """

    def __init__(self, ports: tuple[Port, ...], tensors: tuple[Tensor, ...]) -> None:
        found = {(port.kind, port.owner, port.sequence): x for port, x in zip(ports, tensors, strict=True)}
        self._found = found
        first = tensors[0]
        dense = found.get(("dense", "", ""))
        self.dense = first.new_zeros((first.shape[0], 0), dtype=torch.float32) if dense is None else dense
        # Models ask whether there is one before they ask for theirs; each of theirs is a port.
        self.representation = self.dense

    def vectors(self, owner: str, embedding_dim: int) -> Tensor:
        """``[B, F, E]``."""
        found = self._found.get(("vectors", owner, ""))
        return self.dense.new_zeros(self.dense.shape[0], 0, embedding_dim) if found is None else found

    def sequence(self, owner: str, name: str) -> PaddedSequence:
        """A sequence feature of ``owner``."""
        return PaddedSequence(self._found["values", owner, name], self._found["lengths", owner, name])

    def represented(self, name: str) -> tuple[Tensor, Tensor]:
        """As `Batch.represented`."""
        return self._found["history", name, ""], self._found["history_mask", name, ""]

    def __getattr__(self, name: str) -> Never:
        raise AttributeError(f"batch.{name} is not there where a model is served; read features through embeddings")

    def __len__(self) -> int:
        # Tracing would take it for a constant.
        raise TypeError("len(batch) is not known where a model is served; take the shape of what the embeddings gave")


class VectorsPort(nn.Module):
    """Stands where a `FeatureEmbeddings` stood; histories are read here as they were there."""

    def __init__(self, owner: str, embeddings: FeatureEmbeddings) -> None:
        super().__init__()
        self.owner, self.names, self.embedding_dim = owner, embeddings.names, embeddings.embedding_dim
        self.num_features = embeddings.num_features
        self.histories = embeddings.histories

    def forward(self, batch: PortValues) -> Tensor:
        return _with_histories(batch, self.owner, self.embedding_dim, self.histories)


class SequencesPort(nn.Module):
    """Stands where a `SequenceEmbeddings` stood."""

    def __init__(self, owner: str, embeddings: SequenceEmbeddings) -> None:
        super().__init__()
        self.owner, self.names, self.embedding_dim = owner, embeddings.names, embeddings.embedding_dim
        self.num_features, self.sequences = embeddings.num_features, embeddings.sequences
        self.histories = embeddings.pooled.histories

    def forward(self, batch: PortValues) -> tuple[Tensor, dict[str, PaddedSequence]]:
        sequences = {feature.name: batch.sequence(self.owner, feature.name) for feature in self.sequences}
        return _with_histories(batch, self.owner, self.embedding_dim, self.histories), sequences


def _with_histories(batch: PortValues, owner: str, embedding_dim: int, histories: HistoryEmbeddings | None) -> Tensor:
    vectors_BFE = batch.vectors(owner, embedding_dim)
    if histories is None:
        return vectors_BFE
    return torch.cat([vectors_BFE, histories(cast(Batch, batch)).to(vectors_BFE.dtype)], dim=1)


class DensePart(nn.Module):
    """All of a served model behind its look-ups: the ports' tensors in, ``[B]`` of predictions a task out.

    Args:
        served: the model, whose embeddings are replaced by ports, in place.
        bf16: run under bfloat16 autocast, as training in bf16 does; heads and calibrator stay in fp32.

    Attributes:
        ports: the inputs, in order.
    """

    def __init__(self, served: ServedModel, ports: tuple[Port, ...], bf16: bool = False) -> None:
        super().__init__()
        self.served, self.ports, self.bf16 = served, ports, bf16
        self.tasks = served.model.tasks

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        values = cast(Batch, PortValues(self.ports, tensors))
        if self.bf16:
            with torch.autocast("cpu", torch.bfloat16):
                logits = self.served.logits(values)
        else:
            logits = self.served.logits(values)
        predictions = probabilities(self.served.model.schema, logits)
        return tuple(predictions[task].float() for task in self.tasks)

    def values(self, tensors: tuple[Tensor, ...]) -> Batch:
        """The tensors as a batch for parts of the model, such as the towers of a two-tower."""
        return cast(Batch, PortValues(self.ports, tensors))

    def examples(self, rows: int = 64, seed: int = 0) -> tuple[Tensor, ...]:
        """Random inputs of the right shapes."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(port.example(rows, generator) for port in self.ports)


def cut(served: ServedModel) -> tuple[dict[str, Embeddings], DenseFeatures | None, DensePart]:
    """Take the look-ups out of a served model: (path -> embeddings, the dense columns, the part that follows).

    ``served`` reads ports from now on; the embeddings that are returned hold its tables.
    """
    found: dict[str, Embeddings] = {}
    for path, module in served.model.named_modules():
        inside = any(path.startswith(owner + ".") for owner in found)
        if isinstance(module, FeatureEmbeddings | SequenceEmbeddings) and not inside:
            found[path] = module
    dense = next((module for module in served.model.modules() if isinstance(module, DenseFeatures)), None)
    ports: list[Port] = []
    histories: dict[str, int] = {}
    for path, module in found.items():
        own = module.histories if isinstance(module, FeatureEmbeddings) else module.pooled.histories
        if own is not None:
            widths = [int(projection.shape[1]) for projection in own.projections_ER]
            histories |= dict(zip(own.names, widths, strict=True))
        vectors = len(vector_names(module))
        if vectors:
            ports.append(Port("vectors", path, "", (vectors, module.embedding_dim)))
        if isinstance(module, SequenceEmbeddings):
            for feature in module.sequences:
                ports.append(Port("values", path, feature.name, (feature.max_len or 0, module.embedding_dim)))
                ports.append(Port("lengths", path, feature.name, ()))
        port = VectorsPort(path, module) if isinstance(module, FeatureEmbeddings) else SequencesPort(path, module)
        served.model.set_submodule(path, port)
    if dense is not None and dense.num_features:
        ports.append(Port("dense", "", "", (dense.num_features,)))
    for name, width in histories.items():
        ports += [Port("history", name, "", (width,)), Port("history_mask", name, "", ())]
    return found, dense, DensePart(served, tuple(ports))


def vector_names(embeddings: Embeddings) -> tuple[str, ...]:
    """The features of one vector that are looked up: all names but the histories'."""
    own = embeddings.histories if isinstance(embeddings, FeatureEmbeddings) else embeddings.pooled.histories
    histories = own.names if own is not None else ()
    return tuple(name for name in embeddings.names if name not in histories)
