"""Training processes that start at once, and die when told."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import processes
import torch
import torch.distributed as dist
import training_runs as runs

from rayfm.training.loop import TrainingLoop
from rayfm.training.spec import TrainerSpec


@contextlib.contextmanager
def group(rank: int, world: int, file: str) -> Iterator[None]:
    """A gloo group whose ranks meet in ``file``."""
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = str(world)
    dist.init_process_group("gloo", store=dist.FileStore(file, world), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def in_world(rank: int, world: int, folder: str, work: Callable[[int], None]) -> None:
    """Run ``work(rank)`` in a group."""
    with group(rank, world, f"{folder}/store"):
        work(rank)


class Train:
    """Trains a spec in one rank, and dies where told."""

    def __init__(self, spec: TrainerSpec, seed: int | None = None) -> None:
        self.spec, self.seed = spec, seed

    def __call__(self, rank: int) -> None:
        if self.seed is not None:
            die_at_random(self.seed)
        TrainingLoop(self.spec, runs.Free(self.spec.teachers), runs.IdLabels()).run()


def die_at_random(seed: int) -> None:
    """Have the kernel kill this process some steps later, up to 30 ms into the step, by a seeded draw."""
    draw = random.Random(seed)
    steps, seconds = draw.randint(2, 8), draw.uniform(0, 0.03)
    original = TrainingLoop._report

    def kill() -> None:
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    def count(self: TrainingLoop, *arguments: Any) -> None:
        nonlocal steps
        steps -= 1
        if steps == 0:
            threading.Thread(target=kill, daemon=True).start()
        original(self, *arguments)

    TrainingLoop._report = count  # type: ignore[method-assign]


def run(world: int, work: Callable[[int], None]) -> list[int]:
    """``work`` in ``world`` processes; their exit codes. One that ends badly takes the others along, by SIGKILL."""
    with tempfile.TemporaryDirectory() as folder:
        started = [
            processes.context().Process(target=in_world, args=(rank, world, folder, work), daemon=True)
            for rank in range(world)
        ]
        for process in started:
            process.start()
        while any(process.is_alive() for process in started):
            if any(process.exitcode not in (None, 0) for process in started):
                for process in started:
                    process.kill()
            started[0].join(0.005)
        return [process.exitcode for process in started]
