"""A sharding plan by TorchRec's planner, for ranks that are not there."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
import warnings
from collections.abc import Iterator
from typing import Any

from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.planners import EmbeddingShardingPlanner
from torchrec.distributed.planner.proposers import GreedyProposer, GridSearchProposer, UniformProposer
from torchrec.distributed.planner.shard_estimators import EmbeddingStorageEstimator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    ParameterConstraints,
    PlannerError,
    Topology,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import CacheParams, ShardingType

from rayfm.config import CapacityError, ConfigError
from rayfm.planning.estimators import OncePerSize
from rayfm.planning.hardware import Hardware
from rayfm.planning.memory import held_bytes
from rayfm.planning.work import TableWork, Work
from rayfm.training.config import ShardingKind, TrainingConfig
from rayfm.training.sharding import SequenceSharder, Sharder
from rayfm.training.table_memory import KERNELS

GRID_WORK = 200_000
"""Shards that an exhaustive search may place in all; beyond, TorchRec's grid search is left out."""
FULL_SEARCH = 4_096
"""Tables times ranks up to which TorchRec's greedy searches run to their end."""
PATIENCE = 5
"""Above that, proposals without a better plan after which a greedy search ends."""
SEARCH_SECONDS = 120
"""A limit besides."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """``nodes`` of ``per_node`` devices."""

    nodes: int
    per_node: int
    hardware: Hardware

    def __post_init__(self) -> None:
        for name, value in (("--nodes", self.nodes), ("--gpus-per-node", self.per_node)):
            if value < 1:
                raise ConfigError(f"{name} is {value}; a cluster has at least 1")

    @property
    def world(self) -> int:
        """Ranks: one a device."""
        return self.nodes * self.per_node

    @property
    def usable_bytes(self) -> float:
        """Of a device's memory, what is planned with."""
        return self.hardware.memory_gb * 1e9 * (1 - self.hardware.reserved)

    @property
    def usable_host_bytes(self) -> float:
        """Of the memory of a node's host, what is planned with."""
        return self.hardware.host_memory_gb * 1e9 * (1 - self.hardware.reserved)


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a table on a rank."""

    rank: int
    rows: int
    columns: int


@dataclasses.dataclass(frozen=True)
class TablePlan:
    """Where a table lives."""

    table: TableWork
    kind: ShardingKind
    pieces: tuple[Piece, ...]
    """Empty where it is replicated: each rank has all of it."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where all tables live, and how that was found."""

    tables: tuple[TablePlan, ...]
    search: str
    """Which search found it."""
    seconds: float


def allowed_kinds(table: TableWork, training: TrainingConfig, world: int, free: float) -> tuple[ShardingKind, ...]:
    """The kinds that training can give a table, without those of which a piece is larger than a rank's free memory.

    ``auto`` leaves the choice to the planner. The kinds are those that rayfm trains with.
    """
    if table.optimizer == "adam":
        return ("data_parallel",)
    said = training.sharding_overrides.get(table.name, training.sharding)
    kinds: tuple[ShardingKind, ...] = ("table_wise", "row_wise", "column_wise") if said == "auto" else (said,)
    if said == "auto" and table.parts == 1:
        kinds = ("table_wise", "row_wise")
    if said == "auto" and world == 1:
        kinds = ("table_wise",)  # all kinds are one piece
    return tuple(kind for kind in kinds if piece_bytes(table, kind, world) <= free)


def piece_bytes(table: TableWork, kind: ShardingKind, world: int) -> int:
    """What the largest piece of a table and its optimiser's state take of a device's memory."""
    rows = math.ceil(table.rows / world) if kind == "row_wise" else table.rows
    columns = table.columns // table.parts if kind == "column_wise" else table.columns
    return math.ceil(held_bytes(table.optimizer, table.memory, rows, columns).device)


def kernels(table: TableWork) -> dict[str, Any]:
    """TorchRec's constraints that put a table where the config says: its compute kernel, and what of it is cached."""
    if table.optimizer == "adam":
        return {}
    found: dict[str, Any] = {"compute_kernels": [KERNELS[table.memory.kind]]}
    if table.memory.kind == "uvm_caching":
        found["cache_params"] = CacheParams(load_factor=table.memory.cache_load_factor)
    return found


def _offered(kernels: list[str], device: str) -> list[str]:
    """A sharder's kernels and, on a GPU, those of the other memories: training takes them table by table."""
    fused = EmbeddingComputeKernel.FUSED.value in kernels
    return [*KERNELS.values()] if fused and device == "cuda" else kernels


