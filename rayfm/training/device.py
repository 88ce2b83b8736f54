"""What a worker computes on: which device, and how its matrix products round."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rayfm.config import ConfigError
from rayfm.training.config import TrainingConfig


def worker_device(rank: int, training: TrainingConfig) -> torch.device:
    """The device of a worker. With ``auto`` it is CUDA where the config gives workers GPUs and there is one.

    Raises:
        ConfigError: the config needs CUDA, and the worker sees no device.
    """
    there = torch.cuda.is_available()
    if training.device == "cuda" and not there:
        raise ConfigError(
            "device is cuda, and this worker sees no CUDA device; take 'device: auto' or install DEVICE=gpu"
        )
    if training.device == "cpu" or not there or (training.device == "auto" and not training.gpus_per_worker):
        if training.on_host:
            raise ConfigError(
                f"table_memory of {', '.join(training.on_host)} is beside a GPU's, and this worker has none; leave "
                "'table_memory' out on CPUs, whose memory has all tables"
            )
        return torch.device("cpu")
    return visible_device(rank)


def visible_device(rank: int) -> torch.device:
    """The device of a local rank, of those that its process sees: CUDA where there is one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", rank % torch.cuda.device_count())


def set_up(device: torch.device, training: TrainingConfig) -> None:
    """Make ``device`` this process's, and let its float32 matrix products round as ``precision`` says."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL and streams that are given no device take the current one
    _allow_tf32(training.precision == "tf32")


@contextmanager
def full_float32() -> Iterator[None]:
    """Inside, float32 matrix products are float32 on a GPU too: where a model is compared with its export."""
    before = torch.backends.cuda.matmul.allow_tf32
    _allow_tf32(False)
    try:
        yield
    finally:
        _allow_tf32(before)


def _allow_tf32(allow: bool) -> None:
    # For CUDA alone: `set_float32_matmul_precision` would change what a CPU does, too.
    torch.backends.cuda.matmul.allow_tf32 = allow
    torch.backends.cudnn.allow_tf32 = allow
