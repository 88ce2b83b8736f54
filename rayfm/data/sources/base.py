"""What a source is: raw logs as Arrow blocks of examples."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from rayfm.config import Config, Registry
from rayfm.schema import Schema

if TYPE_CHECKING:
    import ray.data

SOURCES = Registry("source", "rayfm.data.sources", "rayfm.simulator")

TRUTH_PREFIX = "truth/"
"""``truth/<task>``: the true probability, which only a simulator knows. Stored apart, read by evaluation alone."""

KIND_COLUMN = "kind"


class Period(Config):
    """One unit of the stream: ``[start, end)`` in UTC."""

    name: str
    start: datetime.datetime
    end: datetime.datetime

    @property
    def start_us(self) -> int:
        return round(self.start.timestamp() * 1e6)

    @property
    def end_us(self) -> int:
        return round(self.end.timestamp() * 1e6)


class SourceConfig(Config):
    """What every source's config has; a source's own ``Config`` adds ``type: Literal[...]`` and where the logs are."""


def task_numbers(count: int) -> ray.data.Dataset:
    """A block for each of ``count`` tasks, of one row: its number, ``id``.

    Not ``ray.data.range``: it has tasks of its own, which ask for a whole CPU each (so that Ray Data does not fuse them
    with ones that ask for less), and that may not be free beside trainers.
    """
    import ray.data

    numbers = [{"id": number} for number in range(count)]
    dataset: ray.data.Dataset = ray.data.from_items(numbers, override_num_blocks=count)
    return dataset


class Source:
    """Base of the sources. A subclass registers itself with ``@SOURCES.register(name)`` and nests a ``Config``."""

    has_requests: ClassVar[bool | None] = None
    """Whether its examples have a ``request_id``; None where the logs decide."""

    cpus_per_task: float = 1.0
    """CPUs that each task of `dataset` asks of Ray; `prepare` sets it to its own, so that Ray Data fuses the two."""

    scratch: Path | None = None
    """Where the tasks of `dataset` may leave files for one another, for as long as the dataset is read; `prepare` gives
    a folder on the example store's disk, and removes it. None: a new folder for temporary files of this machine."""

    def __init__(self, config: SourceConfig, schema: Schema) -> None:
        self.config, self.schema = config, schema

    def periods(self) -> list[Period]:
        """The periods that the source has, in time order.

        Raises:
            DataError: the logs are missing or unreadable.
        """
        raise NotImplementedError

    def dataset(self, periods: list[Period]) -> ray.data.Dataset:
        """The examples of ``periods`` as a streaming dataset of Arrow blocks, in any order.

        Columns: the schema's ``arrow_schema()``; ``kind`` (string, ``impression`` or ``consideration``); any reserved
        or ``logged/`` column; ``truth/<task>`` where known. Rows need not be valid: ``prepare`` checks each one.
        The same config gives the same rows on every call.
        """
        raise NotImplementedError

    def estimated_rows(self) -> int:
        """About how many examples all periods have, for the disk check and the progress; 0 where unknown."""
        return 0
