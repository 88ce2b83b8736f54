"""Whether a processor is faster with the products that ``precision`` asks for; if not, a warning, once a run."""

from __future__ import annotations

import logging
import time

import torch

from rayfm.config.durable import write_whole
from rayfm.training.spec import TrainerSpec

log = logging.getLogger(__name__)

ROWS, WIDTH, TRIES = 512, 256, 7
"""Of the product that is timed: a layer's, and some milliseconds in all."""
WORTH = 0.95
"""A speed-up below it is warned of: two timings of the same differ by a few per cent."""


def bf16_speedup() -> float:
    """How many times as fast this process multiplies matrices in bfloat16 as in float32, the best of several tries.

    It is measured because a processor's flags do not tell: one with ``avx512_bf16`` that showed no AMX took twice
    float32's time, where another processor took less than half of it.
    """
    best = []
    for dtype in (torch.float32, torch.bfloat16):
        rows = torch.ones(ROWS, WIDTH, dtype=dtype)
        weights = torch.ones(WIDTH, WIDTH, dtype=dtype)
        seconds = []
        for _ in range(TRIES):
            begin = time.perf_counter()
            torch.mm(rows, weights)
            seconds.append(time.perf_counter() - begin)
        best.append(min(seconds))
    return best[0] / best[1]


def warn_of_precision(spec: TrainerSpec, device: torch.device) -> None:
    """Say that ``precision: bf16`` costs time on this processor, in the worker's log and for the run, once: workers
    that are started again find it said.

    Called by rank 0; the run shows what stands in the trainer's ``warnings``.

    Args:
        spec: the trainer.
        device: what the worker computes on; a GPU is not asked.
    """
    path = spec.folder / "warnings" / "precision.txt"
    if spec.training.precision != "bf16" or device.type != "cpu" or path.exists():
        return
    speedup = bf16_speedup()
    if speedup >= WORTH:
        return
    key = f"teachers.{spec.name}.training" if spec.role == "teacher" else f"groups.{spec.name}"
    message = (
        f"{key}.precision is bf16, and the processor that trains multiplies bfloat16 at {speedup:.2g} times the speed "
        "of float32; take precision: fp32, or workers whose processors have the products (AMX on x86)"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: file.write(message.encode()))
    log.warning(message)
