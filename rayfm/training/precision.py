"""Whether a processor has the matrix products that ``precision`` asks for; where it has not, a warning, once a run."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

import torch

from rayfm.config.durable import write_whole
from rayfm.training.spec import TrainerSpec

log = logging.getLogger(__name__)

CPUINFO = Path("/proc/cpuinfo")
BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Linux's names for instructions that multiply bfloat16 and sum in float32: of x86, and (``bf16``) of ARM."""


def processor_flags(cpuinfo: str) -> frozenset[str]:
    """What the first processor of ``/proc/cpuinfo`` says it can do; empty where it says nothing.

    Example::

        >>> sorted(processor_flags("processor : 0\\nflags : fma avx2\\n"))
        ['avx2', 'fma']
    """
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):  # x86, ARM
            return frozenset(value.split())
    return frozenset()


def has_bf16_products(flags: Collection[str]) -> bool:
    """Whether a processor with these flags multiplies bfloat16 without converting it to float32 first."""
    return not BF16_FLAGS.isdisjoint(flags)


def precision_warning(spec: TrainerSpec, device: torch.device, flags: Collection[str]) -> str | None:
    """What to say of a trainer whose processor lacks what its precision is for; None where there is nothing to say.

    Args:
        spec: the trainer.
        device: what the worker computes on.
        flags: of the worker's processor; empty where they are not known.
    """
    if spec.training.precision != "bf16" or device.type != "cpu" or not flags or has_bf16_products(flags):
        return None
    key = f"teachers.{spec.name}.training" if spec.role == "teacher" else f"groups.{spec.name}"
    return (
        f"{key}.precision is bf16, and the processor that trains has no bf16 products (none of "
        f"{', '.join(sorted(BF16_FLAGS))} among its flags): they are emulated, as a rule slower than float32; take "
        "precision: fp32, or workers that have them"
    )


def warn_of_precision(spec: TrainerSpec, device: torch.device, cpuinfo: Path | None = None) -> None:
    """Say it in the worker's log and for the run, once: workers that are started again find it said.

    Called by rank 0; the run shows what stands in the trainer's ``warnings``.

    Args:
        spec: the trainer.
        device: what the worker computes on.
        cpuinfo: where the processor's flags are read, by default ``/proc/cpuinfo``.
    """
    source = cpuinfo or CPUINFO
    message = precision_warning(spec, device, processor_flags(source.read_text()) if source.exists() else ())
    if message is None:
        return
    path = spec.folder / "warnings" / "precision.txt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: file.write(message.encode()))
        log.warning(message)
