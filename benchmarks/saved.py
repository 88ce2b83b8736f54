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
        "command": shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "load_at_start": load},
        **content,
    }
    path.write_text(json.dumps(whole, indent=1) + "\n")
    print(f"saved {path}")
    return path
