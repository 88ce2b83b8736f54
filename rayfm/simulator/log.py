"""A simulated period as Arrow tables: impressions with labels, considerations without.

Shape letters: N rows of the log.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator

import numpy as np
import pyarrow as pa

from rayfm.data.sources.base import KIND_COLUMN, TRUTH_PREFIX
from rayfm.schema import EXAMPLE_ID, LOGGED_PREFIX, RESERVED_COLUMNS, TIME, TRAFFIC, Kind, Schema
from rayfm.simulator.config import SHOWN, STAGES, SimulatorConfig
from rayfm.simulator.features import check_schema
from rayfm.simulator.simulation import PeriodRecord, Simulation
from rayfm.simulator.world import Floats, Ints, stream


@dataclasses.dataclass
class _Rows:
    """N rows of the log: where each came from, and what each stage said of it."""

    request: Ints
    column: Ints
    reached: Ints
    """Position of the last stage that scored the row; the number of stages for an impression."""
    rank: Ints
    """Place in that stage's order, from 1."""
    weight: Floats

    def __getitem__(self, rows: Ints) -> _Rows:
        return _Rows(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))

    def in_time_order(self) -> _Rows:
        return self[np.lexsort((self.column, self.request))]


def _impressions(record: PeriodRecord) -> _Rows:
    count, width = record.outcome.shown.shape
    rows = count * width
    return _Rows(
        request=np.repeat(np.arange(count), width),
        column=record.outcome.shown.reshape(-1),
        reached=np.full(rows, len(record.outcome.stages)),
        rank=np.tile(np.arange(1, width + 1), count),
        weight=np.ones(rows, np.float32),
    )


def _considerations(record: PeriodRecord, config: SimulatorConfig) -> _Rows:
    rng = stream(config.seed, "log", record.number + config.bootstrap_periods)
    parts = []
    for place, stage in enumerate(STAGES):
        scored = record.outcome.stages[place].column
        first = record.outcome.passed(place).shape[1]
        share = float(getattr(config.consideration_share, stage))
        dropped = scored.shape[1] - first
        # One uniform number a dropped candidate would be memory for nothing where the share is small.
        total = len(scored) * dropped
        kept = np.sort(rng.choice(total, rng.binomial(total, share), replace=False)) if share and total else None
        if kept is None:
            continue
        request, place_in_stage = kept // dropped, first + kept % dropped
        parts.append(
            _Rows(
                request=request,
                column=scored[request, place_in_stage],
                reached=np.full(len(kept), place),
                rank=place_in_stage + 1,
                weight=np.full(len(kept), 1 / share, np.float32),
            )
        )
    if not parts:
        return _impressions(record)[np.zeros(0, np.int64)]
    fields = [field.name for field in dataclasses.fields(_Rows)]
    return _Rows(*(np.concatenate([getattr(part, name) for part in parts]) for name in fields)).in_time_order()


def _logged(record: PeriodRecord, rows: _Rows) -> dict[str, pa.Array]:
    """``logged/<stage>/click``: what each stage said of each row; null where it did not see the row."""
    columns = {}
    for place, stage in enumerate(STAGES):
        values = record.outcome.grid(place)[rows.request, rows.column]
        columns[f"{LOGGED_PREFIX}{stage}/click"] = pa.array(values, mask=np.isnan(values))
    return columns


def period_tables(simulation: Simulation, record: PeriodRecord, schema: Schema) -> Iterator[tuple[Kind, pa.Table]]:
    """The log of the period that ``simulation`` just stepped through: its impressions, then its considerations.

    Columns: the schema's ``arrow_schema()``, the reserved ones, ``logged/<stage>/click``, ``truth/<task>`` for the
    schema's tasks, ``kind``. Rows stand in the order of time; those of one request share its time.

    Raises:
        ValueError: the world has moved on since ``record``.
    """
    simulation.check_current(record)
    kinds: tuple[tuple[Kind, _Rows], ...] = (
        ("impression", _impressions(record)),
        ("consideration", _considerations(record, simulation.config)),
    )
    for kind, rows in kinds:
        yield kind, _table(simulation, record, schema, kind, rows)


