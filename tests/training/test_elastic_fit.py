"""Under Ray Train: five workers are killed, the group grows and shrinks in the middle of a period, nothing is lost."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import test_exactly_once as once
import training_runs as runs
from example_store import write_store

from rayfm.training.ledger import read_ledger
from rayfm.training.trainer import fit

STEPS = 6
"""Steps that an attempt trains before it waits for what befalls it."""


class Watched:
    """A label source without labels. Each worker that takes it up says so, and stops after `STEPS` steps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        from rayfm.training.loop import TrainingLoop

        report, done, folder = TrainingLoop._report, [0], self.folder

        def held(loop: Any, period: str, step: int, steps: int, phase: str) -> None:
            done[0] += phase == "train"
            if done[0] == STEPS:
                with (folder / "held").open("a") as file:
                    file.write(f"{os.getpid()} {loop.world}\n")
                while not (folder / "go").exists():
                    time.sleep(0.02)
            report(loop, period, step, steps, phase)

        TrainingLoop._report = held  # type: ignore[method-assign]

    def release(self) -> None:
        pass


class Reserved:
    """CPUs that another trainer of the cluster asked for before, which is what elastic groups leave alone."""

    def __init__(self) -> None:
        from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as coordinator

        self._actor = coordinator.get_or_create_autoscaling_coordinator()
        self._priority = coordinator.ResourceRequestPriority.HIGH

    def take(self, cpus: int) -> None:
        import ray

        request = self._actor.request_resources.remote
        ray.get(request("other", [{"CPU": 1}] * cpus, expire_after_s=600, priority=self._priority))

    def cancel(self) -> None:
        import ray

        ray.get(self._actor.cancel_request.remote("other"))


@contextmanager
def reserved() -> Iterator[Reserved]:
    found = Reserved()
    try:
        yield found
    finally:
        found.cancel()


def waited(check: Callable[[], Any], what: str, thread: threading.Thread, seconds: float = 200) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := check()):
        assert thread.is_alive(), f"the fit ended before {what}"
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
    return found


@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_session")
def test_five_kills_growing_and_shrinking_in_one_fit(tmp_path: Path) -> None:
    from ray import cloudpickle

    write_store(tmp_path / "store", list(runs.PERIODS), impressions=640, considerations=200)
    whole = once.made(tmp_path / "store", tmp_path / "whole")
    runs.train_here(whole)
    spec = once.made(
        tmp_path / "store",
        tmp_path / "run",
        workers=1,
        max_workers=2,
        resize_seconds=1.0,
        cpus_per_worker=1.0,
        max_failures=5,
        sharding="row_wise",
    )
    coordinator = runs.Noted(tmp_path)
    errors: list[BaseException] = []

    def train() -> None:
        try:
            fit(spec, coordinator, Watched(tmp_path))  # type: ignore[arg-type]
        except BaseException as error:
            errors.append(error)

    def held(before: int, world: int) -> list[int]:
        """The processes of an attempt of so many workers that have come to wait, after the first ``before`` ones."""
        path = tmp_path / "held"
        lines = path.read_text().splitlines()[before:] if path.exists() else []
        pids = [int(pid) for pid, size in map(str.split, lines) if int(size) == world]
        return pids if len(pids) >= world else []

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with reserved() as other:
        other.take(3)
        thread = threading.Thread(target=train, daemon=True)
        thread.start()
        try:
            seen = 0
            for number, (world, fate) in enumerate(
                [(1, "kill"), (1, "kill"), (1, "grow"), (2, "kill"), (2, "kill"), (2, "shrink"), (1, "kill"), (1, "go")]
            ):
                pids = waited(lambda s=seen, w=world: held(s, w), f"attempt {number} of {world} workers", thread)
                seen = len((tmp_path / "held").read_text().splitlines())
                if fate == "kill":
                    os.kill(pids[-1], signal.SIGKILL)
                elif fate == "go":
                    (tmp_path / "go").touch()
                else:
                    other.take(2 if fate == "grow" else 3)
            waited(lambda: not thread.is_alive() or len(coordinator.noted("trained")) == 3, "the end", thread)
            thread.join(120)
        finally:
            (tmp_path / "go").touch()
            cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert not errors
    assert not thread.is_alive()
    assert set(read_ledger(spec.folder / "ledger", runs.PERIODS[0]).rank) == {0, 1}
    once.assert_trained_once(spec)
    once.assert_same_end(spec, whole, rel=1e-3)
