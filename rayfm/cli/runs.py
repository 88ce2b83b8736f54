"""A run's folder as a command's argument."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, e.g. runs/demo.", show_default=False)]


def standing(run_dir: Path) -> Path:
    """``run_dir`` if it is there. Raises ConfigError where it is not."""
    from rayfm.config import ConfigError

    if not run_dir.is_dir():
        raise ConfigError(f"{run_dir} is not a run's folder; name one, e.g. runs/demo")
    return run_dir
