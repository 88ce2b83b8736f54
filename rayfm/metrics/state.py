"""The sums that the metrics are functions of, gathered batch by batch, merged over ranks, periods and restarts.

Shape letters: B rows, F traffics, S sums, H bins of the point histograms, h bins of the replicates' histograms,
R bootstrap replicates.
"""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rayfm.config import DataError
from rayfm.config.durable import write_whole
from rayfm.metrics.bootstrap import bootstrap_weights
from rayfm.metrics.functions import Array
from rayfm.schema import KINDS

TaskKind = Literal["binary", "regression"]

SCORED = (*KINDS, "impression_reference")
"""Kinds of scored rows, by number: impressions against their labels, considerations against the model's ``reference``
(the next stage's prediction, UKDSL 4.1.2), and impressions against that same reference."""

IMPRESSION_REFERENCE = SCORED.index("impression_reference")

SUMS = ("n", "weight", "label", "prediction", "logloss", "squared_error")
"""Columns of the sums: rows; then weight x (1, label, prediction, binary cross-entropy in nats, squared error)."""

LOGIT_RANGE = 12.0
"""Histogram bins are uniform over logits in [-12, 12]; a logit outside counts in the first or the last bin."""

_CHUNK = 2048
"""Rows whose scaled replicate weights fit the cache; scaling all rows at once costs ten times the histogram itself."""


@dataclasses.dataclass
class Cell:
    """The sums of one kind and task, float64. Histograms are of binary tasks; a regression has them empty."""

    sums: Tensor
    """``[F, S]`` per traffic."""
    histogram: Tensor
    """``[F, 2, H]``: weight x (1 - label), weight x label, by bin of the logit."""
    replicate_sums: Tensor
    """``[R, S]`` over all traffics, times each user's copies."""
    replicate_histogram: Tensor
    """``[2, h, R]``: as ``histogram``, over all traffics."""

    def tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def logit_bins(logits: Tensor, bins: int) -> Tensor:
    """Bin of each logit, int64 ``[B]`` in ``[0, bins)``. A NaN goes to the middle: its NaN logloss tells of it."""
    position = (logits.nan_to_num(0.0) + LOGIT_RANGE) * (bins / (2 * LOGIT_RANGE))
    return position.long().clamp_(0, bins - 1)


def bin_centres(bins: int) -> Array:
    """The logit in the middle of each bin, float64 ``[bins]``."""
    width = 2 * LOGIT_RANGE / bins
    return (np.arange(bins, dtype=np.float64) + 0.5) * width - LOGIT_RANGE


