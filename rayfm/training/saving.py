"""Writing a checkpoint's tensors while training goes on.

What the loop waits for is a copy of this rank's shards (`Staged.stage`); a thread then writes the copy, and says to the
other ranks' threads over a process group of their own how it went. A state that is not finite is never completed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from rayfm.training.divergence import DivergenceError, table_of


def unfit(name: str, value: Tensor) -> bool:
    """Whether a checkpoint's tensor says that training has diverged: a weight that is not finite, or a NaN.

    Adagrad's sum of squares may be infinite, after a gradient beyond 1e19: its rows then stay where they are.

    Args:
        name: ``<learner>.model....`` or ``<learner>.optimizer....``.
        value: of any shape.
    """
    if not value.is_floating_point() or not value.numel():
        return False
    low, high = torch.aminmax(value)  # one pass without a mask; both are NaN where any value is
    if ".optimizer.state." in name:
        return bool(torch.isnan(low))
    return not bool(torch.isfinite(low) and torch.isfinite(high))


class Staged(dcp.DefaultSavePlanner):
    """Plans a save from the live state, and writes a copy of it as it was then.

    Args:
        buffers: copies of earlier saves by tensor, whose memory is used again: pages that were touched once are copied
            to several times faster than new ones. None: nothing is copied, so the state must not change meanwhile.
    """

    def __init__(self, buffers: dict[MetadataIndex, Tensor] | None) -> None:
        super().__init__()
        self._buffers = buffers
        self._staged: dict[MetadataIndex, Any] = {}
        self._planned: SavePlan | None = None

    def stage(self, state: dict[str, Any]) -> None:
        """Take over the state as it is now."""
        super().set_up_planner(state, is_coordinator=dist.get_rank() == 0)
        self._planned = super().create_local_plan()
        on_device = False
        for item in self._planned.items:
            value = super().resolve_data(item)
            on_device |= isinstance(value, Tensor) and value.is_cuda
            self._staged[item.index] = self._copied(item.index, value.detach()) if isinstance(value, Tensor) else value
        if on_device:
            torch.cuda.synchronize()  # the copies to page-locked memory
        self.state_dict = {}

    def _copied(self, index: MetadataIndex, value: Tensor) -> Tensor:
        if self._buffers is None:
            return value
        buffer = self._buffers.get(index)
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self._buffers[index] = buffer
        return buffer.copy_(value, non_blocking=True)

    def not_finite(self) -> str | None:
        """Name of the first staged tensor that holds a value that `unfit` refuses."""
        for index, value in self._staged.items():
            if isinstance(value, Tensor) and unfit(str(index.fqn), value):
                return str(index.fqn)
        return None

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """The state was staged before."""
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        """The plan made from the live state."""
        assert self._planned is not None
        return self._planned

    def resolve_data(self, write_item: WriteItem) -> Any:
        """The staged tensor, or the staged bytes."""
        value = self._staged[write_item.index]
        if not isinstance(value, Tensor):
            value.seek(0)
        return value


class Writer:
    """Writes one checkpoint at a time, all ranks together.

    Every method but `busy` is a collective call.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")  # the threads' own: the loop's collectives go on beside it
        self._buffers: dict[MetadataIndex, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def busy(self) -> bool:
        """Whether this rank still writes. Where rank 0 does not, all ranks have written all."""
        return self._thread is not None and self._thread.is_alive()

    def save(
        self, state: dict[str, Any], path: Path, before: Callable[[], None], after: Callable[[], None], wait: bool
    ) -> None:
        """Write ``state`` to the folder ``path``, after what is being written.

        Args:
            before: called on rank 0 before anything is written.
            after: called on rank 0 once every rank has written its part.
            wait: return when that is done; otherwise as soon as the state may change again.

        Raises:
            DivergenceError: the state, or with ``wait=False`` the one of the save before, holds a value that is not
                finite. Nothing is called complete.
        """
        self.finish()
        staged = Staged(None if wait else self._buffers)
        staged.stage(state)
        if wait:
            self._write(staged, path, before, after)
        else:
            self._thread = threading.Thread(
                target=self._guarded, args=(staged, path, before, after), name="rayfm-checkpoint", daemon=True
            )
            self._thread.start()

    def finish(self, timeout: float | None = None) -> None:
        """Wait until what is being written stands, and raise what went wrong with it."""
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                return
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _guarded(self, *arguments: Any) -> None:
        try:
            self._write(*arguments)
        except BaseException as error:
            self._error = error

    def _write(self, staged: Staged, path: Path, before: Callable[[], None], after: Callable[[], None]) -> None:
        rank, world = dist.get_rank(self._group), dist.get_world_size(self._group)
        bad: list[Any] = [None] * world
        dist.all_gather_object(bad, staged.not_finite(), group=self._group)
        if any(bad):
            name = next(name for name in bad if name)
            raise DivergenceError(
                f"{table_of(name)} holds values that are not finite; the state at {path.name} is not kept as a "
                "checkpoint. Lower the learning rate, add warmup_steps or dense.clippy, or look for extreme values in "
                "the features"
            )
        if rank == 0:
            before()
        dist.barrier(self._group)
        dcp.save({}, checkpoint_id=str(path), planner=staged, process_group=self._group)
        if rank == 0:
            after()
        dist.barrier(self._group)
