"""What a model sees: one step's examples as tensors.

Shape letters: B examples, D dense features, T tasks, S supervision columns, V stored representations, R their width.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rayfm.data.kinds import CONSIDERATION as CONSIDERATION
from rayfm.data.kinds import IMPRESSION as IMPRESSION

if TYPE_CHECKING:
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


@dataclasses.dataclass
class Batch:
    """One step's examples of one rank. Moves between devices as one object.

    Columns of ``labels`` follow the schema's tasks, columns of ``supervision`` follow ``supervision_names``
    (``<teacher>/<task>``, ``logged/<model>/<task>``, ``truth/<task>``); ``dense`` follows the schema's dense features.
    """

    dense: Tensor
    """float32 ``[B, D]``."""
    sparse: KeyedJaggedTensor | None
    """Features of kind sparse and multi: one key a feature, rows of its table."""
    weighted: KeyedJaggedTensor | None
    """Features of kind weighted, with weights."""
    sequence: KeyedJaggedTensor | None
    """Features of kind sequence, oldest first."""
    labels: Tensor
    """float32 ``[B, T]``, transformed as the task says; 0 where unknown."""
    label_mask: Tensor
    """bool ``[B, T]``: the label is known."""
    supervision: Tensor
    """float32 ``[B, S]``; 0 where there is none."""
    supervision_mask: Tensor
    """bool ``[B, S]``."""
    example_id: Tensor
    """int64 ``[B]``."""
    kind: Tensor
    """int64 ``[B]``: IMPRESSION or CONSIDERATION."""
    traffic: Tensor
    """int64 ``[B]``: position in the schema's traffics."""
    weight: Tensor
    """float32 ``[B]``: the example's sampling weight, 1 by default."""
    group: Tensor
    """int64 ``[B]``: the request, -1 where unknown."""
    user: Tensor
    """int64 ``[B]``: the user, for intervals; the example id where unknown."""
    tasks: tuple[str, ...] = ()
    supervision_names: tuple[str, ...] = ()
    representation: Tensor | None = None
    """float32 ``[B, sum of R]``: stored representations side by side, 0 where there is none. None: none is read."""
    representation_mask: Tensor | None = None
    """bool ``[B, V]``."""
    representation_widths: tuple[tuple[str, int], ...] = ()
    """Name (a teacher's) and R of each, in order."""

    def __len__(self) -> int:
        return int(self.example_id.shape[0])

    def _map(self, call: str, *args: Any, **kwargs: Any) -> Batch:
        moved = {
            field.name: getattr(value, call)(*args, **kwargs) if hasattr(value, call) else value
            for field in dataclasses.fields(self)
            for value in [getattr(self, field.name)]
        }
        return Batch(**moved)

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """The same batch on ``device``."""
        return self._map("to", device, non_blocking=non_blocking)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, for overlapped copies to a GPU."""
        return self._map("pin_memory")

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory of a batch on a GPU until what ``stream`` does with it by now is done."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if hasattr(value, "record_stream"):
                value.record_stream(stream)

    def label(self, task: str) -> tuple[Tensor, Tensor]:
        """Label and mask of one task, each ``[B]``."""
        column = self.tasks.index(task)
        return self.labels[:, column], self.label_mask[:, column]

    def represented(self, name: str) -> tuple[Tensor, Tensor]:
        """A stored representation ``[B, R]`` and its mask ``[B]``."""
        assert self.representation is not None
        assert self.representation_mask is not None
        start = 0
        for column, (known, width) in enumerate(self.representation_widths):
            if known == name:
                return self.representation[:, start : start + width], self.representation_mask[:, column]
            start += width
        raise ValueError(f"the batch has no representation {name!r}")

    def supervised(self, name: str) -> tuple[Tensor, Tensor]:
        """Supervision and mask of one column, each ``[B]``."""
        column = self.supervision_names.index(name)
        return self.supervision[:, column], self.supervision_mask[:, column]
