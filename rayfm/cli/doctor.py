"""``rayfm doctor``: what this machine has, and whether a config fits it."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys

import psutil
from rich.table import Table

from rayfm.cli.display import console
from rayfm.config import RayfmError
from rayfm.pipeline.config import PipelineConfig

PINNED = {"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm": "1.8.0", "ray": "2.60.0"}
"""What was tested together."""


def _version(package: str) -> str | None:
    names = ("fbgemm-gpu", "fbgemm-gpu-cpu") if package == "fbgemm" else (package,)
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def diagnose(config: PipelineConfig | None) -> bool:
    """Print the findings; False where something would not work."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    sound = True

    def say(ok: bool, what: str, found: str) -> None:
        nonlocal sound
        sound &= ok
        table.add_row("[green]ok[/green]" if ok else "[red]bad[/red]", what, found)

    say(sys.version_info >= (3, 11), "python", sys.version.split()[0])
    for package, wanted in PINNED.items():
        found = _version(package)
        if found is not None and found.split("+")[0] == wanted:
            say(True, package, found)
        else:
            say(False, package, f"{found or 'not installed'}; tested with {wanted}: make install")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    say(cores >= 2, "cores", str(cores) if cores >= 2 else f"{cores}; the default plans need 2")
    memory = psutil.virtual_memory()
    enough = memory.available > 4e9
    free = f"{memory.available / 1e9:.1f} GB free of {memory.total / 1e9:.1f}"
    say(enough, "memory", free if enough else f"{free}; Ray and two trainers want 4 GB")
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        say(True, "devices", names)
    else:
        say(True, "devices", "cpu (no CUDA device)")
    shared = shutil.disk_usage("/dev/shm") if os.path.isdir("/dev/shm") else None
    if shared is not None:
        say(shared.free > 3e8, "/dev/shm", f"{shared.free / 1e9:.1f} GB free for Ray's object store")
    if config is not None:
        sound &= _check_config(config, table, cores)
    console.print(table)
    return sound


def _check_config(config: PipelineConfig, table: Table, cores: int) -> bool:
    from rayfm.data.sources.base import SOURCES
    from rayfm.pipeline.capacity import check_capacity, needs
    from rayfm.pipeline.hints import hints
    from rayfm.pipeline.plan import choose_periods

    sound = True
    try:
        import torch

        check_capacity(config, config.ray.cpus or cores, torch.cuda.device_count())
        total = sum(need.cpus for need in needs(config))
        table.add_row("[green]ok[/green]", "plan", f"{total:g} CPUs of {config.ray.cpus or cores:g}")
    except RayfmError as error:
        table.add_row("[red]bad[/red]", "plan", str(error))
        sound = False
    try:
        source = SOURCES.build(config.data.source, config.schema_)
        periods = choose_periods(config, [period.name for period in source.periods()])
        tested = len(periods) - config.schedule.warmup
        table.add_row("[green]ok[/green]", "source", f"{len(periods)} periods, {tested} of them tested")
    except RayfmError as error:
        table.add_row("[red]bad[/red]", "source", str(error))
        sound = False
    for hint in hints(config):
        table.add_row("[yellow]hint[/yellow]", "config", hint)
    return sound
