"""A soak: swaps under load, then faults under load, then the count of what was accepted against what is there."""

from __future__ import annotations

import collections
import dataclasses
import os
import signal
import statistics
import threading
import time
from pathlib import Path
from typing import Any

from soak_checks import check_near_line, check_periods, check_snapshots
from soak_faults import KINDS, Fault, schedule
from soak_load import Poster, Scorer, scorers
from soak_processes import TEACHER
from soak_world import STUDENT, Background, World, until

from rayfm.serving.nearline.spool import Spool

RECOVERY_S = 120.0
"""In which everything that was killed has to be back."""
DRAIN_S = 300.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much."""

    seed: int = 1
    faults: int = 20
    mean_s: float = 2.0
    """Seconds between faults on average."""
    kinds: tuple[str, ...] = KINDS
    """What is killed."""
    pause_s: float = 0.1
    """Of a client between its requests. Beside other tests they would leave no CPU to what is to come back."""
    swaps: int = 4
    publish_s: float = 12.0
    """Seconds between new versions while faults come."""
    job_pause_s: float = 8.0
    """Seconds between label jobs, each of which is a process that starts anew."""
    impressions: int = 4000
    considerations: int = 2000


def soak(folder: Path, plan: Plan, say: Any = print) -> dict[str, Any]:
    """Run it, on the Ray that runs.

    Returns:
        What happened, in numbers.

    Raises:
        AssertionError: a promise was broken.
    """
    begin = time.monotonic()
    world = World(folder, plan.seed, plan.impressions, plan.considerations)
    try:
        until(lambda: all(world.running(kind) for kind in ("teacher", "endpoints", "consumer", "updater")), "the start")
        say(f"started in {time.monotonic() - begin:.0f} s")
        swaps = _swap(world, plan)
        say(f"swaps: {swaps}")
        faults, poster, clients = _faults(world, plan, say)
        replies = {version for client in clients for version in client.replies}
        result = {
            "seconds": round(time.monotonic() - begin),
            "swaps": swaps,
            "faults": faults,
            "posts_not_accepted": dict(poster.refused),
            "scoring": {
                "replies": sum(len(client.replies) for client in clients),
                "failed_after_retries": dict(sum((client.refused for client in clients), collections.Counter())),
                "slowest_s": round(max(client.slowest_s for client in clients), 2),
            },
            "near_line": check_near_line(world, poster),
            "label_jobs": check_periods(world),
            "snapshots": check_snapshots(world, replies),
        }
        say(result)
    finally:
        world.stop()
    return result


def _swap(world: World, plan: Plan) -> dict[str, int]:
    """Publish versions while clients that never try twice ask all the time."""
    clients = scorers(world.url, STUDENT, world.students, TEACHER, world.teachers, 1, plan.pause_s)
    for client in clients:
        client.start()

    def all_swapped() -> bool:
        # Replicas swap one by one: the last replies of every client are by the newest version.
        return all(set(client.replies[-12:]) == {world.newest} for client in clients) or any(c.crash for c in clients)

    try:
        until(all_swapped, "the first version")
        for _ in range(plan.swaps):
            world.publish()
            until(all_swapped, f"the swap to {world.newest}")
            world.sweep()
    finally:
        for client in clients:
            client.end()
    failed = sum((client.refused for client in clients), collections.Counter())
    assert not failed, f"requests failed while versions were swapped: {dict(failed)}"
    return {"swaps": plan.swaps, "replies": sum(len(client.replies) for client in clients), "failed": 0}


def _faults(world: World, plan: Plan, say: Any) -> tuple[dict[str, Any], Poster, list[Scorer]]:
    poster = Poster(world.url, TEACHER, plan.seed)
    clients = scorers(world.url, STUDENT, world.students, TEACHER, world.teachers, 5, plan.pause_s)
    published = [0]

    def new_version() -> None:
        published[0] += 1
        world.publish(corrupt=published[0] % 3 == 2)
        world.sweep()

    background = [Background(new_version, plan.publish_s), Background(lambda: world.next_job(plan.job_pause_s), 0.5)]
    threads = (poster, *clients, *background)
    for thread in threads:
        thread.start()
    try:
        return _count(world, plan, say, poster, clients, background), poster, clients
    except BaseException:
        for thread in threads:  # what runs on would start a Ray of its own once this one is gone
            thread.stop()
        for thread in threads:
            thread.join(60)
        raise


def _count(
    world: World, plan: Plan, say: Any, poster: Poster, clients: list[Scorer], background: list[Background]
) -> dict[str, Any]:
    """Inject faults under the load that runs, then let it end; the faults in numbers."""
    threads = (poster, *clients, *background)
    recovered: dict[str, list[float]] = collections.defaultdict(list)
    waiting: dict[str, threading.Thread] = {}
    """Kind -> who waits for its last fault's end: a kind has one fault at a time."""
    broken: list[BaseException] = []
    try:
        for fault in schedule(plan.seed, plan.faults, plan.mean_s, plan.kinds):
            time.sleep(fault.wait_s)
            took = until(
                lambda kind=fault.kind: (
                    (not (kind in waiting and waiting[kind].is_alive()) and world.running(kind))
                    or broken
                    or any(thread.crash for thread in threads)
                ),
                f"{fault.kind} to kill",
                RECOVERY_S,
            )
            if broken or any(thread.crash for thread in threads):
                break
            say(f"fault {fault.number + 1}/{plan.faults}: {fault.kind} (waited {took:.1f} s for it to be there)")
            waiting[fault.kind] = _inject(world, fault, recovered, broken)
        for thread in waiting.values():
            thread.join(RECOVERY_S)
        for error in (*broken, *(thread.crash for thread in threads)):
            if error is not None:
                raise error
        kinds = ("teacher", "endpoints", "consumer", "updater", "zookeeper", "redis")
        until(lambda: all(world.running(kind) for kind in kinds), "the recovery of all", RECOVERY_S)
    finally:
        for thread in (poster, background[0]):
            thread.end()
    spool = Spool(world.root, TEACHER)
    drained = until(lambda: not list(spool.waiting()), "labels of all that was accepted", DRAIN_S)
    background[1].end()
    world.finish_jobs(DRAIN_S)
    for client in clients:
        before = len(client.replies)
        until(lambda client=client, before=before: len(client.replies) > before or client.crash, f"{client.name}'s end")
        client.end()
    back_after = {
        kind: {"count": len(times), "median_s": round(statistics.median(times), 1), "longest_s": round(max(times), 1)}
        for kind, times in sorted(recovered.items())
    }
    injected = sum(len(times) for times in recovered.values())
    return {"injected": injected, "drained_s": round(drained, 1), "back_after": back_after}


def _inject(
    world: World, fault: Fault, recovered: dict[str, list[float]], broken: list[BaseException]
) -> threading.Thread:
    """Kill; a thread waits until what was killed is back, and brings back what does not come back by itself."""
    begin = time.monotonic()
    if fault.kind in ("zookeeper", "redis", "updater", "labels"):
        getattr(world, fault.kind).kill()
    else:
        pids = world.pids(fault.kind)
        os.kill(pids[int(fault.pick * len(pids))], signal.SIGKILL)

    def wait() -> None:
        try:
            if fault.kind in ("zookeeper", "redis"):
                time.sleep(fault.down_s)
                getattr(world, fault.kind).start()
            elif fault.kind == "updater":
                world.updater.start()
            until(lambda: world.running(fault.kind), f"{fault.kind} to come back", RECOVERY_S)
            recovered[fault.kind].append(time.monotonic() - begin)
        except BaseException as error:
            broken.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread
