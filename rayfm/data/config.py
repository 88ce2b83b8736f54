"""The data part of a pipeline's configuration."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rayfm.config import Config
from rayfm.data.sources.base import SOURCES


class DataConfig(Config):
    """Where the examples come from and how they are laid out."""

    source: Annotated[Config, SOURCES]
    """The raw logs: a source by its ``type``."""

    lanes: int = Field(8, gt=0, le=1024)
    """Time-sorted slices of a period, the unit that workers own; a batch size is a multiple of it."""

    cpus_per_task: float = Field(0.25, gt=0)
    """CPUs that each of prepare's Ray tasks asks for."""
