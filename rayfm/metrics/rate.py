"""The base rate of what a model was trained on so far, which ExFM's NE divides by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class RateCounter:
    """Counts labels and weights of the training rows of each task.

    Args:
        tasks: names of the tasks.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        self.tasks = tuple(tasks)
        self._sums = torch.zeros(len(self.tasks), 2, dtype=torch.float64)

    def update(self, task: str, label: Tensor, mask: Tensor, weight: Tensor) -> None:
        """Add a batch's rows where ``mask``: label, mask and weight are ``[B]``."""
        w = torch.where(mask, weight, 0).double()
        self._sums[self.tasks.index(task)] += torch.stack([(w * torch.where(mask, label, 0)).sum(), w.sum()]).cpu()

    def rates(self, process_group: torch.distributed.ProcessGroup | None = None) -> dict[str, float]:
        """Mean label of each task over all ranks (a collective call); NaN before the first row.

        The counter keeps its own rank's sums, so that it can go on counting.
        """
        sums = self._sums.clone()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            nccl = torch.distributed.get_backend(process_group) == "nccl"
            moved = sums.cuda() if nccl else sums
            torch.distributed.all_reduce(moved, group=process_group)
            sums = moved.cpu()
        return {task: float(sums[i, 0] / sums[i, 1]) for i, task in enumerate(self.tasks)}

    def merge(self, other: RateCounter) -> None:
        """Add the counts of ``other``, which has the same tasks."""
        if self.tasks != other.tasks:
            raise ValueError(f"cannot merge counts of {other.tasks} into {self.tasks}")
        self._sums += other._sums

    def state_dict(self) -> dict[str, Tensor]:
        return {"sums": self._sums}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._sums.copy_(state["sums"])
