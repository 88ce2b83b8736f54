"""What a calibrator on aggregated counts is fitted on, in bounded memory: logits by cell and bin, and counts by cell.

Shape letters: B rows, T tasks, C cells, H bins.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rayfm.export.aggregated import fit_platt_aggregated
from rayfm.export.calibration import LOGIT_RANGE, Fits

MAX_BINS, MAX_SUMS = 1024, 4_000_000
"""At most so many bins of a cell, and so many sums of a task (8 bytes each, three of them a bin). The most cells that a
config may have, 65,536, leave 20 bins of each: a fit then differs from that of the rows by less than 0.001."""

_LOG = logging.getLogger(__name__)


class AggregatedSums:
    """Sums of one model's logits over every row that may have led to a count, by cell and bin, and the counts.

    A bin is stood for by two rows at its mean logit plus and minus its standard deviation, as in ``CalibrationSums``.

    Args:
        tasks: names of the binary tasks.
        cells: C.
    """

    def __init__(self, tasks: Sequence[str], cells: int) -> None:
        self.tasks, self.cells = tuple(tasks), cells
        self.bins = min(MAX_BINS, MAX_SUMS // (3 * cells))
        # [T, weight x (1, logit, logit^2), C * H]
        self._sums = torch.zeros(len(self.tasks), 3, cells * self.bins, dtype=torch.float64)
        self.counts = torch.zeros(len(self.tasks), cells, dtype=torch.float64)
        """Positives of each task in each cell, ``[T, C]``."""

    def update(self, task: str, logit: Tensor, cell: Tensor, weight: Tensor) -> None:
        """Add a batch's rows, whatever their labels.

        Args:
            task: name of the task.
            logit: ``[B]``.
            cell: int64 ``[B]`` in [0, C).
            weight: ``[B]``, sampling weight.
        """
        z, w = logit.detach().double(), weight.double()
        place = ((z.nan_to_num(0.0) + LOGIT_RANGE) * (self.bins / (2 * LOGIT_RANGE))).long().clamp_(0, self.bins - 1)
        sums = self._sums[self.tasks.index(task)]
        index = cell * self.bins + place
        for power, term in enumerate((w, w * z, w * z * z)):
            sums[power].index_add_(0, index, term)  # in place: the sums are far larger than a batch

    def count(self, task: str, cell: Tensor, label: Tensor, weight: Tensor) -> None:
        """Count the positives among rows whose labels are known: ``cell``, ``label`` and ``weight`` ``[B]``."""
        self.counts[self.tasks.index(task)] += torch.bincount(
            cell, weight.double() * label.double(), minlength=self.cells
        )

    def reduce_(self) -> None:
        """Sum over all ranks, in place (a collective call); nothing to do without ``torch.distributed``."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        for name in ("_sums", "counts"):
            value = getattr(self, name)
            moved = value.cuda() if torch.distributed.get_backend() == "nccl" else value
            torch.distributed.all_reduce(moved)
            setattr(self, name, moved.cpu())

    def rows(self, task: str) -> tuple[Tensor, Tensor, Tensor]:
        """The pseudo-rows of a task: logit, cell and weight, each ``[N]`` with ``N <= 2 C H``."""
        weight_P, logit_P, square_P = self._sums[self.tasks.index(task)]
        held = weight_P > 0
        weight = weight_P[held]
        mean = logit_P[held] / weight
        deviation = (square_P[held] / weight - mean.square()).clamp_min(0).sqrt()
        cell = held.nonzero().squeeze(1) // self.bins
        return torch.cat([mean - deviation, mean + deviation]), cell.repeat(2), weight.repeat(2) / 2

    def fit(self, before: Mapping[str, tuple[float, float]]) -> Fits:
        """Slope and shift of every task; a task without counts keeps what ``before`` has, if anything.

        Counts of cells without rows are left out, and logged.

        Raises:
            DataError: a logit is not finite, or a task has more counts than rows.
        """
        fits = dict(before)
        for position, task in enumerate(self.tasks):
            logit, cell, weight = self.rows(task)
            counts = self.counts[position].clone()
            seen = torch.bincount(cell, minlength=self.cells) > 0
            lost = float(counts[~seen].sum())
            if lost:
                _LOG.warning("calibration of task %r: %g counts are of cells without a row, and left out", task, lost)
            counts[~seen] = 0.0
            if float(counts.sum()) > 0:
                fits[task] = fit_platt_aggregated(logit, cell, counts, weight, f"calibration of task {task!r}")
        return fits
