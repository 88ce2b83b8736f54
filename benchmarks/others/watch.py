"""CPU-seconds of a program's phases, with those of all processes below it, read from outside.

A program says ``start NAME``, ``stop NAME UNITS`` and ``result JSON`` (phases.py).
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import psutil

SAMPLE_S = 0.5
"""A process that ends is missed for at most so long."""


@dataclasses.dataclass
class Phase:
    """What a phase took for so many units."""

    units: float
    wall: float
    cpu: float
    """Of the program and of everything below it, Ray's processes among them."""
    own: float
    """Of the program's first process alone."""

    @property
    def rate(self) -> float:
        """Units a CPU-second."""
        return self.units / max(self.cpu, 1e-9)


class Tree:
    """CPU-seconds of a process and of all that ever were below it, those that ended included as far as they were seen.

    Args:
        pid: the first process.
    """

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._seen: dict[tuple[int, float], float] = {}

    def sample(self) -> tuple[float, float]:
        """Seconds of all, and of the first one, so far."""
        try:
            found = [self._root, *self._root.children(recursive=True)]
        except psutil.NoSuchProcess:
            found = []
        for process in found:
            try:
                times = process.cpu_times()
                self._seen[process.pid, process.create_time()] = times.user + times.system
            except psutil.NoSuchProcess:
                continue
        own = next((seconds for (pid, _), seconds in self._seen.items() if pid == self._root.pid), 0.0)
        return sum(self._seen.values()), own


def watch(command: list[str], folder: Path, log: Path, environment: dict[str, str]) -> tuple[dict[str, Phase], Any]:
    """Run a program to its end. Returns its phases and its result.

    Raises:
        RuntimeError: it failed; with the last line that it wrote to ``log``.
    """
    lines: queue.Queue[str | None] = queue.Queue()
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        assert process.stdout is not None
        out = process.stdout

        def read() -> None:
            for line in out:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        phases, result = _gather(lines, Tree(process.pid))
    if process.wait():
        said = [line for line in log.read_text().splitlines() if line.strip()]
        raise RuntimeError(f"{' '.join(command[:4])} ...: {said[-1] if said else 'it failed'} (see {log})")
    return phases, result


def _gather(lines: queue.Queue[str | None], tree: Any) -> tuple[dict[str, Phase], Any]:
    """Follow the lines up to None."""
    begun: dict[str, tuple[float, float, float]] = {}
    phases: dict[str, Phase] = {}
    result = None
    while True:
        try:
            line = lines.get(timeout=SAMPLE_S)
        except queue.Empty:
            tree.sample()
            continue
        if line is None:
            return phases, result
        words = line.split(maxsplit=2)
        if not words or words[0] != "@":
            continue
        cpu, own = tree.sample()
        now = time.perf_counter()
        if words[1] == "start":
            begun[words[2].strip()] = now, cpu, own
        elif words[1] == "stop":
            name, units = words[2].split()
            since, cpu_before, own_before = begun.pop(name)
            phases[name] = Phase(float(units), now - since, cpu - cpu_before, own - own_before)
        else:
            result = json.loads(words[2])
