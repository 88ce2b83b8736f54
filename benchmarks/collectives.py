"""What workers send one another: a gloo process group that counts, and what a step should send by arithmetic."""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

BACKEND = "counted"
ID, LENGTH, FLOAT = 8, 4, 4
"""Bytes of an id, of a feature's length in an example, of a value."""

BACKWARD = "dense backward"
"""The part of a step inside which vectors' gradients travel."""

EXCHANGES = ("ids", "vectors forward", "vectors backward", "gradients")
"""What a step sends; beside them the sums of its losses, a few bytes."""


class Clock:
    """CPU-seconds of all threads of this process, each charged to one part: the innermost that is open."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open = ["other"]
        self._last = time.process_time()

    def _charge(self) -> None:
        now = time.process_time()
        self.seconds[self._open[-1]] += now - self._last
        self._last = now

    def enter(self, part: str) -> None:
        """A part inside the open one begins."""
        self._charge()
        self._open.append(part)

    def leave(self) -> None:
        """It ends, and the one around it goes on."""
        self._charge()
        self._open.pop()

    def turn(self, part: str) -> None:
        """The open part ends, and another takes its place."""
        self._charge()
        self._open[-1] = part

    def inside(self, part: str) -> bool:
        """Whether the part, or one inside it, is open."""
        return part in self._open

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What runs inside is charged to nobody."""
        self._charge()
        yield
        self._last = time.process_time()

    def reset(self) -> None:
        """Count from here on."""
        self.seconds.clear()
        self._last = time.process_time()


@dataclasses.dataclass
class Sent:
    """Collectives of one kind on this rank."""

    calls: int = 0
    size: float = 0.0
    """Bytes that they have to send by their definition: an all-to-all what is for others, a reduce-scatter or an
    all-gather (W - 1) / W of the whole, an all-reduce twice that."""
    wire: int = 0
    """Bytes that the process wrote to its sockets meanwhile."""


class Counted(dist.ProcessGroup):
    """gloo, one collective at a time: each is waited for, counted, and charged to its part of the clock."""

    def __init__(self, rank: int, world: int, name: str, gloo: Any) -> None:
        super().__init__(rank, world)
        self._world, self._rank, self._name, self._gloo = world, rank, name, gloo
        self.clock = Clock()
        self.sent: dict[str, Sent] = defaultdict(Sent)

    def getBackendName(self) -> str:
        return BACKEND

    def getGroupName(self) -> str:
        return self._name

    @property
    def group_name(self) -> str:
        return self._name

    def _run(self, call: str, part: str, size: float, *arguments: Any) -> Any:
        with self.clock.paused():
            before = written_bytes()
        self.clock.enter(part)
        work = getattr(self._gloo, call)(*arguments)
        work.wait()
        self.clock.leave()
        with self.clock.paused():
            sent = self.sent[part]
            sent.calls += 1
            sent.size += size
            sent.wire += written_bytes() - before
        return work

    def _kind(self, tensor: torch.Tensor) -> str:
        if not tensor.is_floating_point():
            return "ids"
        return "vectors backward" if self.clock.inside(BACKWARD) else "vectors forward"

    def alltoall_base(
        self, output: torch.Tensor, source: torch.Tensor, to: Sequence[int], of: Sequence[int], *options: Any
    ) -> Any:
        kept = of[self._rank] / max(sum(of), 1) if len(of) else 1 / self._world
        size = size_of(source) * (1 - kept)
        return self._run("alltoall_base", self._kind(source), size, output, source, to, of, *options)

    def reduce_scatter_single(self, output: torch.Tensor, source: torch.Tensor, *options: Any) -> Any:
        size = size_of(source) * (self._world - 1) / self._world
        return self._run("_reduce_scatter_base", self._kind(source), size, output, source, *options)

    def reduce_scatter(self, outputs: list[torch.Tensor], sources: list[list[torch.Tensor]], *options: Any) -> Any:
        size = sum(map(size_of, sources[0])) * (self._world - 1) / self._world
        return self._run("reduce_scatter", self._kind(sources[0][0]), size, outputs, sources, *options)

    def all_gather_single(self, output: torch.Tensor, source: torch.Tensor, *options: Any) -> Any:
        size = size_of(source) * (self._world - 1)
        return self._run("_allgather_base", self._kind(source), size, output, source, *options)

    def allgather(self, outputs: list[list[torch.Tensor]], sources: list[torch.Tensor], *options: Any) -> Any:
        size = size_of(sources[0]) * (self._world - 1)
        return self._run("allgather", self._kind(sources[0]), size, outputs, sources, *options)

    def allreduce(self, tensors: list[torch.Tensor], *options: Any) -> Any:
        part = "gradients" if tensors[0].dtype == torch.float32 else "losses"
        size = 2 * size_of(tensors[0]) * (self._world - 1) / self._world
        return self._run("allreduce", part, size, tensors, *options)

    def broadcast(self, *arguments: Any) -> Any:
        return self._run("broadcast", "start", 0.0, *arguments)

    def barrier(self, *arguments: Any) -> Any:
        return self._run("barrier", "start", 0.0, *arguments)


def start(rank: int, world: int, file: Path) -> Counted:
    """Make such a group this process's world."""

    def create(of: Any, options: Any) -> Counted:
        gloo = dist.ProcessGroupGloo(of.store, of.group_rank, of.group_size, timeout=of.timeout)
        return Counted(of.group_rank, of.group_size, of.group_id, gloo)

    dist.Backend.register_backend(BACKEND, create, extended_api=True, devices=["cpu"])
    dist.init_process_group(BACKEND, store=dist.FileStore(str(file), world), rank=rank, world_size=world)
    group = dist.group.WORLD
    assert isinstance(group, Counted)
    return group


def size_of(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's values."""
    return tensor.numel() * tensor.element_size()


def written_bytes(text: str | None = None) -> int:
    """Bytes that this process has written so far, to sockets too: gloo writes with ``writev``, which Linux counts."""
    for line in (text or Path("/proc/self/io").read_text()).splitlines():
        if line.startswith("wchar:"):
            return int(line.split()[1])
    raise KeyError("wchar")


def closed_form(
    sharding: str, world: int, batch: int, features: int, columns: int, dense_parameters: int
) -> dict[str, float]:
    """Bytes a rank and step, the mean over ranks, for one id a feature and a global ``batch``.

    With b = batch / W examples a rank, F features and E columns: table-wise, ids and their lengths go to the table's
    rank, and b F E values come from the others; row-wise, lengths go to every rank, and each rank has partial sums for
    the whole batch, of which a reduce-scatter leaves (W - 1) / W on the way. Backward as forward. Gradients: twice
    (W - 1) / W of them.
    """
    own, others = batch / world, (world - 1) / world
    if sharding == "table_wise":
        ids = own * features * (ID + LENGTH) * others
        vectors = own * features * columns * FLOAT * others
    elif sharding == "row_wise":
        ids = own * features * (ID * others + LENGTH * (world - 1))
        vectors = batch * features * columns * FLOAT * others
    else:
        raise ValueError(f"no closed form for {sharding}; take table_wise or row_wise")
    gradients = 2 * dense_parameters * FLOAT * others
    return {"ids": ids, "vectors forward": vectors, "vectors backward": vectors, "gradients": gradients}