class _AnyMemory(Sharder):
    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        return _offered(super().compute_kernels(sharding_type, compute_device_type), compute_device_type)


class _AnyMemorySequence(SequenceSharder):
    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        return _offered(super().compute_kernels(sharding_type, compute_device_type), compute_device_type)


def topology(cluster: Cluster, free: float) -> Topology:
    """TorchRec's description of the cluster (its bandwidths are in bytes a millisecond).

    Args:
        cluster: the devices.
        free: bytes of a device that tables and their inputs and outputs may take.
    """
    hardware = cluster.hardware
    per_ms = 1e9 / 1e3
    memory, link = hardware.memory_efficiency * per_ms, hardware.link_efficiency * per_ms
    cuda = hardware.device == "cuda"
    found: Topology = TopologyFactory.create_topology(
        TrainerConfig(world_size=cluster.world, local_world_size=cluster.per_node),
        HardwareConfig(
            hbm_cap_bytes=int(free) if cuda else None,
            ddr_cap_bytes=int(cluster.usable_host_bytes / cluster.per_node) if cuda else int(free),
            intra_host_bw=hardware.nvlink_gbs * link,
            inter_host_bw=hardware.network_gbs * link,
            hbm_mem_bw=hardware.memory_gbs * memory,
            ddr_mem_bw=hardware.memory_gbs * memory,
            hbm_to_ddr_mem_bw=hardware.host_gbs * link,
        ),
        KernelConfig(compute_device=hardware.device, use_hardware_based_bandwidth=True),
    )
    return found


def proposers(tables: int, options: int, world: int) -> tuple[list[Any], str]:
    """TorchRec's searches for a problem of this size, and their names.

    Placing a plan costs tables times ranks: for many ranks the exhaustive search is left out, and the greedy ones end
    when they stop finding better plans.

    Args:
        tables: how many there are.
        options: product of the numbers of kinds that each may have.
        world: ranks.
    """
    full = tables * world <= FULL_SEARCH
    found: list[Any] = [
        GreedyProposer(threshold=None if full else PATIENCE),
        GreedyProposer(use_depth=False, threshold=None if full else PATIENCE),
        UniformProposer(),
    ]
    grid = options * tables * world <= GRID_WORK
    if grid:
        found.insert(0, GridSearchProposer(max_proposals=options))
    greedy = "greedy" if full else f"reduced greedy (ends after {PATIENCE} proposals without gain)"
    return found, f"{'grid, ' if grid else ''}{greedy}, uniform"


def find_plan(work: Work, training: TrainingConfig, cluster: Cluster, batch: int, free: float) -> Plan:
    """The plan that TorchRec's planner rates best.

    Args:
        work: what is trained.
        training: its kinds of sharding.
        cluster: the devices.
        batch: examples of a rank's batch.
        free: bytes of a device that tables and their inputs and outputs may take.

    Raises:
        CapacityError: no plan fits, with the arithmetic and what would fit.
    """
    if not work.tables:
        return Plan((), "no tables", 0.0)
    check_fits(work, cluster, free)
    started = time.perf_counter()
    constraints, options = {}, 1
    for table in work.tables:
        kinds = allowed_kinds(table, training, cluster.world, free)
        if not kinds:
            raise CapacityError(_too_large(table, training, cluster, free))
        options *= len(kinds)
        constraints[table.name] = ParameterConstraints(
            sharding_types=list(kinds),
            min_partition=table.columns // table.parts,
            pooling_factors=list(table.lengths),
            **kernels(table),
        )
    searches, name = proposers(len(work.tables), options, cluster.world)
    with _quiet():
        there = topology(cluster, free)
        planner = EmbeddingShardingPlanner(
            topology=there,
            batch_size=batch,
            constraints=constraints,
            enumerator=EmbeddingEnumerator(
                there,
                batch,
                constraints,
                estimator=[OncePerSize(there, constraints), EmbeddingStorageEstimator(there, constraints)],
            ),
            storage_reservation=FixedPercentageStorageReservation(0.0),
            proposer=searches,
            stats=[],
            debug=False,
            timeout_seconds=SEARCH_SECONDS,
        )
        try:
            found = planner.plan(work.module, [_AnyMemory(), _AnyMemorySequence()])
        except PlannerError:
            beside = ""
            if any(table.memory.kind != "device" for table in work.tables):
                each = cluster.usable_host_bytes / cluster.per_node
                beside = f", or the {each / 1e9:,.1f} GB of its host's memory that are each one's share"
            raise CapacityError(
                f"TorchRec's planner finds no plan: tables, their state, inputs and outputs do not fit the "
                f"{free / 1e9:.1f} GB that each of {cluster.world} devices has free of the dense part{beside}. Take "
                f"more nodes, a smaller --batch-size than {batch}, or 'sharding: auto', which cuts tables where they "
                "do not fit"
            ) from None
    tables = {(table.path, table.name): table for table in work.tables}
    plans = [
        _table_plan(tables[path, name], where) for path, module in found.plan.items() for name, where in module.items()
    ]
    seconds = time.perf_counter() - started
    stopped = f"; stopped after {SEARCH_SECONDS} s" if seconds > SEARCH_SECONDS else ""
    plans.sort(key=lambda plan: (-plan.table.rows * plan.table.columns, plan.table.path, plan.table.name))
    return Plan(tuple(plans), name + stopped, seconds)


