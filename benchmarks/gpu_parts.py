"""What `benchmarks.gpu` measures with torch alone: matrix products by precision, copies, copies beside compute.

The layers are those of rayfm's DCNv2 (Wang et al. 2021, arXiv 2008.13535, Eq. 1 and 2), written out here: rayfm's own
stand in modules that need TorchRec, which a machine may lack.

Shape letters: B examples, I inputs of the dense part, D dense columns.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

PRECISIONS = ("fp32", "tf32", "bf16")
WARM_UP = 3
"""Calls before the first that is timed: kernels are chosen, memory is taken."""


class Cross(nn.Module):
    """``x_{l+1} = x_0 * (W_l x_l + b_l) + x_l``: ``[B, I] -> [B, I]``."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x0_BI: Tensor) -> Tensor:
        x_BI = x0_BI
        for layer in self.layers:
            x_BI = x0_BI * layer(x_BI) + x_BI
        return x_BI


def mlp(width: int, hidden: tuple[int, ...]) -> nn.Sequential:
    """Linear layers with ReLUs."""
    widths = (width, *hidden)
    return nn.Sequential(*(part for i, o in itertools.pairwise(widths) for part in (nn.Linear(i, o), nn.ReLU())))


def synchronise(device: torch.device) -> None:
    """Wait for all that the device was told to do; a CPU has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median seconds of a call, up to the end of what it started on the device."""
    for _ in range(WARM_UP):
        work()
    found = []
    for _ in range(repeats):
        synchronise(device)
        started = time.perf_counter()
        work()
        synchronise(device)
        found.append(time.perf_counter() - started)
    return statistics.median(found)


@contextlib.contextmanager
def rounding(precision: str) -> Iterator[None]:
    """Inside, a GPU's float32 matrix products round to TF32 where ``precision`` is tf32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def dense_step(layers: nn.Module, x_BI: Tensor, precision: str) -> Callable[[], None]:
    """Forward and backward of ``layers``."""

    def step() -> None:
        for parameter in layers.parameters():
            parameter.grad = None
        with rounding(precision), torch.autocast(x_BI.device.type, torch.bfloat16, enabled=precision == "bf16"):
            layers(x_BI).float().square().mean().backward()

    return step


def dense(device: torch.device, rows: int, width: int, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds a step, rows a second and TFLOP/s of cross network and MLP at each precision.

    TFLOP/s count a multiplication and an addition for each weight and row, thrice: forward, and the backward's two.
    """
    x_BI = torch.randn(rows, width, device=device)
    found = {}
    for name, layers in (("cross", Cross(width, 2)), ("mlp", mlp(width, (1024, 512, 256)))):
        layers.to(device)
        weights = sum(parameter.numel() for parameter in layers.parameters() if parameter.ndim == 2)
        for precision in PRECISIONS:
            taken = seconds(dense_step(layers, x_BI, precision), device, repeats)
            found[f"{name} {precision}"] = {
                "ms": 1e3 * taken,
                "rows/s": rows / taken,
                "TFLOP/s": 6 * weights * rows / taken / 1e12,
            }
    return found


def copies(device: torch.device, megabytes: int, repeats: int) -> dict[str, dict[str, float]]:
    """GB/s of a copy to the device from pageable and from page-locked memory."""
    pageable = torch.empty(megabytes * 2**20 // 4).uniform_()
    sources = {"pageable": pageable, "pinned": pageable.pin_memory() if device.type == "cuda" else pageable}
    size = pageable.numel() * pageable.element_size()
    found = {}
    for name, source in sources.items():
        target = torch.empty_like(source, device=device)

        def copy(source: Tensor = source, target: Tensor = target) -> None:
            target.copy_(source, non_blocking=True)

        found[name] = {"GB/s": size / seconds(copy, device, repeats) / 1e9}
    return found


def overlapped(device: torch.device, rows: int, width: int, steps: int, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds a step of copy and compute: one after the other from pageable memory, and through rayfm's feed.

    Raises:
        ImportError: rayfm's feed cannot be imported.
    """
    from rayfm.data.batch import Batch
    from rayfm.training.feed import Feed

    layers = nn.Sequential(Cross(width, 2), mlp(width, (1024, 512, 256))).to(device)
    none_B = torch.zeros(rows, dtype=torch.int64)
    some_BT = torch.zeros(rows, 1)
    held = [
        Batch(
            dense=torch.randn(rows, width),
            sparse=None,
            weighted=None,
            sequence=None,
            labels=some_BT,
            label_mask=some_BT.bool(),
            supervision=some_BT,
            supervision_mask=some_BT.bool(),
            example_id=none_B,
            kind=none_B,
            traffic=none_B,
            weight=torch.ones(rows),
            group=none_B,
            user=none_B,
        )
        for _ in range(4)
    ]

    def batches() -> Iterator[Batch]:
        for step in range(steps):
            yield held[step % len(held)]

    def sequential() -> None:
        for batch in batches():
            dense_step(layers, batch.to(device).dense, "tf32")()
            synchronise(device)

    def fed() -> None:
        for _, batch in Feed(batches(), device, ahead=1):
            dense_step(layers, batch.dense, "tf32")()

    taken = {name: seconds(work, device, repeats) for name, work in (("sequential", sequential), ("feed", fed))}
    found = {name: {"ms": 1e3 * value / steps} for name, value in taken.items()}
    found["feed"]["times as fast"] = taken["sequential"] / taken["feed"]
    return found
