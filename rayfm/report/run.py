"""A run directory as plain values: what its tables and figures are made of."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeAlias

from rayfm.config import DataError

Row: TypeAlias = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """The content of a run directory. What the run has not written yet is empty."""

    name: str
    config: str
    """The resolved configuration, YAML."""
    summary: Row
    """``summary.json``, see ``rayfm.metrics.summarise``."""
    metrics: list[Row]
    """Lines of ``metrics.jsonl``; of lines for the same thing the last one (a resumed run repeats some)."""
    progress: list[Row]
    """Lines of ``progress.jsonl``, in order."""
    alerts: list[Row] = dataclasses.field(default_factory=list)
    """Lines of ``alerts.jsonl``, in order."""

    def events(self, kind: str, *key: str) -> list[Row]:
        """Events of one kind in order of their period; of those with equal ``key`` fields the last one."""
        found = {tuple(event.get(name) for name in key): event for event in self.progress if event.get("event") == kind}
        return sorted(found.values(), key=lambda event: str(event.get("period", "")))

    @classmethod
    def read(cls, run_dir: str | Path) -> Run:
        """Read ``config.yaml``, ``summary.json``, ``metrics.jsonl`` and ``progress.jsonl``, as far as they are there.

        Raises:
            DataError: no such directory, none of the files in it, or one that is not what it should be.
        """
        folder = Path(run_dir)
        names = ("config.yaml", "summary.json", "metrics.jsonl", "progress.jsonl")
        if not any((folder / name).exists() for name in names):
            raise DataError(f"{folder}: not a run directory (none of {', '.join(names)}); name one below runs/")
        summary_path = folder / "summary.json"
        try:
            summary = json.loads(summary_path.read_text()) if summary_path.exists() else {}
        except ValueError as error:
            raise DataError(f"{summary_path}: not valid JSON ({error}); evaluate the run again") from None
        if not isinstance(summary, dict):
            raise DataError(
                f"{summary_path}: expected an object, found {type(summary).__name__}; evaluate the run again"
            )
        metrics = _json_lines(folder / "metrics.jsonl")
        identity = ("period", "model", "variant", "seed", "traffic", "kind", "task", "metric")
        last = {tuple(line.get(name) for name in identity): line for line in metrics}
        config = folder / "config.yaml"
        return cls(
            name=folder.resolve().name,
            config=config.read_text() if config.exists() else "",
            summary=summary,
            metrics=list(last.values()),
            progress=_json_lines(folder / "progress.jsonl"),
            alerts=_json_lines(folder / "alerts.jsonl"),
        )


def _json_lines(path: Path) -> list[Row]:
    """The objects in a file, one a line. A last line cut off in mid-write (a killed run) is left out."""
    if not path.exists():
        return []
    rows: list[Row] = []
    text = path.read_text()
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines) and not text.endswith("\n"):
                break
            raise DataError(f"{path} line {number}: not valid JSON ({error}); remove the line") from None
        if not isinstance(row, dict):
            raise DataError(f"{path} line {number}: expected an object; remove the line")
        rows.append(row)
    return rows