def check_fits(work: Work, cluster: Cluster, free: float) -> None:
    """Refuse what cannot fit however it is cut.

    Raises:
        CapacityError: naming what is short and the nodes that would be enough.
        ConfigError: tables are to lie beside a GPU's memory, on hardware that is none.
    """
    sharded = [
        held_bytes(table.optimizer, table.memory, table.rows, table.columns)
        for table in work.tables
        if table.optimizer != "adam"
    ]
    on_host, hosts = sum(held.host for held in sharded), cluster.usable_host_bytes * cluster.nodes
    if on_host and cluster.hardware.device != "cuda":
        raise ConfigError(
            f"table_memory is beside a GPU's, and the hardware is a {cluster.hardware.device}; leave it out of the "
            "config (--set), or plan for a GPU"
        )
    if on_host > hosts:
        raise CapacityError(
            f"tables in the hosts' memory take {on_host / 1e9:,.1f} GB, and {cluster.nodes} nodes have "
            f"{hosts / 1e9:,.1f} GB: short by {(on_host - hosts) / 1e9:,.1f} GB. It takes --nodes "
            f"{math.ceil(on_host / cluster.usable_host_bytes)} at least, nodes with more memory (--gpu-set "
            "host_memory_gb=...), or fewer tables with that table_memory"
        )
    size = sum(held.device for held in sharded)
    capacity = max(free, 0.0) * cluster.world
    if free > 0 and size <= capacity:
        return
    hardware = cluster.hardware
    if free <= 0:
        raise CapacityError(
            f"the part that every device holds (dense weights, optimiser, activations, batch) is {-free / 1e9:.1f} GB "
            f"larger than the {cluster.usable_bytes / 1e9:.1f} GB of a device; more nodes do not help: take a smaller "
            "--batch-size or --scale, --precision bf16, or a device with more memory"
        )
    nodes = math.ceil(size / (free * cluster.per_node))
    raise CapacityError(
        f"tables and their optimiser take {size / 1e9:,.1f} GB, and {cluster.world} devices have {capacity / 1e9:,.1f} "
        f"GB free of the dense part: short by {(size - capacity) / 1e9:,.1f} GB. It takes --nodes {nodes} at least, "
        f"devices with {size / capacity * hardware.memory_gb:,.0f} GB, or tables with {capacity / size:.0%} of the rows"
    )


def _too_large(table: TableWork, training: TrainingConfig, cluster: Cluster, free: float) -> str:
    kind = training.sharding_overrides.get(table.name, training.sharding)
    if kind == "auto":
        kind = "row_wise"
    size = piece_bytes(table, kind, cluster.world)
    return (
        f"table {table.name!r}: sharded {kind}, its largest piece takes {size / 1e9:,.1f} GB, and a device has "
        f"{free / 1e9:,.1f} GB free: short by {(size - free) / 1e9:,.1f} GB; give it 'sharding_overrides: "
        f"{{{table.name}: row_wise}}', fewer rows, or more nodes"
    )


def _table_plan(table: TableWork, where: Any) -> TablePlan:
    kind: ShardingKind = where.sharding_type
    if kind == ShardingType.DATA_PARALLEL.value:
        return TablePlan(table, kind, ())
    pieces = tuple(
        Piece(rank=shard.placement.rank(), rows=shard.shard_sizes[0], columns=shard.shard_sizes[1])
        for shard in where.sharding_spec.shards
        if shard.shard_sizes[0]
    )
    return TablePlan(table, kind, pieces)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TorchRec logs every proposal and warns of what is meant, some of it through the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
