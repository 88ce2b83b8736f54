"""A model after its embeddings: what it looked up for a batch, given to it again with one feature's rows permuted.

Every model of rayfm reads a batch through three modules alone: `FeatureEmbeddings`, `SequenceEmbeddings` and
`DenseFeatures`. What they give is a row an example (pooled vectors, padded sequences, dense columns), so permuting the
rows of one feature there is the same as permuting the feature itself, and all features, and all their shuffles, are
scored from one pass of embeddings. `replayable` finds out whether a model, one of an extension perhaps, is so.

Shape letters: B rows, F embedded features, E embedding dimension.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from rayfm.data.batch import Batch
from rayfm.models.base import ModelOutput
from rayfm.models.embeddings import DenseFeatures, FeatureEmbeddings
from rayfm.models.sequences import PaddedSequence, SequenceEmbeddings
from rayfm.selection.shuffle import shuffled

Inputs = FeatureEmbeddings | SequenceEmbeddings | DenseFeatures
Sequences = dict[str, PaddedSequence]

TOLERANCE = 1e-5
"""How far a logit may be from that of a batch that was shuffled itself."""


def input_modules(model: nn.Module) -> list[Inputs]:
    """The modules through which a model reads its batches, each once; those inside another one left out."""
    found: list[Inputs] = []

    def walk(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, FeatureEmbeddings | SequenceEmbeddings | DenseFeatures):
                if not any(child is known for known in found):
                    found.append(child)
            else:
                walk(child)

    walk(model)
    return found


class Replay:
    """One batch's look-ups, and the rest of the model on them. For inference: nothing is differentiated through it.

    Args:
        model: a model, sharded or not; in evaluation mode.

    Attributes:
        features: what can be permuted after the embeddings.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._modules = input_modules(model)
        names = [name for module in self._modules for name in (*module.names, *_sequence_names(module))]
        self.features = frozenset(names)
        self._batch: Batch | None = None
        self._vectors: list[Tensor] = []
        self._sequences: list[Sequences] = []

    def record(self, batch: Batch) -> ModelOutput:
        """Look a batch up, and the output for it as it is. Look-ups of an earlier batch are forgotten."""
        self._batch, self._vectors, self._sequences = batch, [], []
        for module in self._modules:
            value = module(batch)
            vectors, sequences = value if isinstance(value, tuple) else (value, {})
            # Of our own: columns are permuted in place, and dense ones are views of what was read.
            self._vectors.append(vectors.clone())
            self._sequences.append(dict(sequences))
        return self.output()

    def output(self) -> ModelOutput:
        """The model's output for the look-ups as they are."""
        assert self._batch is not None, "record a batch first"
        with self._replayed():
            output: ModelOutput = self.model(self._batch)
        return output

    def permuted(self, feature: str, order_B: Tensor) -> ModelOutput:
        """The output with row i's look-ups of ``feature`` taken from row ``order_B[i]``."""
        assert feature in self.features, feature
        with contextlib.ExitStack() as stack:
            for position, module in enumerate(self._modules):
                if feature in module.names:
                    column = self._vectors[position].select(1, module.names.index(feature))
                    stack.enter_context(_permuted_rows(column, order_B))
                elif feature in _sequence_names(module):
                    before = self._sequences[position][feature]
                    moved = PaddedSequence(before.values[order_B], before.lengths[order_B])
                    self._sequences[position][feature] = moved
                    stack.callback(self._sequences[position].__setitem__, feature, before)
            return self.output()

    @contextlib.contextmanager
    def _replayed(self) -> Iterator[None]:
        """Inside, the input modules give what was recorded. An instance's ``forward`` comes before its class's."""
        for module, vectors, sequences in zip(self._modules, self._vectors, self._sequences, strict=True):
            value = (vectors, sequences) if isinstance(module, SequenceEmbeddings) else vectors
            vars(module)["forward"] = lambda _, value=value: value
        try:
            yield
        finally:
            for module in self._modules:
                vars(module).pop("forward", None)


def _sequence_names(module: Inputs) -> tuple[str, ...]:
    return tuple(feature.name for feature in module.sequences) if isinstance(module, SequenceEmbeddings) else ()


@contextlib.contextmanager
def _permuted_rows(column: Tensor, order_B: Tensor) -> Iterator[None]:
    """Inside, the rows of ``column``, a view ``[B, ...]``, are in another order. Cheaper than a copy of all columns."""
    before = column.clone()
    column.copy_(before[order_B])
    try:
        yield
    finally:
        column.copy_(before)


def replayable(model: nn.Module, batch: Batch, features: tuple[str, ...], dense: tuple[str, ...]) -> frozenset[str]:
    """Those of ``features`` whose look-ups may be permuted in place of the features, as tried on ``batch``.

    All of them for rayfm's own models. A model of an extension that reads a feature in another way, besides or
    instead, is found out here, and is to be given the shuffled feature itself.

    Args:
        model: in evaluation mode.
        batch: a few rows.
        features: what the model reads.
        dense: names of the columns of ``batch.dense``.
    """
    rows = len(batch)
    order_B = torch.arange(rows, device=batch.example_id.device).roll(max(1, rows // 3))
    found = set()
    replay = Replay(model)
    with torch.no_grad():
        replay.record(batch)
        for feature in features:
            if feature not in replay.features:
                continue
            fast = replay.permuted(feature, order_B).logits
            plain = model(shuffled(batch, feature, order_B, dense)).logits
            if all(torch.allclose(fast[task], plain[task], rtol=TOLERANCE, atol=TOLERANCE) for task in plain):
                found.add(feature)
    return frozenset(found)
