"""The fixed case: Criteo-shaped examples in the example store's own layout.

13 dense and 26 sparse features, each sparse one with a table of 100,000 rows of width 16, one binary task. Ids are
skewed as in click logs; a tenth of the values of the first five dense features is missing.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rayfm.data.lanes import LaneWriter
from rayfm.data.store import ExampleStore, PeriodManifest
from rayfm.models.base import MODELS, ModelConfig
from rayfm.schema import Schema, mix64

DENSE, SPARSE = 13, 26
TABLE_ROWS, EMBEDDING_DIM = 100_000, 16
BATCH = 4096
LANES = 8
IDS = 1_000_000
BLOCK = 65_536
MISSING = 5
"""Dense features with missing values."""

DAY = datetime.timedelta(days=1)
START = datetime.datetime(2025, 1, 1, tzinfo=datetime.UTC)
PERIODS = {"2025-01-01": 131_072, "2025-01-02": 786_432}
"""Period -> rows: a short one and a long one."""
SHORT, LONG = PERIODS


def schema(sparse: int = SPARSE) -> Schema:
    """13 dense features, 26 sparse ones (or as many as said) with a table each, a click."""
    return Schema.model_validate(
        {
            "tables": {f"c{i}": {"rows": TABLE_ROWS} for i in range(sparse)},
            "features": [
                *({"name": f"i{i}", "kind": "dense", "transform": "log1p"} for i in range(DENSE)),
                *({"name": f"c{i}", "kind": "sparse"} for i in range(sparse)),
            ],
            "tasks": [{"name": "click"}],
        }
    )


def model_config(name: str) -> ModelConfig:
    """The fixed case's DLRM or DCNv2, with the default widths of their layers."""
    config: ModelConfig = MODELS[name].Config.model_validate({"type": name, "embedding_dim": EMBEDDING_DIM})
    return config


def block(rows: int, first: int, start_us: int, step_us: int, seed: int, sparse: int = SPARSE) -> pa.Table:
    """``rows`` examples from row ``first`` of a period on, in time order."""
    rng = np.random.default_rng((seed, first))
    columns: dict[str, Any] = {
        "example_id": pa.array(np.arange(first, first + rows)),
        "time": pa.array(start_us + step_us * np.arange(first, first + rows)),
        "traffic": pa.array(["all"]).take(pa.array(np.zeros(rows, np.int64))),
    }
    for feature in range(DENSE):
        values = rng.exponential(20.0, rows).astype(np.float32)
        mask = rng.random(rows) < 0.1 if feature < MISSING else None
        columns[f"i{feature}"] = pa.array(values, mask=mask)
    for feature in range(sparse):
        # A power of a uniform number: few ids are frequent, most are rare; scrambled, so that ids say nothing.
        skewed = (rng.random(rows) ** 4 * IDS).astype(np.int64)
        columns[f"c{feature}"] = pa.array((mix64(skewed, feature) >> np.uint64(1)).view(np.int64))
    columns["click"] = pa.array((rng.random(rows) < 0.25).astype(np.float32))
    return pa.table(columns)


def write_store(
    root: Path, periods: dict[str, int] = PERIODS, lanes: int = LANES, sparse: int = SPARSE
) -> ExampleStore:
    """Write the periods as `prepare` does: the same lanes, row groups and compression."""
    store = ExampleStore(root)
    for position, (period, rows) in enumerate(periods.items()):
        start = START + position * DAY
        step_us = int(DAY / datetime.timedelta(microseconds=1)) // rows
        sample = block(1, 0, 0, 0, 0, sparse)
        writer = LaneWriter(store, period, "impression", lanes, schema(sparse), sample.schema)
        start_us = round(start.timestamp() * 1e6)
        for first in range(0, rows, BLOCK):
            writer.write(block(min(BLOCK, rows - first), first, start_us, step_us, seed=position, sparse=sparse))
        store.commit(
            PeriodManifest(
                period=period,
                start=start.isoformat(),
                end=(start + DAY).isoformat(),
                lanes=lanes,
                files=tuple(writer.close()),
                columns={field.name: str(field.type) for field in sample.schema},
                source="benchmarks",
            )
        )
    return store


def describe() -> dict[str, Any]:
    """The case, for result files."""
    return {"dense": DENSE, "sparse": SPARSE, "table": [TABLE_ROWS, EMBEDDING_DIM], "batch": BATCH}
