"""Sums over the ranks of a worker group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(values: Tensor, device: torch.device) -> Tensor:
    """``values`` summed over all ranks, in float64 on the CPU (a collective call where there are several ranks).

    Args:
        values: of any shape, on the CPU. float64, since counts of rows pass 2^24, where float32 begins to skip numbers.
        device: this rank's; NCCL reduces nothing that is not on it.
    """
    moved = values.to(device, torch.float64, copy=True)
    if dist.get_world_size() > 1:
        dist.all_reduce(moved)
    return moved.cpu()
