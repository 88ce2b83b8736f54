"""Training steps through TorchRec's `TrainPipelineSparseDist`: the ids of the next step travel while this one computes.

TorchRec traces a model's forward to find what its sharded collections look up. Ours choose, join and pad keys before
the look-up, which cannot be traced. So the pipeline is shown a model of the look-ups alone, `_LookUps`, and calls the
learner's own forward (``custom_model_fwd``), whose collections then find their ids already exchanged.

Numbers are those of the steps one by one: the same operations in the same order, with only the exchange of ids earlier.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ShardedModule
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from rayfm.data.batch import Batch
from rayfm.models.embeddings import LookUp
from rayfm.training.learner import Learner

Terms = dict[str, tuple[float, float]]

AHEAD = 2
"""Batches that the pipeline reads beyond the one that it trains: one whose ids travel, one on its way to the device."""


class SparseDist:
    """One learner's pipeline through one period.

    Args:
        learner: who trains.
        batches: the period's batches from the step to train on; already on the learner's device, or on their way.
    """

    def __init__(self, learner: Learner, batches: Iterator[Batch]) -> None:
        self.learner = learner
        self._readers = _readers(learner.module)
        self._staged = (_Staged(batch, self._readers) for batch in batches)
        self._batch: Batch | None = None
        self._step = 0
        self._mark = 0.0
        model = _LookUps({path: collection for path, (_, _, collection) in self._readers.items()})
        self._pipeline: TrainPipelineSparseDist[_Staged, Terms] = TrainPipelineSparseDist(
            model,
            self,  # it asks an optimiser for `zero_grad` and `step` alone
            learner.device,
            custom_model_fwd=self._forward,
        )

    def train_step(self, batch: Batch, step: int) -> Terms:
        """As `Learner.train_step`; ``batch`` is the next of the pipeline's batches.

        Raises:
            DivergenceError: a term is not finite, or has exploded. Nothing was changed by the step.
        """
        self._batch, self._step = batch, step
        self._mark = time.perf_counter()
        terms: Terms = self._pipeline.progress(self._staged)
        self.learner.clock.optimizer += time.perf_counter() - self._mark
        return terms

    def close(self) -> None:
        """Give the model its own forward back; batches that were read ahead are forgotten."""
        self._pipeline.detach()
        self._pipeline.reset()

    # -- what the pipeline calls --------------------------------------------------------------------------------

    def zero_grad(self) -> None:
        """As the first part of a step."""
        self.learner.begin(self._step)

    def _forward(self, staged: _Staged) -> tuple[Tensor, Terms]:
        assert staged.batch is self._batch, "the pipeline and the loop have come apart"
        for name, reader in _owners(self._readers).items():
            reader.given = staged.ids[name]
        try:
            return self.learner.forward(staged.batch, self._step)
        finally:
            for reader in _owners(self._readers).values():
                reader.given = None
            now = time.perf_counter()
            self.learner.clock.forward += now - self._mark
            self._mark = now

    def step(self) -> None:
        """As the last part of a step."""
        now = time.perf_counter()
        self.learner.clock.backward += now - self._mark
        self._mark = now
        self.learner.optimizers.step()


Readers = dict[str, tuple[str, LookUp, ShardedModule]]
"""Path of a sharded collection -> path of the module that asks it, that module, the collection."""


def cannot_pipeline(learner: Learner) -> str | None:
    """None where a learner's steps can go through the pipeline, else why not."""
    found = _readers(learner.module)
    sharded = {path for path, part in learner.module.named_modules() if isinstance(part, ShardedModule)}
    if not sharded:
        return "it has no embedding table"
    if alone := sorted(sharded - found.keys()):
        return f"collection {alone[0]} is asked by a module that does not say ahead what it looks up"
    return None


def _readers(module: nn.Module) -> Readers:
    return {
        f"{path}.{name}": (path, part, child)
        for path, part in module.named_modules()
        if isinstance(part, LookUp)
        for name, child in part.named_children()
        if isinstance(child, ShardedModule)
    }


def _owners(readers: Readers) -> dict[str, LookUp]:
    return {path: part for path, part, _ in readers.values()}


class _Staged(Pipelineable):  # type: ignore[misc]
    """A batch on its way through the pipeline, and what one learner looks up of it."""

    def __init__(self, batch: Batch, readers: Readers) -> None:
        self.batch, self._readers = batch, readers
        self.ids: dict[str, dict[str, KeyedJaggedTensor]] = {}
        """Path of the module that asks -> its collections -> ids."""

    def __getitem__(self, collection: str) -> KeyedJaggedTensor:
        """What a collection looks up; worked out when the first is asked for."""
        if not self.ids:
            self.ids = {path: part.ids(self.batch) for path, part in _owners(self._readers).items()}
        path, _, name = collection.rpartition(".")
        return self.ids[path][name]

    def to(self, device: torch.device, non_blocking: bool = False) -> _Staged:
        """The same: whoever reads the batches has sent them to the device, once for all learners."""
        return self

    def record_stream(self, stream: torch.Stream) -> None:
        self.batch.record_stream(stream)
        for found in self.ids.values():
            for ids in found.values():
                ids.record_stream(stream)


class _LookUps(nn.Module):
    """The sharded collections alone, each reading its own item of a staged batch: a forward that can be traced."""

    def __init__(self, collections: dict[str, ShardedModule]) -> None:
        super().__init__()
        self._paths = tuple(collections)
        self.collections = nn.ModuleList(collections.values())

    def forward(self, staged: _Staged) -> list[Tensor]:
        return [collection(staged[path]) for path, collection in zip(self._paths, self.collections, strict=True)]
