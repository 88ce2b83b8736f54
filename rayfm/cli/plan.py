"""``rayfm plan``: what training would take on a cluster that one does not have."""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.table import Table

if TYPE_CHECKING:
    from rayfm.pipeline.config import PipelineConfig
    from rayfm.planning.estimate import Estimate
    from rayfm.planning.work import Learner, TableWork
    from rayfm.training.config import TrainingConfig

SHOWN = 30
"""Tables that are listed, the largest first."""

PARTS = {
    "host_to_device": ("batch to the device", "PCIe"),
    "ids_all_to_all": ("ids, all-to-all", "links"),
    "lookup": ("embedding look-up", "memory"),
    "host_rows": ("rows of the host", "PCIe"),
    "vectors_forward": ("vectors, forward", "links"),
    "dense_forward": ("dense forward", "compute"),
    "dense_backward": ("dense backward", "compute"),
    "vectors_backward": ("gradients, backward", "links"),
    "table_update": ("table backward, update", "memory"),
    "dense_all_reduce": ("dense all-reduce", "links"),
    "dense_optimizer": ("dense optimiser", "memory"),
}
"""Part of a step -> its name, and what bounds it."""

MEMORY = {
    "tables": "tables",
    "table_optimizer": "their optimiser",
    "cache": "cache of rows",
    "embedding": "ids, vectors",
    "dense": "dense, gradients",
    "dense_optimizer": "dense optimiser",
    "activations": "activations",
    "batch": "two batches",
}

FOOTER = (
    "This model was never compared with GPUs: it is arithmetic over published peaks and assumed shares of them. Use it "
    "to compare plans and to see what binds, not as a promise. Its equations, sources and limits: docs/planning.md."
)


