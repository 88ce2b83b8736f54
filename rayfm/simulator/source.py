"""The source ``simulator``: the log of a simulated ads cascade."""

from __future__ import annotations

import datetime
import functools
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pyarrow as pa

from rayfm.config import DataError
from rayfm.data.sources.base import SOURCES, Period, Source
from rayfm.data.store import period_name
from rayfm.schema import Schema
from rayfm.simulator.config import SimulatorConfig
from rayfm.simulator.features import check_schema
from rayfm.simulator.log import tables
from rayfm.simulator.requests import period_start

if TYPE_CHECKING:
    import ray.data


@SOURCES.register("simulator")
class SimulatorSource(Source):
    """Examples of a simulated cascade.

    Raises:
        ConfigError: the schema has a feature, a task or no traffic that this world has.
    """

    Config = SimulatorConfig
    has_requests = True

    def __init__(self, config: SimulatorConfig, schema: Schema) -> None:
        super().__init__(config, schema)
        self._simulator = config
        check_schema(config, schema)

    def periods(self) -> list[Period]:
        config = self._simulator
        length = datetime.timedelta(hours=config.period_hours)
        starts = [period_start(config, number) for number in range(config.periods)]
        return [Period(name=period_name(start, length), start=start, end=start + length) for start in starts]

    def estimated_rows(self) -> int:
        config = self._simulator
        edges = (config.candidates, config.widths.retrieval, config.widths.early, config.widths.ranking)
        share = config.consideration_share
        dropped = [before - after for before, after in itertools.pairwise(edges)]
        kept = sum(
            part * rows for part, rows in zip((share.retrieval, share.early, share.ranking), dropped, strict=True)
        )
        return round(config.periods * config.requests_per_period * (config.widths.ranking + kept))

    def dataset(self, periods: list[Period]) -> ray.data.Dataset:
        """One task: the models of a period come from the periods before, so all up to the last one are simulated.

        Raises:
            DataError: a period that this world does not have.
        """
        import ray.data

        known = [period.name for period in self.periods()]
        strange = next((period.name for period in periods if period.name not in known), None)
        if strange is not None:
            raise DataError(f"the simulator has no period {strange}; it has {known[0]} to {known[-1]}")
        numbers = frozenset(known.index(period.name) for period in periods)
        generate = functools.partial(_generate, config=self._simulator, schema=self.schema, numbers=numbers)
        return ray.data.from_items([{"seed": self._simulator.seed}]).map_batches(
            generate, batch_size=None, batch_format="pyarrow", num_cpus=self.cpus_per_task
        )


def _generate(batch: pa.Table, config: SimulatorConfig, schema: Schema, numbers: frozenset[int]) -> Iterator[pa.Table]:
    """A block for each (period, kind); ``batch`` is the one row that starts the task."""
    if batch.num_rows:
        for number, _, table in tables(config, schema, periods=max(numbers, default=-1) + 1):
            if number in numbers:
                yield table
