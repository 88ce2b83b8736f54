"""Dated files of what a benchmark found, under ``benchmarks/results/``."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16")
"""Of a processor, by Linux's names, those on which it hangs how fast matrices are multiplied."""


def command(name: str, arguments: list[str]) -> str:
    """What was called; of absolute paths, which are one machine's own, the last part."""
    plain = [Path(argument).name if argument.startswith("/") else argument for argument in arguments]
    return shlex.join(["python", "-m", f"benchmarks.{name}", *plain])


def machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, Any]:
    """The processor, as far as it says."""
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    said: dict[str, str] = {}  # of the first processor
    for line in text.splitlines():
        key, _, value = line.partition(":")
        said.setdefault(key.strip(), value.strip())
    known = set((said.get("flags") or said.get("Features") or "").split())
    return {
        "processor": platform.machine(),
        "model": said.get("model name", ""),
        "flags": [flag for flag in FLAGS if flag in known],
        "cores": os.cpu_count(),
    }


def save(name: str, content: dict[str, Any], load: float | None = None) -> Path:
    """Write what ``benchmarks.<name>`` found with date, command and machine, and say where. Returns the file.

    Args:
        name: of the module.
        content: what was found.
        load: the machine's load average when it started.
    """
    now = datetime.datetime.now(datetime.UTC)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{now:%Y-%m-%dT%H%M}-{name}.json"
    whole = {
        "date": f"{now:%Y-%m-%dT%H:%M:%SZ}",
        "command": command(name, sys.argv[1:]),
        "machine": {**machine(), "load_at_start": load},
        **content,
    }
    path.write_text(json.dumps(whole, indent=1) + "\n")
    print(f"saved {path}")
    return path
