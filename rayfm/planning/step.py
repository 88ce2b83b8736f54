"""Memory of each rank and the time of a step, for a plan on a cluster."""

from __future__ import annotations

import dataclasses

from rayfm.planning import costs
from rayfm.planning.hardware import Hardware, Precision
from rayfm.planning.memory import (
    FLOAT,
    ID,
    LENGTH,
    Memory,
    dense_bytes,
    dense_state_bytes,
    held_bytes,
    io_bytes,
    table_state_bytes,
)
from rayfm.planning.search import Cluster, Piece, Plan, TablePlan
from rayfm.planning.work import TableWork, Work
from rayfm.training.config import TrainingConfig

BUCKET = 25 * 2**20
"""Bytes of DDP's buckets: each is an all-reduce."""


@dataclasses.dataclass(frozen=True)
class Load:
    """What one rank does in the embedding part of a step, in bytes."""

    forward: float = 0.0
    """Read and written in device memory by look-ups."""
    backward: float = 0.0
    """Read and written by their backward with the fused optimiser in it."""
    ids: float = 0.0
    """Ids and lengths that arrive from other ranks."""
    vectors: float = 0.0
    """Vectors sent to other ranks (and gradients received)."""
    host_link: float = 0.0
    """Read over the link to the host: rows that are in its memory. What is written back goes the other way."""
    memory: float = 0.0
    """Tables."""
    state: float = 0.0
    """Their optimiser's state."""
    cache: float = 0.0
    """Of tables in the host's memory."""
    host: float = 0.0
    """In the host's memory: tables, and state."""
    io: float = 0.0
    """Ids and vectors held."""

    def __add__(self, other: Load) -> Load:
        return Load(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


def piece_load(table: TableWork, kind: str, piece: Piece, batch: int, world: int, skew: float = 0.0) -> Load:
    """What a piece of a table makes its rank do in a step of ``batch`` examples a rank.

    All ids are counted as distinct, so that each has its row read and written. A row-wise piece gets its share of the
    ids, but pooled vectors (partial sums) of all examples; how those travel is `reduced_bytes`.

    A row in the host's memory is read over the link by the look-up and by the update, and written by the update. Behind
    a cache, what the cache misses is read over the link once and takes the place of a row that is written back.

    Args:
        table: the table.
        kind: its sharding.
        piece: the piece.
        batch: examples a rank.
        world: ranks.
        skew: exponent of the law that ids follow, see `rayfm.planning.costs.cache_hits`.
    """
    share = piece.rows / table.rows
    examples = batch * world
    ids = examples * table.ids * share
    partial = kind == "row_wise" and table.pooled
    vectors = examples * table.vectors * (share if not table.pooled else 1.0)
    row = piece.columns * FLOAT
    held = held_bytes(table.optimizer, table.memory, piece.rows, piece.columns)
    all_state = table_state_bytes(table.optimizer, piece.rows, piece.columns) / piece.rows
    state = held.state / piece.rows
    near = 0.0 if table.memory.kind == "uvm" else row
    missed = 0.0
    if table.memory.kind == "uvm_caching":
        missed = ids * (1 - costs.cache_hits(table.memory.cache_load_factor, skew))
    over_link = missed * row if near else 2 * ids * row
    others = (world - 1) / world
    return Load(
        forward=ids * (ID + near) + vectors * row + 2 * missed * row,
        backward=vectors * row + ids * (ID + 2 * near + 2 * state),
        ids=others * (ids * ID + examples * len(table.lengths) * LENGTH),
        vectors=0.0 if partial else others * vectors * row,
        host_link=over_link + ids * (all_state - state),
        memory=held.values,
        state=held.state,
        cache=held.cache,
        host=held.host,
        io=io_bytes(ids, vectors, piece.columns, 0.0),
    )


def reduced_bytes(plan: Plan, batch: int, world: int) -> float:
    """Bytes a rank that the reduce-scatter of row-wise pooled vectors starts from: vectors of all ranks' examples."""
    return sum(
        batch * world * p.table.vectors * p.table.columns * FLOAT
        for p in plan.tables
        if p.kind == "row_wise" and p.table.pooled
    )


def replicated_load(table: TableWork, batch: int) -> Load:
    """What a replicated table makes every rank do: its own examples' look-ups; the rest is as for dense parameters."""
    ids, vectors, row = batch * table.ids, batch * table.vectors, table.columns * FLOAT
    return Load(forward=ids * (ID + row) + vectors * row, backward=vectors * row + ids * (ID + 2 * row))


def rank_loads(plan: Plan, batch: int, world: int, skew: float = 0.0) -> list[Load]:
    """What each rank does; ``skew`` is as of `piece_load`."""
    loads = [[0.0] * len(dataclasses.fields(Load)) for _ in range(world)]
    shared = Load()
    for placed in plan.tables:
        if placed.kind == "data_parallel":
            shared += replicated_load(placed.table, batch)
        same: dict[tuple[int, int], tuple[float, ...]] = {}  # most pieces of a row-wise table are of one size
        for piece in placed.pieces:
            key = (piece.rows, piece.columns)
            if key not in same:
                same[key] = dataclasses.astuple(piece_load(placed.table, placed.kind, piece, batch, world, skew))
            mine = loads[piece.rank]
            for position, value in enumerate(same[key]):
                mine[position] += value
    return [Load(*values) + shared for values in loads]


def received_bytes(plan: Plan, batch: int) -> float:
    """Vectors of a rank's own examples, from all tables."""
    return sum(batch * p.table.vectors * p.table.columns * FLOAT for p in plan.tables)


def replicated_parameters(work: Work) -> int:
    """Parameters that every rank holds: the dense part, and tables under Adam."""
    return work.dense_parameters + sum(t.rows * t.columns for t in work.tables if t.optimizer == "adam")


def dense_memory(work: Work, training: TrainingConfig, batch: int) -> Memory:
    """What every rank holds whatever the plan."""
    adam_tables = replicated_parameters(work) - work.dense_parameters
    return Memory(
        tables=0.0,
        table_optimizer=0.0,
        cache=0.0,
        dense=dense_bytes(replicated_parameters(work)),
        dense_optimizer=dense_state_bytes(training.dense, work.dense_parameters) + 2 * FLOAT * adam_tables,
        embedding=0.0,
        activations=batch * work.activation_bytes,
        batch=2 * batch * work.batch_bytes,
    )


def rank_memory(load: Load, shared: Memory, received: float) -> Memory:
    """A rank's memory: what it holds of the tables, beside what all hold."""
    return dataclasses.replace(
        shared,
        tables=load.memory,
        table_optimizer=load.state,
        cache=load.cache,
        embedding=load.io + received,
    )


def host_memory(loads: list[Load], per_node: int) -> float:
    """Bytes of tables in the memory of the fullest node's host, ``per_node`` ranks a node."""
    nodes = [loads[first : first + per_node] for first in range(0, len(loads), per_node)]
    return max(sum(load.host for load in node) for node in nodes)


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of a step by part. Ranks wait for one another in every collective, so that the slowest one counts."""

    host_to_device: float
    ids_all_to_all: float
    lookup: float
    host_rows: float
    vectors_forward: float
    dense_forward: float
    dense_backward: float
    vectors_backward: float
    table_update: float
    dense_all_reduce: float
    dense_optimizer: float

    @property
    def total(self) -> float:
        """One part after the other: nothing overlapped."""
        return float(sum(dataclasses.astuple(self)))

    @property
    def device(self) -> float:
        """What the device computes."""
        return self.lookup + self.dense_forward + self.dense_backward + self.table_update + self.dense_optimizer

    @property
    def links(self) -> float:
        """What goes between devices."""
        return self.ids_all_to_all + self.vectors_forward + self.vectors_backward + self.dense_all_reduce

    @property
    def overlapped(self) -> float:
        """Computing, links and copying at the same time: no pipeline is faster."""
        return max(self.device, self.links, self.host_to_device + self.host_rows)

    @property
    def bottleneck(self) -> str:
        """The longest part."""
        parts = dataclasses.asdict(self)
        return max(parts, key=lambda name: parts[name])


def step_time(work: Work, plan: Plan, cluster: Cluster, batch: int, precision: Precision) -> StepTime:
    """The time of a step of ``batch`` examples a rank."""
    hardware, world = cluster.hardware, cluster.world
    loads = rank_loads(plan, batch, world, hardware.id_skew)
    memory = hardware.memory_gbs * 1e9
    links = _Links(cluster)
    width = 2 if precision == "bf16" else 4
    sharded = [p for p in plan.tables if p.kind != "data_parallel"]
    calls = _calls(sharded)
    ids = max(max((load.ids for load in loads), default=0.0), _sent_ids(sharded, batch, world))
    vectors = max((load.vectors for load in loads), default=0.0)
    received = sum(
        batch * p.table.vectors * p.table.columns * FLOAT
        for p in sharded
        if not (p.kind == "row_wise" and p.table.pooled)
    )
    vectors = max(vectors, received * (world - 1) / world)
    reduced = reduced_bytes(plan, batch, world)
    exchange = links.all_to_all(vectors) + links.ring(reduced) + links.start_up(calls)
    parameters = replicated_parameters(work)
    forward = (
        costs.computed(batch * work.matmul_flops, hardware.peak_flops(precision), hardware.compute_efficiency)
        + costs.moved(costs.elementwise_bytes(batch * work.other_flops, width), memory, hardware.memory_efficiency)
        + work.operators * hardware.operator_us * 1e-6
    )
    return StepTime(
        host_to_device=0.0
        if hardware.device == "cpu"
        else costs.moved(batch * work.batch_bytes, hardware.host_gbs * 1e9, hardware.link_efficiency),
        ids_all_to_all=links.all_to_all(ids) + links.start_up(2 * calls),
        lookup=costs.moved(max(load.forward for load in loads), memory, hardware.memory_efficiency),
        host_rows=costs.moved(max(load.host_link for load in loads), hardware.host_gbs * 1e9, hardware.link_efficiency),
        vectors_forward=exchange,
        dense_forward=forward,
        dense_backward=2 * forward,
        vectors_backward=exchange,
        table_update=costs.moved(max(load.backward for load in loads), memory, hardware.memory_efficiency),
        dense_all_reduce=links.all_reduce(parameters * FLOAT) + links.start_up(1 + parameters * FLOAT // BUCKET),
        dense_optimizer=costs.moved(optimizer_bytes(parameters), memory, hardware.memory_efficiency),
    )


def optimizer_bytes(parameters: int) -> int:
    """Bytes that Adam moves: weight, gradient and two states read, weight and two states written."""
    return 7 * FLOAT * parameters


def _sent_ids(sharded: list[TablePlan], batch: int, world: int) -> float:
    """Ids and lengths that a rank sends: lengths to every piece, ids to each piece that needs them."""
    total = 0.0
    for placed in sharded:
        copies = len(placed.pieces) if placed.kind == "column_wise" else 1
        total += copies * batch * placed.table.ids * ID
        total += len(placed.pieces) * batch * len(placed.table.lengths) * LENGTH
    return total * (world - 1) / world


def _calls(sharded: list[TablePlan]) -> int:
    """Collectives of an exchange: one for each collection and kind of sharding."""
    return len({(placed.table.path, placed.kind) for placed in sharded})


class _Links:
    """The collectives on a cluster's links, each at the share of the bandwidth that is got."""

    def __init__(self, cluster: Cluster) -> None:
        hardware: Hardware = cluster.hardware
        self._world, self._per_node, self._hop = cluster.world, cluster.per_node, hardware.hop_us * 1e-6
        self._nvlink = hardware.nvlink_gbs * 1e9 * hardware.link_efficiency
        self._network = hardware.network_gbs * 1e9 * hardware.link_efficiency

    def all_to_all(self, size: float) -> float:
        return costs.all_to_all(size, self._world, self._per_node, self._nvlink, self._network)

    def ring(self, size: float) -> float:
        return costs.ring(size, self._world, self._per_node, self._nvlink, self._network)

    def all_reduce(self, size: float) -> float:
        return costs.all_reduce(size, self._world, self._per_node, self._nvlink, self._network)

    def start_up(self, collectives: int) -> float:
        return costs.start_up(collectives, self._world, self._hop)