class MetricState:
    """Sums of one model's predictions over rows; ``rayfm.metrics.summary`` turns them into metrics.

    Args:
        tasks: (name, ``binary`` or ``regression``) of each task.
        traffics: names that ``traffic`` counts in.
        replicates: R, bootstrap replicates; 0 leaves the intervals out.
        bins: H. With 4,096 the AUC of thousands of rows is within 1e-4 of the exact one.
        replicate_bins: h. An interval uses only how replicates differ from one another, so that coarser bins do: with
            512 the standard error of a difference of two AUCs is within a few per cent of the exact one where the
            logits' standard deviation is near 1, and on the safe side (up to twice as wide) where it is 0.3 and the
            models differ by a twentieth of that.
    """

    def __init__(
        self,
        tasks: Sequence[tuple[str, TaskKind]],
        traffics: Sequence[str],
        replicates: int = 200,
        bins: int = 4096,
        replicate_bins: int = 512,
    ) -> None:
        for name, kind in tasks:
            if kind not in get_args(TaskKind):
                raise ValueError(f"task {name!r}: kind {kind!r} is neither binary nor regression")
        self.tasks: dict[str, TaskKind] = dict(tasks)
        self.traffics = tuple(traffics)
        self.replicates, self.bins, self.replicate_bins = replicates, bins, replicate_bins
        self._cells = {(k, task): self._empty(kind) for k in range(len(SCORED)) for task, kind in self.tasks.items()}

    def _empty(self, kind: TaskKind) -> Cell:
        binary = kind == "binary"
        shapes = {
            "sums": (len(self.traffics), len(SUMS)),
            "histogram": (len(self.traffics), 2, self.bins if binary else 0),
            "replicate_sums": (self.replicates, len(SUMS)),
            "replicate_histogram": (2, self.replicate_bins if binary else 0, self.replicates),
        }
        # numpy asks for zeroed pages only once they are written: a cell without rows takes no memory.
        return Cell(**{name: torch.from_numpy(np.zeros(shape)) for name, shape in shapes.items()})

    def cell(self, kind: int, task: str) -> Cell:
        """The sums of one kind, by its number in ``SCORED``, and one task."""
        return self._cells[kind, task]

    def update(
        self,
        task: str,
        kind: int,
        prediction: Tensor,
        label: Tensor,
        mask: Tensor,
        weight: Tensor,
        traffic: Tensor,
        user: Tensor,
        weights: Tensor | None = None,
    ) -> None:
        """Add the rows of one kind in a batch. The larger the batch, the less each row costs.

        Args:
            task: name of the task.
            kind: number in ``SCORED``: 0 impressions, 1 considerations, 2 impressions against the reference.
            prediction: ``[B]``, a logit for a binary task, a value for a regression.
            label: ``[B]``; for a binary task 0, 1 or a probability.
            mask: bool ``[B]``: the row is of this kind and its label is known. Other rows are not looked at.
            weight: ``[B]``, sampling weight.
            traffic: int64 ``[B]``, position in ``traffics``.
            user: int64 ``[B]``, whom the row's bootstrap weights belong to.
            weights: ``bootstrap_weights(user, replicates)`` when several models share the batch.

        Raises:
            ValueError: a label of a binary task outside [0, 1].
        """
        if not bool(mask.any()):
            return
        cell, binary = self._cells[kind, task], self.tasks[task] == "binary"
        zero = torch.zeros((), dtype=torch.float64)
        y = torch.where(mask, label.detach().double(), zero)
        z = torch.where(mask, prediction.detach().double(), zero)
        w = torch.where(mask, weight.double(), zero)
        if binary and bool(((y < 0) | (y > 1)).any()):
            raise ValueError(f"task {task!r}: a label of a binary task lies outside [0, 1]")

        predicted = z.sigmoid() if binary else z
        entropy = functional.binary_cross_entropy_with_logits(z, y, reduction="none") if binary else torch.zeros_like(z)
        terms = torch.stack([torch.ones_like(w), y, predicted, entropy, (predicted - y).square()]) * w
        sums = torch.cat([mask.double()[None], terms])
        # Rows behind the mask may carry any traffic; they add zeros to the first.
        traffic = torch.where(mask, traffic, 0)
        cell.sums.index_add_(0, traffic, sums.T)
        if binary:
            size = len(self.traffics) * self.bins
            place = traffic * self.bins + logit_bins(z, self.bins)
            for label_value, share in ((0, w * (1 - y)), (1, w * y)):
                counts = torch.bincount(place, share, minlength=size).view(len(self.traffics), self.bins)
                cell.histogram[:, label_value] += counts

        if self.replicates:
            copies = bootstrap_weights(user, self.replicates) if weights is None else weights
            if copies.shape != (len(user), self.replicates):
                raise ValueError(f"weights are {tuple(copies.shape)}, expected ({len(user)}, {self.replicates})")
            cell.replicate_sums += (sums.float() @ copies).T.double()
            if binary:
                cell.replicate_histogram += self._replicate_histogram(z, y, w, copies)

    def _replicate_histogram(self, z: Tensor, y: Tensor, w: Tensor, copies: Tensor) -> Tensor:
        """``[2, h, R]`` float64. Sums one batch in float32, where whole numbers are exact up to 2**24."""
        h = self.replicate_bins
        place = logit_bins(z, h)
        # One row more than there are bins takes what has no weight.
        out = torch.zeros(2 * h + 1, self.replicates)
        hard = bool(((y == 0) | (y == 1)).all()) and bool(((w == 0) | (w == 1)).all())
        if hard:
            out.index_add_(0, torch.where(w == 0, 2 * h, place + h * y.long()), copies)
        else:
            scaled = torch.empty(min(_CHUNK, len(z)), self.replicates)
            for label_value, share in ((0, (w * (1 - y)).float()), (1, (w * y).float())):
                rows = torch.where(share == 0, 2 * h, place + h * label_value)
                for start in range(0, len(z), _CHUNK):
                    part = slice(start, start + _CHUNK)
                    buffer = scaled[: len(rows[part])]
                    torch.mul(copies[part], share[part, None], out=buffer)
                    out.index_add_(0, rows[part], buffer)
        return out[: 2 * h].view(2, h, self.replicates).double()

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for (kind, task), cell in self._cells.items():
            for name, tensor in cell.tensors().items():
                yield f"{SCORED[kind]}/{task}/{name}", tensor

    def _layout(self) -> dict[str, object]:
        return {
            "tasks": self.tasks,
            "traffics": self.traffics,
            "replicates": self.replicates,
            "bins": self.bins,
            "replicate_bins": self.replicate_bins,
        }

    def state_dict(self) -> dict[str, Tensor]:
        """``<kind>/<task>/<sums>`` -> tensor. Keys and shapes follow from the constructor's arguments alone."""
        return dict(self._tensors())

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the sums from ``state``. Raises ValueError where its keys or shapes are another state's."""
        mine = self.state_dict()
        if mine.keys() != state.keys() or any(mine[key].shape != state[key].shape for key in mine):
            raise ValueError("the sums belong to a MetricState of other tasks, traffics, replicates or bins")
        for key, tensor in mine.items():
            tensor.copy_(state[key])

    def merge(self, other: MetricState) -> None:
        """Add the sums of ``other``: as if its rows had come here. Raises ValueError where the layouts differ."""
        if self._layout() != other._layout():
            raise ValueError(f"cannot merge: {other._layout()} is not {self._layout()}")
        for (_, mine), (_, theirs) in zip(self._tensors(), other._tensors(), strict=True):
            mine += theirs

    def reduce_(self, process_group: torch.distributed.ProcessGroup | None = None) -> None:
        """Sum over all ranks, in place, with one collective; nothing to do without ``torch.distributed``."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        tensors = [tensor for _, tensor in self._tensors()]
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        if torch.distributed.get_backend(process_group) == "nccl":
            moved = flat.cuda()
            torch.distributed.all_reduce(moved, group=process_group)
            flat = moved.cpu()
        else:
            torch.distributed.all_reduce(flat, group=process_group)
        for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view(tensor.shape))

    def save(self, path: str | Path) -> None:
        """Write a ``.npz`` that appears whole or not at all. Cells without rows are left out.

        Not synced: `load` refuses what a power cut emptied.

        Raises:
            CapacityError: the disk is full, or the folder cannot be written.
        """
        arrays = {
            f"{SCORED[kind]}/{task}/{name}": tensor.numpy()
            for (kind, task), cell in self._cells.items()
            if float(cell.sums[:, 0].sum()) > 0
            for name, tensor in cell.tensors().items()
        }
        header = {
            "layout/tasks": np.array([[name, kind] for name, kind in self.tasks.items()], dtype=np.str_),
            "layout/traffics": np.array(self.traffics, dtype=np.str_),
            "layout/sizes": np.array([self.replicates, self.bins, self.replicate_bins]),
        }
        write_whole(Path(path), lambda file: np.savez_compressed(file, allow_pickle=False, **header, **arrays))

    @classmethod
    def load(cls, path: str | Path) -> MetricState:
        """Read what ``save`` wrote.

        Raises:
            DataError: the file is missing, corrupt or something else.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                tasks = [(str(name), kind) for name, kind in file["layout/tasks"].reshape(-1, 2).tolist()]
                replicates, bins, replicate_bins = (int(size) for size in file["layout/sizes"])
                state = cls(tasks, file["layout/traffics"].tolist(), replicates, bins, replicate_bins)
                for key, tensor in state._tensors():
                    if key in file.files:
                        tensor.copy_(torch.from_numpy(file[key]))
        except (OSError, ValueError, KeyError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{path}: cannot read metric sums ({error}); score the period again") from None
        return state
