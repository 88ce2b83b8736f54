"""What a calibrator is fitted on, in bounded memory: sums of logits by fine bins, mergeable over batches and ranks.

Shape letters: B rows, T tasks, H bins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rayfm.export.calibrator import fit_platt

LOGIT_RANGE = 20.0
"""Bins are uniform over logits in [-20, 20]; a logit outside counts in the first or the last bin."""

BINS = 8192

Fits = dict[str, tuple[float, float]]
"""Task -> (slope, shift)."""


class CalibrationSums:
    """Sums of one model's logits by bin and label, from which ``fit`` takes Platt's slope and shift.

    The positives of a bin, and its negatives, are stood for by two pseudo-rows at their mean logit plus and minus their
    standard deviation, of half their weight each. Weight, mean and variance are then exact, so that the cross-entropy
    is off by third and higher powers of ``slope / 200`` alone (a bin is 1/205 wide): the fit is that of the rows
    themselves, at a memory that does not grow with them.

    Args:
        tasks: names of the binary tasks.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        self.tasks = tuple(tasks)
        # [T, label 0 or 1, weight x (1, logit, logit^2), H]
        self._sums = torch.zeros(len(self.tasks), 2, 3, BINS, dtype=torch.float64)

    def update(self, task: str, logit: Tensor, label: Tensor, mask: Tensor, weight: Tensor) -> None:
        """Add a batch's rows.

        Args:
            task: name of the task.
            logit: ``[B]``.
            label: ``[B]``: 0, 1 or a probability, which counts as a share of both.
            mask: bool ``[B]``: the label is known. Other rows are not looked at.
            weight: ``[B]``, sampling weight.
        """
        z, y, w = (values[mask].detach().double() for values in (logit, label, weight))
        place = ((z.nan_to_num(0.0) + LOGIT_RANGE) * (BINS / (2 * LOGIT_RANGE))).long().clamp_(0, BINS - 1)
        cell = self._sums[self.tasks.index(task)]
        for value, share in ((0, w * (1 - y)), (1, w * y)):
            for power, term in enumerate((share, share * z, share * z * z)):
                cell[value, power] += torch.bincount(place, term, minlength=BINS)

    def reduce_(self) -> None:
        """Sum over all ranks, in place (a collective call); nothing to do without ``torch.distributed``."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        moved = self._sums.cuda() if torch.distributed.get_backend() == "nccl" else self._sums
        torch.distributed.all_reduce(moved)
        self._sums = moved.cpu()

    def rows(self, task: str) -> tuple[Tensor, Tensor, Tensor]:
        """The pseudo-rows of a task: logit, label and weight, each ``[N]`` with ``N <= 4 H``."""
        weight_2h, logit_2h, square_2h = self._sums[self.tasks.index(task)].unbind(1)
        held = weight_2h > 0
        label_2h = torch.tensor([[0.0], [1.0]], dtype=torch.float64).expand_as(weight_2h)
        weight = weight_2h[held]
        mean = logit_2h[held] / weight
        deviation = (square_2h[held] / weight - mean.square()).clamp_min(0).sqrt()
        return torch.cat([mean - deviation, mean + deviation]), label_2h[held].repeat(2), weight.repeat(2) / 2

    def fit(self, before: Mapping[str, tuple[float, float]]) -> Fits:
        """Slope and shift of every task; a task without both labels keeps what ``before`` has, if anything.

        Raises:
            DataError: a logit is not finite.
        """
        fits = dict(before)
        for task in self.tasks:
            logit, label, weight = self.rows(task)
            if 0 < float(label.sum()) < len(label):
                fits[task] = fit_platt(logit, label, weight, origin=f"calibration of task {task!r}")
        return fits
