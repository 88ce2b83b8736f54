"""Where each embedding table lives: a plan made once, stored with the run, and used again on resume."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import (
    ParameterShardingGenerator,
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ModuleSharder, ShardingPlan, ShardingType
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from rayfm.config import Config, ConfigError, RayfmError
from rayfm.data.store import write_json_atomic
from rayfm.training.config import TrainingConfig
from rayfm.training.table_memory import set_memory


class TablePlacement(Config):
    """Where one table of one collection lives."""

    kind: str
    """table_wise, row_wise, column_wise or data_parallel."""
    rank: int | None = None
    """Owner of a table-wise table."""
    ranks: tuple[int, ...] = ()
    """Owners of a column-wise table's parts, from the first columns on."""


Placement = dict[str, dict[str, TablePlacement]]
"""Path of a collection in the module -> table -> placement."""


Collection: TypeAlias = EmbeddingBagCollection | EmbeddingCollection
"""Pooled features, or sequences item by item."""


_MODEL_PARALLEL = (ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value, ShardingType.COLUMN_WISE.value)


class Sharder(EmbeddingBagCollectionSharder):
    """The stock sharder, with row-wise allowed on CPU too (it works there, and is left out of the stock list)."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [*_MODEL_PARALLEL, ShardingType.DATA_PARALLEL.value]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        if sharding_type == ShardingType.DATA_PARALLEL.value:
            return [EmbeddingComputeKernel.DENSE.value]
        return [EmbeddingComputeKernel.FUSED.value]


class SequenceSharder(EmbeddingCollectionSharder):
    """The same for collections of sequences, which cannot be replicated: torchrec 1.8 then pools what it looks up."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return list(_MODEL_PARALLEL)

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        return [EmbeddingComputeKernel.FUSED.value]


def sharders() -> list[ModuleSharder[nn.Module]]:
    """A sharder for each kind of collection."""
    return [Sharder(), SequenceSharder()]


def collections(module: nn.Module) -> dict[str, Collection]:
    """The embedding collections of a module by their path."""
    return {path: part for path, part in module.named_modules() if isinstance(part, Collection)}


def table_configs(collection: Collection) -> list[BaseEmbeddingConfig]:
    """The tables of a collection."""
    if isinstance(collection, EmbeddingCollection):
        return list(collection.embedding_configs())
    return list(collection.embedding_bag_configs())


def weight_name(path: str, collection: Collection, table: str) -> str:
    """Name of a table's weight among the parameters of the module that has the collection at ``path``."""
    kind = "embeddings" if isinstance(collection, EmbeddingCollection) else "embedding_bags"
    return f"{path}.{kind}.{table}.weight"


def place(module: nn.Module, config: TrainingConfig, world: int) -> Placement:
    """Decide where each table of ``module`` lives on ``world`` workers.

    Table-wise tables, and the parts of column-wise ones, go, largest table first, to the worker with the fewest
    elements so far (the longest-processing-time rule); row-wise ones are cut evenly.

    Raises:
        ConfigError: a table that sequences read is to be replicated.
    """
    load = [0] * world
    placement: Placement = {}
    for path, collection in collections(module).items():
        tables = sorted(table_configs(collection), key=lambda c: (-c.num_embeddings * c.embedding_dim, c.name))
        placement[path] = {}
        for table in tables:
            kind = config.sharding_of(table.name, table.num_embeddings)
            if kind == "data_parallel" and isinstance(collection, EmbeddingCollection):
                raise ConfigError(
                    f"table {table.name!r} is read by a sequence item by item, and such a table cannot be replicated, "
                    "as optimiser adam needs; give it another one in 'table_overrides', and a sharding of its own"
                )
            parts = {"table_wise": 1, "column_wise": config.column_parts_of(table.embedding_dim)}.get(kind, 0)
            owners = []
            for _ in range(parts):
                owners.append(load.index(min(load)))
                load[owners[-1]] += table.num_embeddings * table.embedding_dim // parts
            if kind == "table_wise":
                where = TablePlacement(kind=kind, rank=owners[0])
            else:
                where = TablePlacement(kind=kind, ranks=tuple(sorted(owners)))
            placement[path][table.name] = where
    return placement


