"""The equations of a rank's memory: pure functions, all in bytes. Tables, ids and sums of rowwise Adagrad as torchrec
and fbgemm hold them: float32 values, int64 ids, int32 lengths."""

from __future__ import annotations

import dataclasses

from rayfm.training.config import DenseOptimizer, TableMemory, TableOptimizerName

FLOAT, ID, LENGTH = 4, 8, 4
"""Bytes of a value of a table, of an id and of a list's length."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """One rank's memory by what it holds, in bytes."""

    tables: float
    """The rows and columns that lie here, those of tables in the host's memory left out."""
    table_optimizer: float
    cache: float
    """Copies of rows of tables in the host's memory, and the cache's books."""
    dense: float
    """Weights and gradients of everything else, and of replicated tables."""
    dense_optimizer: float
    embedding: float
    """Ids that arrive, vectors that leave and vectors that arrive."""
    activations: float
    """What autograd keeps of the dense part."""
    batch: float
    """Two batches: one that trains, one that is copied."""

    @property
    def total(self) -> float:
        """All of it."""
        return float(sum(dataclasses.astuple(self)))


def table_bytes(rows: int, columns: int) -> int:
    """Values of a table, or of a part of one."""
    return rows * columns * FLOAT


def table_state_bytes(optimizer: TableOptimizerName, rows: int, columns: int) -> int:
    """State that a table's optimiser keeps for a part of ``rows`` and ``columns``.

    Row-wise Adagrad has a sum for each row of the part, Adagrad one for each element, SGD none, Adam two an element.
    """
    elements = {"rowwise_adagrad": rows, "adagrad": rows * columns, "sgd": 0, "adam": 2 * rows * columns}
    return elements[optimizer] * FLOAT


def cache_bytes(rows: int, columns: int, load_factor: float) -> float:
    """A cache of a share of the rows: their values, two int64 a slot (id and time of use), an int32 a row of the table.

    As fbgemm's table-batched embeddings hold it with ``MANAGED_CACHING`` and its default, least recently used.
    """
    return load_factor * (table_bytes(rows, columns) + 16 * rows) + 4 * rows


@dataclasses.dataclass(frozen=True)
class Held:
    """What a part of a table takes, by where it is, in bytes."""

    values: float
    """In the device's memory: all of the part's values, or none."""
    state: float
    """In the device's memory: of the optimiser's state."""
    cache: float
    """In the device's memory."""
    host: float
    """In the host's memory."""

    @property
    def device(self) -> float:
        """All that the device's memory holds."""
        return self.values + self.state + self.cache


def held_bytes(optimizer: TableOptimizerName, memory: TableMemory, rows: int, columns: int) -> Held:
    """Where a part of a table and its optimiser's state are. fbgemm keeps a state of a value a row on the device."""
    values, state = table_bytes(rows, columns), table_state_bytes(optimizer, rows, columns)
    if memory.kind == "device":
        return Held(values, state, 0.0, 0.0)
    near = state if optimizer == "rowwise_adagrad" else 0
    cache = cache_bytes(rows, columns, memory.cache_load_factor) if memory.kind == "uvm_caching" else 0.0
    return Held(0.0, near, cache, values + state - near)


def dense_bytes(parameters: int) -> int:
    """Weights and gradients of parameters that every rank holds. (DDP's buckets are the gradients: views of them.)"""
    return 2 * parameters * FLOAT


def dense_state_bytes(optimizer: DenseOptimizer, parameters: int) -> int:
    """State of the dense optimiser: two values a parameter for Adam, one for Adagrad."""
    return parameters * FLOAT * (2 if optimizer.type == "adam" else 1)


def io_bytes(ids: float, vectors_out: float, columns: int, vectors_in: float) -> float:
    """Ids that a rank receives, vectors it makes for all ranks, and those of its own examples that come back."""
    return ids * ID + (vectors_out + vectors_in) * columns * FLOAT
