"""Timing two pieces of work in turns: the same machine, the same minute, the same data."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable

import psutil


@dataclasses.dataclass
class Spent:
    """What a piece of work took for so many units (rows, steps)."""

    units: float
    wall: float
    cpu: float


@dataclasses.dataclass
class Outcome:
    """One line of the table. ``ratio`` is the quotient that the bar is for; ``cpu`` the same in CPU-seconds."""

    ratio: float
    cpu: float
    ours: str
    """Median rate or time of rayfm, for people."""
    theirs: str
    spread: tuple[float, float]
    """Smallest and largest of the repeats' ratios."""


def cpu_seconds(children: bool = False) -> float:
    """CPU-seconds of this process so far, with ``children`` also those of all processes below it that live."""
    process = psutil.Process()
    found = [process, *(process.children(recursive=True) if children else [])]
    total = 0.0
    for one in found:
        try:
            times = one.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def timed(work: Callable[[], float], children: bool = False) -> Spent:
    """Run ``work``, which returns how many units it did."""
    cpu, wall = cpu_seconds(children), time.perf_counter()
    units = work()
    return Spent(units, time.perf_counter() - wall, cpu_seconds(children) - cpu)


def in_turns(ours: Callable[[], Spent], theirs: Callable[[], Spent], repeats: int) -> list[tuple[Spent, Spent]]:
    """``repeats`` pairs, the order changing from one pair to the next; one pair before them is not counted."""
    ours()
    theirs()
    pairs = []
    for repeat in range(repeats):
        if repeat % 2:
            second = theirs()
            pairs.append((ours(), second))
        else:
            first = ours()
            pairs.append((first, theirs()))
    return pairs


def rates(pairs: list[tuple[Spent, Spent]], unit: str) -> Outcome:
    """Our units a second over theirs; the median of the pairs."""
    wall = [(a.units / a.wall) / (b.units / b.wall) for a, b in pairs]
    cpu = [(a.units / max(a.cpu, 1e-9)) / (b.units / max(b.cpu, 1e-9)) for a, b in pairs]
    shown = [statistics.median(side.units / side.wall for side in sides) for sides in zip(*pairs, strict=True)]
    return Outcome(
        statistics.median(wall),
        statistics.median(cpu),
        f"{shown[0]:,.0f} {unit}/s",
        f"{shown[1]:,.0f} {unit}/s",
        (min(wall), max(wall)),
    )


def times(pairs: list[tuple[Spent, Spent]], unit: str) -> Outcome:
    """Our time a unit over theirs; the median of the pairs."""
    wall = [(a.wall / a.units) / (b.wall / b.units) for a, b in pairs]
    cpu = [(a.cpu / a.units) / max(b.cpu / b.units, 1e-12) for a, b in pairs]
    shown = [statistics.median(side.wall / side.units for side in sides) for sides in zip(*pairs, strict=True)]
    return Outcome(
        statistics.median(wall),
        statistics.median(cpu),
        f"{1e3 * shown[0]:.1f} ms/{unit}",
        f"{1e3 * shown[1]:.1f} ms/{unit}",
        (min(wall), max(wall)),
    )


def report(outcome: Outcome) -> None:
    """Hand the outcome to `benchmarks.run`: the last line of the output."""
    print(json.dumps(dataclasses.asdict(outcome)))
