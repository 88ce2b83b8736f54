"""A period's batches on their way to the learners: read ahead, and copied to the device while it computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch

from rayfm.data.batch import Batch


class Feed:
    """Each step's batch on the CPU and on the device, in order, for everyone who trains on them.

    For CUDA a batch is put into page-locked memory and copied by a stream of its own, so that the copy runs beside what
    the device computes. What was read ahead of a step that is not trained is forgotten; it counts for nothing.

    Args:
        batches: the period's, from the step to begin with.
        device: where the learners are.
        ahead: how many batches are read, and on their way, beyond the one that is trained.
    """

    def __init__(self, batches: Iterator[Batch], device: torch.device, ahead: int = 0) -> None:
        self.device, self._batches, self._ahead = device, batches, ahead
        self._held: deque[_Held] = deque()
        self._first = 0
        """Position of the first that is held: the one that is trained."""
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __iter__(self) -> Iterator[tuple[Batch, Batch]]:
        while (held := self._at(self._first)) is not None:
            self._at(self._first + self._ahead)
            yield held.cpu, held.arrived()
            self._held.popleft()
            self._first += 1

    def on_device(self) -> Iterator[Batch]:
        """The batches on the device, for one who reads further than what is trained, at most ``ahead`` beyond it.

        They have arrived for the stream that is current when each is asked for.
        """
        position = self._first
        while (held := self._at(position)) is not None:
            yield held.arrived()
            position += 1

    def _at(self, position: int) -> _Held | None:
        while len(self._held) <= position - self._first:
            batch = next(self._batches, None)
            if batch is None:
                return None
            self._held.append(_Held(batch, self.device, self._stream))
        return self._held[position - self._first]


class _Held:
    """One batch, and its copy on the device."""

    def __init__(self, cpu: Batch, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self.cpu = cpu
        self._event: torch.cuda.Event | None = None
        if stream is None:
            self._moved = cpu.to(device)
            return
        for ids in (cpu.sparse, cpu.weighted, cpu.sequence):
            if ids is not None:
                ids.length_per_key()  # counted here and kept; on the device the host would wait for it
        pinned = cpu.pin_memory()
        with torch.cuda.stream(stream):
            self._moved = pinned.to(device, non_blocking=True)
            self._event = stream.record_event()

    def arrived(self) -> Batch:
        """The copy, for the current stream: which waits for it, and keeps its memory."""
        if self._event is not None:
            current = torch.cuda.current_stream(self._moved.example_id.device)
            current.wait_event(self._event)
            self._moved.record_stream(current)
        return self._moved
