"""Going on with a search or a selection that was broken off: only with what it was started with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml

from rayfm.config import ConfigError
from rayfm.config.durable import write_whole


def take_up(saved: Path, mine: dict[str, Any], what: str, hint: str, *, resume: bool, overwrite: bool) -> bool:
    """Whether work that was started before is in ``saved``'s folder and to be gone on with; with ``overwrite`` the
    folder is removed. What is new is written by `write_down`.

    Args:
        saved: the file, in the work's folder, that says what it was started with.
        mine: what must not have changed.
        what: for messages, as ``search``.
        hint: for messages, what to resume with.
        resume, overwrite: what was asked for.

    Raises:
        ConfigError: it stands and neither is asked for, or it was started with something else.
    """
    if not saved.exists():
        return False
    if overwrite:
        shutil.rmtree(saved.parent)
        return False
    if not resume:
        raise ConfigError(f"{saved.parent} holds a {what}; --resume goes on with it, --overwrite starts anew")
    before = yaml.safe_load(saved.read_text())
    for key, value in mine.items():
        if before.get(key) != value:
            raise ConfigError(f"{saved}: {key!r} differs from the {what} asked for; resume with {hint}, or --overwrite")
    return True


def write_down(saved: Path, mine: dict[str, Any]) -> None:
    """Write what the work is started with."""
    text = yaml.safe_dump(mine, sort_keys=False, width=120).encode()
    write_whole(saved, lambda file: file.write(text))