def _table(simulation: Simulation, record: PeriodRecord, schema: Schema, kind: Kind, rows: _Rows) -> pa.Table:
    observation, config = record.observation, simulation.config
    requests = observation.requests
    ad = record.outcome.pool[rows.request, rows.column]
    truth = simulation.truth(observation, rows.request, ad)
    reached = pa.array([*STAGES, SHOWN])
    values: dict[str, pa.Array] = {
        EXAMPLE_ID: pa.array(_example_id(config, rows.request, rows.column)),
        TIME: pa.array(requests.time[rows.request]),
        TRAFFIC: observation.column("placement", rows.request, ad),
        "request_id": pa.array(record.number * config.requests_per_period + rows.request),
        "user_id": pa.array(requests.user[rows.request]),
        "stage_reached": reached.take(pa.array(rows.reached)),
        "rank": pa.array(rows.rank.astype(np.int32)),
        "campaign": observation.column("campaign", rows.request, ad),
        "sampling_weight": pa.array(rows.weight),
        KIND_COLUMN: pa.repeat(kind, len(ad)),
        **_logged(record, rows),
    }
    for task in schema.tasks:
        labels = pa.array(record.labels[task.name]) if kind == "impression" else pa.nulls(len(ad), pa.float32())
        values[task.name] = labels
        values[TRUTH_PREFIX + task.name] = pa.array(getattr(truth, task.name))
    for feature in schema.features:
        if feature.name not in values:
            values[feature.name] = observation.column(feature.name, rows.request, ad)
    return pa.Table.from_arrays([values[field.name] for field in log_schema(schema)], schema=log_schema(schema))


def candidate_rows(
    record: PeriodRecord, schema: Schema, features: Collection[str], request: Ints, column: Ints
) -> pa.Table:
    """Any candidates of a period's pools as the log would have them, whether or not it does.

    Args:
        record: of the period.
        schema: the pipeline's schema.
        features: those of the schema's that are wanted.
        request, column: ``[N]``, positions of requests and of candidates in their pools.

    Returns:
        N rows: example id, time, traffic and the features; no label, no prediction and nothing of the truth.
    """
    observation = record.observation
    ad = record.outcome.pool[request, column]
    values = {
        EXAMPLE_ID: pa.array(_example_id(observation.config, request, column)),
        TIME: pa.array(observation.requests.time[request]),
        TRAFFIC: observation.column("placement", request, ad),
    }
    fields = [field for field in schema.arrow_schema() if field.name in values or field.name in features]
    arrays = [
        values[field.name] if field.name in values else observation.column(field.name, request, ad) for field in fields
    ]
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


def _example_id(config: SimulatorConfig, request: Ints, column: Ints) -> Ints:
    return request * config.candidates + column


def log_schema(schema: Schema) -> pa.Schema:
    """Columns and types of every table of `tables`."""
    own = schema.arrow_schema()
    fields = [*own, *(pa.field(name, type_) for name, type_ in RESERVED_COLUMNS.items() if name not in own.names)]
    fields += [pa.field(f"{LOGGED_PREFIX}{stage}/click", pa.float32()) for stage in STAGES]
    fields += [pa.field(TRUTH_PREFIX + task.name, pa.float32()) for task in schema.tasks]
    return pa.schema([*fields, pa.field(KIND_COLUMN, pa.string())])


def tables(config: SimulatorConfig, schema: Schema, periods: int | None = None) -> Iterator[tuple[int, Kind, pa.Table]]:
    """The log of the first ``periods`` periods (by default all), without Ray: (number, kind, examples) in time order.

    Raises:
        ConfigError: the schema asks for what the simulator cannot log.
    """
    check_schema(config, schema)
    simulation = Simulation(config)
    for _ in range(config.bootstrap_periods + (config.periods if periods is None else periods)):
        record = simulation.step()
        if record.number >= 0:
            for kind, table in period_tables(simulation, record, schema):
                yield record.number, kind, table
