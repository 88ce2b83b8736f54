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


def save(name: str, content: dict[str, Any]) -> Path:
    """Write ``content`` with date, command and machine. Returns the file."""
    from benchmarks.data import describe

    now = datetime.datetime.now(datetime.UTC)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{now:%Y-%m-%dT%H%M}-{name}.json"
    whole = {
        "date": f"{now:%Y-%m-%dT%H:%M:%SZ}",
        "command": shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
        "case": json.loads(describe()),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        **content,
    }
    path.write_text(json.dumps(whole, indent=1) + "\n")
    return path
