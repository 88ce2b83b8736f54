"""How a model is trained: optimisers, sharding, precision, workers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rayfm.config import Config
from rayfm.config.nodes import NodeLabels
from rayfm.data.reader import ReaderKind

TableOptimizerName = Literal["rowwise_adagrad", "adagrad", "sgd", "adam"]
ShardingKind = Literal["auto", "table_wise", "row_wise", "column_wise", "data_parallel"]


class ClippyConfig(Config):
    """Clippy (Tang et al. 2023, Algorithm 1): a step that would move any element of a parameter tensor further than
    ``relative * |value| + absolute`` is shortened as a whole until it does not."""

    relative: float = Field(0.5, ge=0)
    """lambda_rel."""
    absolute: float = Field(0.01, gt=0)
    """lambda_abs; above 0, or what starts at 0 would stay there."""


class TableOptimizer(Config):
    """Optimiser of an embedding table. All but ``adam`` are fused into the backward pass (fbgemm)."""

    type: TableOptimizerName = "rowwise_adagrad"
    """``adam`` is dense: it keeps two states an element and updates every row, so it is for small tables, which are
    then replicated (data parallel) on every worker."""

    lr: float = Field(0.02, gt=0)
    eps: float = Field(1e-8, gt=0)
    clippy: ClippyConfig | None = None
    """Limit what a step changes; for ``adam`` alone, since a fused kernel never shows its update."""

    @model_validator(mode="after")
    def _clippable(self) -> TableOptimizer:
        if self.clippy is not None and self.type != "adam":
            raise ValueError(
                f"clippy does not go with {self.type}, whose fused kernel (fbgemm) updates rows inside the backward "
                "pass; give a small table 'type: adam', or leave clippy to 'dense'"
            )
        return self


class DenseOptimizer(Config):
    """Optimiser of everything that is not an embedding table."""

    type: Literal["adam", "adagrad"] = "adam"
    lr: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    """Of Adam."""
    initial_accumulator: float = Field(0.0, ge=0)
    """Adagrad's sum of squares before the first step. At 0 the first step moves every element by ``lr``."""
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    clippy: ClippyConfig | None = None
    """Limit what a step changes: ``clippy: {}`` takes the paper's values, by default there is no limit."""

    @model_validator(mode="after")
    def _own_keys(self) -> DenseOptimizer:
        for key, owner in (("betas", "adam"), ("initial_accumulator", "adagrad")):
            if self.type != owner and getattr(self, key) != DenseOptimizer.model_fields[key].default:
                raise ValueError(f"{key} is of {owner}, and the type is {self.type}; leave it out")
        return self


class TableMemory(Config):
    """Where the rows of a table, and what its optimiser keeps of them, are on a GPU. The numbers stay the same."""

    kind: Literal["device", "uvm", "uvm_caching"] = "device"
    """``device``: the GPU's memory. ``uvm``: the host's memory, read through the bus. ``uvm_caching``: the host's, and
    a cache of rows on the GPU, for tables larger than a GPU."""
    cache_load_factor: float = Field(0.2, gt=0, le=1)
    """Share of the rows that the cache of ``uvm_caching`` holds (0.2 is TorchRec's own default)."""

    @model_validator(mode="after")
    def _own_keys(self) -> TableMemory:
        default = TableMemory.model_fields["cache_load_factor"].default
        if self.kind != "uvm_caching" and self.cache_load_factor != default:
            raise ValueError(f"cache_load_factor is of kind uvm_caching, and the kind is {self.kind}; leave it out")
        return self


class DivergenceConfig(Config):
    """When a loss counts as exploded. (One that is not finite always stops a run.)"""

    factor: float = Field(20.0, gt=1)
    """A term whose mean over the newest rows (a step, or as many steps as make 1,000 rows) is above ``factor`` times
    its mean over the ``window`` steps before has exploded."""
    window: int = Field(100, ge=1)
    """Steps to compare with; before there are as many, nothing counts as exploded."""


