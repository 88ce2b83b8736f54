"""How far a trainer is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rayfm.data.store import write_json_atomic
from rayfm.training.spec import TrainerSpec


class ProgressFile:
    """How far a trainer is, in a small file that whoever watches the run may read at any time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, period: str, step: int, steps: int, phase: str) -> None:
        write_json_atomic(self.path, {"period": period, "step": step, "steps": steps, "phase": phase})

    def read(self) -> dict[str, Any] | None:
        """The last report; None before the first."""
        try:
            value: dict[str, Any] = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return None
        return value


def progress_file(spec: TrainerSpec) -> ProgressFile:
    """Where a trainer reports its progress."""
    return ProgressFile(spec.folder / "progress.json")