def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The pipeline's YAML file.", show_default=False)],
    nodes: Annotated[int, typer.Option("--nodes", help="Nodes of the cluster.")] = 1,
    gpus_per_node: Annotated[int, typer.Option("--gpus-per-node", help="GPUs of a node.")] = 8,
    gpu: Annotated[str, typer.Option("--gpu", help="a100, h100, h200, b200, or one of --hardware.")] = "h100",
    trainer: Annotated[
        str | None, typer.Option("--trainer", help="A teacher or a group of students; by default the first teacher.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Examples a GPU; by default the config's, over its workers.")
    ] = None,
    scale: Annotated[float, typer.Option("--scale", help="Multiplies the models' scale.")] = 1.0,
    precision: Annotated[
        str | None, typer.Option("--precision", help="fp32, tf32 or bf16; by default the config's.")
    ] = None,
    hardware: Annotated[
        Path | None, typer.Option("--hardware", metavar="FILE", help="YAML of devices: name -> figures.")
    ] = None,
    gpu_set: Annotated[
        list[str] | None, typer.Option("--gpu-set", metavar="KEY=VALUE", help="Change a figure, e.g. network_gbs=25.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the config.")
    ] = None,
) -> None:
    """Plan training on a cluster one does not have: memory, sharding, step time, bottleneck."""
    from rayfm.config import ConfigError, nearest
    from rayfm.planning.hardware import Precision, load_hardware
    from rayfm.planning.search import Cluster
    from rayfm.quiet import quiet_libraries

    cluster = Cluster(nodes, gpus_per_node, load_hardware(gpu, hardware, gpu_set))
    precisions = ["fp32", "tf32", "bf16"]
    if precision is not None and precision not in precisions:
        raise ConfigError(f"--precision {precision!r} is not known{nearest(precision, precisions)}")
    if not scale > 0:
        raise ConfigError(f"--scale is {scale:g}; it must be above 0")
    quiet_libraries()
    from rayfm.cli.display import console
    from rayfm.pipeline.config import load_config
    from rayfm.planning.estimate import estimate

    loaded = load_config(config, set_)
    name, learners, training = trained_models(loaded, trainer, scale)
    batch = max(1, training.batch_size // training.workers) if batch_size is None else batch_size
    chosen = cast(Precision, precision or training.precision)
    found = estimate(learners, loaded.schema_, training, cluster, batch, chosen)
    copies = sum(learner.copies for learner in learners)
    many = f", {copies} models" if copies > 1 else ""
    console.print(f"[bold]{name}[/bold]{many} on {nodes} x {gpus_per_node} {gpu} ({cluster.world} ranks)")
    print_estimate(found, gpu)


def trained_models(
    config: PipelineConfig, trainer: str | None, scale: float
) -> tuple[str, list[Learner], TrainingConfig]:
    """A trainer's name, its models at their scale, and how they are trained.

    Raises:
        ConfigError: there is no such trainer.
    """
    from rayfm.config import ConfigError, nearest
    from rayfm.pipeline.config import ScheduleConfig
    from rayfm.pipeline.plan import student_specs
    from rayfm.planning.work import Learner

    if trainer is None:
        trainer = next(iter(config.teachers), None) or next(iter(config.students.values())).group
    if trainer in config.teachers:
        teacher = config.teachers[trainer]
        found = [Learner(trainer, teacher.model, config.tasks_of(teacher))]
        training = teacher.training
    else:
        specs = {
            spec.name: spec
            for spec in student_specs(config.model_copy(update={"schedule": ScheduleConfig(warmup=1)}), ())
        }
        if trainer not in specs:
            known = [*config.teachers, *specs]
            raise ConfigError(f"--trainer {trainer!r} is not in the config{nearest(trainer, known)}")
        members = specs[trainer].learners
        copies = collections.Counter(member.model_name for member in members)
        first = {member.model_name: member for member in reversed(members)}
        found = [Learner(name, first[name].model, first[name].tasks, copies[name]) for name in dict.fromkeys(copies)]
        training = specs[trainer].training
    scaled = [
        dataclasses.replace(learner, model=learner.model.model_copy(update={"scale": learner.model.scale * scale}))
        for learner in found
    ]
    return trainer, scaled, training


def print_estimate(found: Estimate, gpu: str) -> None:
    """Print all that was found, at most 80 columns wide."""
    from rayfm.cli.display import console
    from rayfm.cli.sizes import short

    work, cluster = found.work, found.cluster
    console.print(
        f"{short(work.table_parameters)} parameters in {len(work.tables)} tables, {short(work.dense_parameters)} "
        f"dense; {short(round(work.matmul_flops + work.other_flops))} FLOPs an example forward, beside the look-ups"
    )
    console.print(
        f"batch {found.batch:,} a GPU, {found.batch * cluster.world:,} in all; dense part {found.precision}, tables "
        "fp32; lists at full length\n"
    )
    console.print(memory_table(found))
    console.print(f"\nplan by TorchRec's planner; search: {found.plan.search}", highlight=False)
    console.print(plan_table(found))
    console.print()
    console.print(step_table(found))
    console.print()
    for line in conclusions(found):
        console.print(line, highlight=False)
    console.print()
    console.print(hardware_lines(found, gpu), highlight=False)
    console.print(f"\n[dim]{FOOTER}", highlight=False)


def memory_table(found: Estimate) -> Table:
    """GB of the fullest and the emptiest rank."""
    table = _table("memory of a rank, GB", "fullest", "emptiest")
    for key, name in MEMORY.items():
        if key == "cache" and not found.host:
            continue
        table.add_row(name, *(gigabytes(getattr(rank, key)) for rank in (found.fullest, found.emptiest)))
    table.add_row("in all", *(f"[bold]{gigabytes(rank.total)}" for rank in (found.fullest, found.emptiest)))
    hardware = found.cluster.hardware
    table.add_row(f"of {hardware.memory_gb:g}, {hardware.reserved:.0%} reserved", gigabytes(found.cluster.usable_bytes))
    if found.host:
        table.add_row("tables, a node's host", gigabytes(found.host))
        table.add_row(f"of {hardware.host_memory_gb:g}", gigabytes(found.cluster.usable_host_bytes))
    return table


def plan_table(found: Estimate) -> Table:
    """Where the largest tables live."""
    from rayfm.cli.sizes import short
    from rayfm.planning.memory import table_bytes

    table = _table("table", "rows", "dim", "GB", "kind", "ranks")
    table.columns[0].overflow = "fold"
    for placed in found.plan.tables[:SHOWN]:
        one = placed.table
        table.add_row(
            one.name,
            short(one.rows),
            str(one.columns),
            gigabytes(table_bytes(one.rows, one.columns)),
            placed.kind + where(one),
            ranks([piece.rank for piece in placed.pieces], found.cluster.world),
        )
    rest = found.plan.tables[SHOWN:]
    if rest:
        size = sum(table_bytes(placed.table.rows, placed.table.columns) for placed in rest)
        table.add_row(f"and {len(rest)} smaller ones", "", "", gigabytes(size), "", "")
    return table


def where(table: TableWork) -> str:
    """Of a table that is not in the devices' memory, where it is."""
    if table.memory.kind == "device":
        return ""
    return ", uvm" if table.memory.kind == "uvm" else f", {table.memory.cache_load_factor:.0%} cached"


def ranks(owners: list[int], world: int) -> str:
    """Ranks as short as they can be said."""
    if not owners or len(set(owners)) == world:
        return "all" if world > 1 else "0"
    shown = sorted(set(owners))
    return ",".join(map(str, shown)) if len(shown) <= 4 else f"{len(shown)} of {world}"


def step_table(found: Estimate) -> Table:
    """Milliseconds by part."""
    table = _table("one step", "ms", "share", "bound by")
    table.columns[3].justify = "left"
    for key, (name, bound) in PARTS.items():
        seconds = getattr(found.step, key)
        if key == "host_rows" and not found.host:
            continue
        mark = "[bold]" if key == found.step.bottleneck else ""
        table.add_row(f"{mark}{name}", f"{mark}{1e3 * seconds:.3f}", f"{mark}{seconds / found.step.total:.0%}", bound)
    table.add_row("one after the other", f"{1e3 * found.step.total:.3f}", "", "")
    table.add_row("all overlapped, at best", f"{1e3 * found.step.overlapped:.3f}", "", "")
    return table


def conclusions(found: Estimate) -> list[str]:
    """Examples a second, the bottleneck, and what readers must deliver."""
    from rayfm.planning.estimate import ADVICE

    slow, fast = found.examples_per_second
    key = found.step.bottleneck
    share = getattr(found.step, key) / found.step.total
    per_node = fast / found.cluster.nodes
    return [
        f"[bold]{slow:,.0f} to {fast:,.0f} examples/s[/bold] (nothing overlapped, to all of it)",
        f"[bold]Bottleneck: {PARTS[key][0]}[/bold], {share:.0%} of the step. It shrinks with {ADVICE[key]}.",
        f"Readers must deliver up to {per_node:,.0f} examples/s a node ({per_node * found.work.batch_bytes / 1e9:.2f} "
        "GB/s as tensors); reading is not in the step.",
    ]


def hardware_lines(found: Estimate, gpu: str) -> str:
    """The model of the hardware."""
    from rayfm.planning.costs import cache_hits

    h = found.cluster.hardware
    caches = {p.table.memory.cache_load_factor for p in found.plan.tables if p.table.memory.kind == "uvm_caching"}
    hits = ", ".join(f"{cache_hits(share, h.id_skew):.0%} at {share:.0%} of the rows" for share in sorted(caches))
    of_host = f"rows of the host over PCIe; host memory {h.host_memory_gb:,.4g} GB a node; " if found.host else ""
    of_host += f"cache hits {hits} (ids after Zipf's law, exponent {h.id_skew:g}: an assumption); " if caches else ""
    return (
        f"{gpu}: {h.peak_flops(found.precision) / 1e12:,.4g} TFLOP/s {found.precision} at "
        f"{h.compute_efficiency:.0%}; memory {h.memory_gbs:,.4g} GB/s at {h.memory_efficiency:.0%}; NVLink "
        f"{h.nvlink_gbs:,.4g}, network {h.network_gbs:,.4g}, PCIe {h.host_gbs:,.4g} GB/s a GPU and direction at "
        f"{h.link_efficiency:.0%}; {of_host}{h.operator_us:.3g} us an operator; {h.hop_us:g} us x log2(ranks) a "
        f"collective. Peaks: {h.source}. Shares and microseconds: assumptions (--gpu-set)."
    )


def gigabytes(size: float) -> str:
    """Bytes as GB, with what digits it takes."""
    value = size / 1e9
    return f"{value:,.1f}" if value >= 10 else f"{value:.3g}"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for position, column in enumerate(columns):
        table.add_column(column, justify="right" if position else "left", no_wrap=position > 0, overflow="fold")
    return table
