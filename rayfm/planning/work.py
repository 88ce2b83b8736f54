"""What one training step of a trainer's models asks for, counted: look-ups, operations, bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from rayfm.data.batch import Batch
from rayfm.models.base import Model, ModelConfig
from rayfm.models.build import build_model
from rayfm.models.size import ModelSize, model_size
from rayfm.models.synthetic import DEFAULT_MAX_LEN, synthetic_batch
from rayfm.schema import Schema
from rayfm.training.config import TableMemory, TableOptimizerName, TrainingConfig
from rayfm.training.optim import fuse_table_optimizers
from rayfm.training.sharding import collections, table_configs


@dataclasses.dataclass(frozen=True)
class Learner:
    """A model that a trainer trains ``copies`` times: a group trains each variant and seed of a student."""

    name: str
    model: ModelConfig
    tasks: tuple[str, ...]
    copies: int = 1


@dataclasses.dataclass(frozen=True)
class TableWork:
    """One table of one collection, and what an example asks of it."""

    path: str
    """Of the collection in the planned module."""
    name: str
    rows: int
    columns: int
    pooled: bool
    """Whether it gives a vector a feature (or one an id: sequences)."""
    lengths: tuple[float, ...]
    """Ids an example has, by feature that reads the table."""
    optimizer: TableOptimizerName
    parts: int
    """Parts that it is cut into where it is column-wise."""
    memory: TableMemory = dataclasses.field(default_factory=TableMemory)
    """Where its rows are on a GPU's node."""

    @property
    def ids(self) -> float:
        """Rows looked up an example."""
        return sum(self.lengths)

    @property
    def vectors(self) -> float:
        """Vectors that come out an example."""
        return len(self.lengths) if self.pooled else self.ids


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step of all learners of a trainer asks for."""

    module: nn.Module
    """The models on ``meta``, their fused optimisers attached: what TorchRec's planner reads."""
    tables: tuple[TableWork, ...]
    dense_parameters: int
    matmul_flops: float
    """Of a forward, an example."""
    other_flops: float
    """Elementwise operations and reductions of a forward, an example, pooling left out."""
    operators: int
    """Operators of a forward."""
    activation_bytes: float
    """That autograd keeps for the backward, an example."""
    batch_bytes: float
    """Of a batch, an example."""

    @property
    def table_parameters(self) -> int:
        """Of all tables."""
        return sum(table.rows * table.columns for table in self.tables)


def count_work(learners: Sequence[Learner], schema: Schema, training: TrainingConfig, bf16: bool) -> Work:
    """Count a step of these learners. Every list is counted at its full length (``max_len``, or 8 without one).

    Objectives' own heads and adapters are not counted, nor are histories of teachers' representations as input.

    Args:
        learners: the models of one worker group.
        schema: the pipeline's schema.
        training: how they are trained: optimisers of tables.
        bf16: whether the models run under bfloat16 autocast, so that activations are half as wide.

    Raises:
        ConfigError: a model cannot be built.
    """
    small = schema.model_copy(
        update={
            "tables": {
                name: table.model_copy(update={"rows": min(table.rows, 8)}) for name, table in schema.tables.items()
            }
        }
    )
    batches = [synthetic_batch(small, rows, longest=True) for rows in (2, 3)]
    read = [synthetic_batch(_read(small, learners), rows, longest=True) for rows in (2, 3)]
    models = nn.ModuleDict()
    sizes: list[tuple[int, ModelSize, int, float]] = []
    for learner in learners:
        for copy in range(learner.copies):
            models[f"{learner.name}_{copy}" if learner.copies > 1 else learner.name] = build_model(
                learner.model, schema, learner.tasks, device=torch.device("meta")
            )
        held = build_model(learner.model, small, learner.tasks, seed=0)
        kept = [saved_bytes(held, batch, bf16) for batch in batches]
        sizes.append(
            (
                learner.copies,
                model_size(learner.model, schema, learner.tasks),
                operators(held, batches[0]),
                float(kept[1] - kept[0]),
            )
        )
    fuse_table_optimizers(models, training, schema.tables)
    tables = table_work(models, schema, training)
    pooling = sum(table.ids * table.columns for table in tables if table.pooled)
    return Work(
        module=models,
        tables=tables,
        dense_parameters=sum(copies * size.dense_parameters for copies, size, _, _ in sizes),
        matmul_flops=sum(copies * size.matmul_flops for copies, size, _, _ in sizes),
        other_flops=max(0.0, sum(copies * size.other_flops for copies, size, _, _ in sizes) - pooling),
        operators=sum(copies * calls for copies, _, calls, _ in sizes),
        activation_bytes=sum(copies * kept for copies, _, _, kept in sizes),
        batch_bytes=float(batch_size_bytes(read[1]) - batch_size_bytes(read[0])),
    )


def _read(schema: Schema, learners: Sequence[Learner]) -> Schema:
    """The schema with the features alone that any of the learners reads."""
    if any(learner.model.features is None for learner in learners):
        return schema
    names = {name for learner in learners for name in learner.model.features or ()}
    return schema.model_copy(update={"features": tuple(f for f in schema.features if f.name in names)})


def table_work(module: nn.Module, schema: Schema, training: TrainingConfig) -> tuple[TableWork, ...]:
    """The tables of a module's collections, with the full lengths of the features that read them."""
    longest = {f.name: float((f.max_len or DEFAULT_MAX_LEN) if f.is_list else 1) for f in schema.features}
    return tuple(
        TableWork(
            path=path,
            name=table.name,
            rows=table.num_embeddings,
            columns=table.embedding_dim,
            pooled=isinstance(collection, EmbeddingBagCollection),
            lengths=tuple(longest[name] for name in table.feature_names),
            optimizer=training.optimizer_of(table.name).type,
            parts=training.column_parts_of(table.embedding_dim),
            memory=training.memory_of(table.name)
            if training.optimizer_of(table.name).type != "adam"
            else TableMemory(),
        )
        for path, collection in collections(module).items()
        for table in table_configs(collection)
    )


def saved_bytes(model: Model, batch: Batch, bf16: bool = False) -> int:
    """Bytes that autograd keeps between forward and backward, parameters left out and shared storage counted once."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = tensor  # held, so that no other storage takes its place
        return tensor

    with (
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext(),
    ):
        model(batch)
    return sum(int(tensor.untyped_storage().nbytes()) for tensor in kept.values())


class _Operators(TorchDispatchMode):
    """Counts calls that compute: all but views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += int(not func.is_view)
        return func(*args, **(kwargs or {}))


def operators(model: Model, batch: Batch) -> int:
    """Operators that a forward starts; views cost nothing."""
    calls = _Operators()
    with torch.no_grad(), calls:
        model(batch)
    return calls.count


def batch_size_bytes(batch: Batch) -> int:
    """Bytes of a batch's tensors."""
    found: list[Tensor] = []
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, KeyedJaggedTensor):
            found += [t for t in (value.values(), value.lengths(), value.weights_or_none()) if t is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in found)
