"""What a config names on this machine, and what becomes of it in a job."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rayfm.config import ConfigError
from rayfm.pipeline.config import PipelineConfig
from rayfm.submission.package import Package

KEPT = ("storage", "runs")
"""Folders that must outlive the job."""


def check_paths(config: PipelineConfig, package: Package) -> list[str]:
    """What is not sent although it is here: ``key=path`` of each, for a warning.

    Raises:
        ConfigError: a folder that must outlive the job would lie in the job's own; or a file or folder in the working
            directory is left out of the package, so that the job would not find it.
    """
    here = []
    for key, value in _strings(config.dump()):
        if key in KEPT:
            if not os.path.isabs(value):
                raise ConfigError(
                    f"{key}: {value!r} is relative, and would lie in the job's folder on the cluster, which goes with "
                    f"the job; name one that every node mounts: --set {key}=/mnt/shared/{Path(value).name}"
                )
        elif "://" in value or not _exists(package.folder / value):
            continue
        elif not os.path.isabs(value):
            if ("/" in value or key.endswith(".path")) and not package.holds(value):
                raise ConfigError(
                    f"{key}: {value} is left out of the package, so that the job would not find it; name a folder "
                    f"that every node mounts: --set {key}=/mnt/shared/{Path(value).name}"
                )
            continue
        if _exists(Path(value)) and value != "/":
            here.append(f"{key}={value}")
    return here


def left_out(config: PipelineConfig, folder: Path) -> list[Path]:
    """Folders of the working directory that runs write."""
    return [folder.resolve() / getattr(config, key) for key in KEPT]


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a text that is too long for a name, or no name at all
        return False


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value) of all texts in a config."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _strings(item, f"{key}.{name}" if key else str(name))