class TrainingConfig(Config):
    """Training of a teacher, or of the group of students that share a reader."""

    workers: int = Field(1, ge=1)
    """Workers of the group; with ``max_workers`` the fewest that it trains with."""
    max_workers: int | None = Field(None, ge=1)
    """Makes the group elastic: it grows up to this many workers where the cluster has room, and shrinks with it."""
    resize_seconds: float = Field(60.0, gt=0)
    """How often an elastic group looks whether to grow or shrink. Each change restarts it from its checkpoint."""
    cpus_per_worker: float = Field(0.5, gt=0)
    gpus_per_worker: float = Field(0.0, ge=0)
    nodes: NodeLabels = {}
    """Labels of the nodes that workers run on; none named: those of ``ray.nodes.training``."""
    threads: int = Field(1, ge=1)
    """Intra-op threads of a worker."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto``: CUDA where the worker has a GPU."""

    batch_size: int = Field(512, ge=1)
    """Global batch size in impressions; a multiple of the number of lanes."""
    predict_batch_size: int = Field(4096, ge=1)
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """``bf16``: the backbone runs under autocast; tables, losses and optimisers stay fp32. ``tf32``: matrix products of
    a GPU round their float32 inputs to 10 bits of mantissa; for GPUs alone."""
    pipeline: Literal["auto", "none", "sparse_dist"] = "auto"
    """``sparse_dist``: TorchRec's training pipeline, in which the next step's ids travel between workers while this one
    computes; the numbers stay the same. ``none``: one step after the other. ``auto``: the pipeline on CUDA alone."""
    reader: ReaderKind = "arrow"
    """``ray_data``: tasks of the cluster read ahead; a teacher's default. ``arrow``: the worker reads by itself."""
    read_tasks: int = Field(2, ge=1)
    """Tasks that read at once for a worker with ``ray_data``, each in a process of its own."""

    tables: TableOptimizer = TableOptimizer()
    table_overrides: dict[str, TableOptimizer] = {}
    """Table -> its own optimiser."""
    sharding: ShardingKind = "auto"
    """``auto``: row-wise above ``row_wise_from`` rows, else table-wise. ``column_wise`` cuts a table of D columns into
    ``column_parts`` (as many as make parts of a multiple of 4 columns), on however many workers."""
    sharding_overrides: dict[str, ShardingKind] = {}
    column_parts: int = Field(4, ge=1)
    """Parts of a column-wise table. Not one a worker: row-wise Adagrad keeps a sum for each part of a row, so that
    another number of parts trains to other values, and its state goes nowhere else."""
    row_wise_from: int = Field(1_000_000, ge=1)
    table_memory: TableMemory = TableMemory()
    """Of all tables but those under adam, which every GPU holds whole."""
    table_memory_overrides: dict[str, TableMemory] = {}
    """Table -> its own memory."""
    dense: DenseOptimizer = DenseOptimizer()
    warmup_steps: int = Field(0, ge=0)
    """Steps over which every learning rate rises linearly from 0 to its value (Goyal et al. 2017)."""

    checkpoint_seconds: float | None = Field(300.0, gt=0)
    """Seconds between checkpoints inside a period, more where the loop would stand still for over 2 % of them; a
    checkpoint is always made at a period's end. None: only there."""
    checkpoint_every: int | None = Field(None, ge=1)
    """Steps between checkpoints inside a period, instead of ``checkpoint_seconds``."""
    async_checkpoints: bool = True
    """Write checkpoints inside a period while training goes on, from a copy of this worker's tables and optimiser
    state, which stays in memory."""
    keep_checkpoints: int = Field(2, ge=1)
    ledger: bool = False
    """Note which examples each step trained, in the trainer's folder: 8 bytes an example."""
    divergence: DivergenceConfig | None = DivergenceConfig()
    """When a run stops since a loss has exploded. None: only where a loss is not finite."""
    max_failures: int = Field(3, ge=0)
    """How often Ray Train restarts the workers of this group before the run fails."""

    @model_validator(mode="after")
    def _fits(self) -> TrainingConfig:
        for table, kind in self.sharding_overrides.items():
            optimizer = self.optimizer_of(table).type
            if (kind == "data_parallel") != (optimizer == "adam"):
                raise ValueError(
                    f"table {table!r}: sharding {kind} does not go with optimiser {optimizer}; a data-parallel table "
                    "needs adam, and adam needs a data-parallel table"
                )
        if self.sharding == "data_parallel" and self.tables.type != "adam":
            raise ValueError("sharding data_parallel needs 'tables: {type: adam}'; the fused optimisers are for shards")
        for table, override in self.table_overrides.items():
            kind = self.sharding_overrides.get(table, self.sharding)
            if kind == "data_parallel" and override.type != "adam":
                raise ValueError(
                    f"table {table!r}: optimiser {override.type} is for shards, and sharding is data_parallel; give "
                    "it adam, or a sharding override"
                )
        if self.max_workers is not None and self.max_workers < self.workers:
            raise ValueError(
                f"max_workers {self.max_workers} is below workers {self.workers}; raise it, or leave it out"
            )
        if self.device == "cuda" and self.gpus_per_worker == 0:
            raise ValueError("device cuda needs gpus_per_worker above 0")
        if self.precision == "tf32" and not self._has_gpu:
            raise ValueError("precision tf32 is of GPUs; give workers one (gpus_per_worker), or take fp32 or bf16")
        if self.on_host and not self._has_gpu:
            raise ValueError(
                f"table_memory of {', '.join(self.on_host)} is beside a GPU's, and workers have none; leave it out, or "
                "give workers a GPU (gpus_per_worker)"
            )
        for table, memory in self.table_memory_overrides.items():
            if memory.kind != "device" and self.optimizer_of(table).type == "adam":
                raise ValueError(
                    f"table {table!r}: {memory.kind} is of the fused optimisers, and its own is adam, which keeps a "
                    "copy on every GPU; take another optimiser, or leave its table_memory out"
                )
        return self

    @property
    def _has_gpu(self) -> bool:
        return self.gpus_per_worker > 0 and self.device != "cpu"

    @property
    def on_host(self) -> list[str]:
        """What is not in a GPU's memory, for messages: tables by name, or all."""
        named = [name for name, memory in self.table_memory_overrides.items() if memory.kind != "device"]
        return named if self.table_memory.kind == "device" else ["all tables"]

    def memory_of(self, table: str) -> TableMemory:
        """Where a table's rows are on a GPU."""
        return self.table_memory_overrides.get(table, self.table_memory)

    def optimizer_of(self, table: str) -> TableOptimizer:
        """The optimiser of a table."""
        return self.table_overrides.get(table, self.tables)

    def column_parts_of(self, columns: int) -> int:
        """Parts that a column-wise table of this many columns is cut into; fbgemm takes columns by fours."""
        most = min(self.column_parts, columns)
        return next((n for n in range(most, 0, -1) if columns % n == 0 and columns // n % 4 == 0), 1)

    def sharding_of(self, table: str, rows: int) -> ShardingKind:
        """The kind of sharding of a table with this many rows, ``auto`` resolved."""
        if self.optimizer_of(table).type == "adam":
            return "data_parallel"
        kind = self.sharding_overrides.get(table, self.sharding)
        if kind == "auto":
            return "row_wise" if rows >= self.row_wise_from else "table_wise"
        return kind