def sharding_plan(
    module: nn.Module, placement: Placement, world: int, device: torch.device, config: TrainingConfig | None = None
) -> ShardingPlan:
    """TorchRec's plan for a placement.

    Args:
        module: the unsharded module.
        placement: where its tables live.
        world: workers.
        device: a worker's; of a node's GPUs each of its workers has one.
        config: says in which memory of a GPU's node the tables are; None: all on the GPUs.
    """
    # What a rank's shard says of its device must be that device: on a GPU, the place among its node's.
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world)) if device.type == "cuda" else world
    plan = {}
    for path, collection in collections(module).items():
        generators: dict[str, ParameterShardingGenerator] = {}
        for table, where in placement[path].items():
            if where.kind == "table_wise":
                generators[table] = table_wise(rank=where.rank or 0)
            elif where.kind == "column_wise":
                generators[table] = column_wise(ranks=list(where.ranks))
            else:
                generators[table] = row_wise() if where.kind == "row_wise" else data_parallel()
        sharder: ModuleSharder[nn.Module]
        sharder = SequenceSharder() if isinstance(collection, EmbeddingCollection) else Sharder()
        plan[path] = construct_module_sharding_plan(
            collection, generators, sharder=sharder, world_size=world, local_size=local, device_type=device.type
        )
        if device.type == "cuda" and config is not None:
            for table, sharding in plan[path].items():
                set_memory(sharding, config.memory_of(table))
    return ShardingPlan(plan)


def stored_placement(path: Path, module: nn.Module, config: TrainingConfig, world: int, write: bool) -> Placement:
    """The placement stored at ``path`` for this many workers, or a new one (which rank 0 stores).

    Raises:
        ConfigError: the stored plan is for other tables.
    """
    made = place(module, config, world)
    stored = json.loads(path.read_text()) if path.exists() else {}
    key = str(world)
    if key not in stored:
        if write:
            plain = {c: {t: p.dump() for t, p in tables.items()} for c, tables in made.items()}
            write_json_atomic(path, stored | {key: plain})
        return made
    found = {c: {t: TablePlacement.model_validate(p) for t, p in tables.items()} for c, tables in stored[key].items()}
    if {c: set(t) for c, t in found.items()} != {c: set(t) for c, t in made.items()}:
        raise ConfigError(f"{path}: the stored sharding plan is for other tables; start a new run or remove the plan")
    return found


class Carried(Config):
    """What a table's state in a checkpoint depends on, beside its rows and columns."""

    kind: str
    """How the table was sharded."""
    parts: int
    """Parts of its columns."""
    optimizer: str
    """What trained it."""


def carried(placement: Placement, config: TrainingConfig) -> dict[str, Carried]:
    """By collection and table (``path/table``): what loading a checkpoint of this placement depends on."""
    return {
        f"{path}/{table}": Carried(
            kind=where.kind,
            parts=len(where.ranks) if where.kind == "column_wise" else 1,
            optimizer=config.optimizer_of(table).type,
        )
        for path, tables in placement.items()
        for table, where in tables.items()
    }


def check_carried(old: dict[str, Carried], new: dict[str, Carried], origin: str) -> None:
    """Refuse to load a checkpoint into tables that its optimiser state says nothing about.

    Rows and columns move freely between workers and kinds of sharding, and so does a state that has a value for each
    element, or none. Row-wise Adagrad has one for each row of each part of the columns: with other parts there is none.

    Args:
        old: of the checkpoint; a table that it does not name is not checked.
        new: of this run.
        origin: opens the error message.

    Raises:
        RayfmError: naming the table, and what it was and is.
    """
    for name, now in new.items():
        was, table = old.get(name), name.rpartition("/")[2]
        if was is None:
            continue
        if was.optimizer != now.optimizer:
            raise RayfmError(
                f"{origin}: table {table!r} was trained by {was.optimizer} and is now by {now.optimizer}, whose state "
                "the checkpoint does not have; give the table its optimiser back, or start a new run"
            )
        if now.optimizer == "rowwise_adagrad" and was.parts != now.parts:
            raise RayfmError(
                f"{origin}: table {table!r} was sharded {_parts(was)} and is now {_parts(now)}; row-wise Adagrad keeps "
                "a sum for each part of a row, which cannot be cut or joined. Give the table its sharding and "
                "column_parts back, or start a new run (with optimiser adagrad or sgd it would go on)"
            )


def _parts(table: Carried) -> str:
    return f"{table.kind} in {table.parts} parts" if table.parts > 1 else table.kind


def local_shards(value: Any) -> Iterator[tuple[Tensor, int, int]]:
    """This rank's shards of a table, each with the row and column that it starts at."""
    if isinstance(value, ShardedTensor):
        for shard in value.local_shards():
            row, column = shard.metadata.shard_offsets
            yield shard.tensor, row, column
    elif isinstance(value, DTensor):
        local: Any = value.to_local()  # TorchRec's local shards, which look like a tensor
        for shard, offsets in zip(local.local_shards(), local.local_offsets(), strict=True):
            yield shard, offsets[0], offsets[1]
    else:
        yield value, 0, 0
