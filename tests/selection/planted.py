"""A small world with planted features: Parquet logs of five days, impressions and considerations.

A click depends on ``liking`` and ``price``, and on ``shunned`` just as strongly. But the system that showed the
impressions knew of ``shunned``: it hardly ever shows an ad that has it, so that shuffling it changes little there; half
of the considerations have it. ``noise_id`` and ``noise`` say nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayfm.pipeline.config import PipelineConfig

DAYS = ("2024-01-01", "2024-01-02", "2024-01-03", "2024-01-04", "2024-01-05")
FIRST_DAY_US, DAY_US = 1_704_067_200_000_000, 86_400_000_000
PLANTED = ("liking", "price")
CONSIDERED = "shunned"
NOISE = ("noise", "noise_id")


def day(number: int, rows: int) -> pa.Table:
    """``rows`` impressions and as many considerations of a day."""
    rng = np.random.default_rng(number)
    shown = rng.permutation(np.repeat([True, False], rows))
    count = 2 * rows
    liking, price = rng.normal(size=count), rng.integers(0, 4, count)
    shunned = rng.random(count) < np.where(shown, 0.03, 0.5)
    logit = 1.2 * liking + 1.0 * (price - 1.5) - 2.5 * shunned - 0.5
    click = (rng.random(count) < 1 / (1 + np.exp(-logit))).astype(np.float32)
    start = FIRST_DAY_US + number * DAY_US
    return pa.table(
        {
            "example_id": np.arange(count) + number * 1_000_000,
            "time": np.sort(rng.integers(start, start + DAY_US, count)),
            "kind": np.where(shown, "impression", "consideration").tolist(),
            "liking": liking.astype(np.float32),
            "price": price,
            "shunned": shunned.astype(np.int64),
            "noise": rng.normal(size=count).astype(np.float32),
            "noise_id": rng.integers(0, 8, count),
            "click": pa.array(click, mask=~shown),
        }
    )


def mapping(folder: Path, rows: int = 1500) -> dict[str, Any]:
    """A pipeline over the logs, which are written below ``folder``."""
    log = folder / "log"
    log.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(DAYS):
        pq.write_table(day(number, rows), log / f"{name}.parquet")
    training = {"batch_size": 64, "tables": {"lr": 0.1}, "dense": {"lr": 0.01}, "reader": "arrow"}
    return {
        "name": "planted",
        "storage": str(folder / "data"),
        "runs": str(folder / "runs"),
        "data": {
            "source": {
                "type": "parquet",
                "path": str(log),
                "example_id": "example_id",
                "time": {"column": "time", "unit": "us"},
                "kind": {"column": "kind"},
            },
            "lanes": 4,
        },
        "schema": {
            "tables": {name: {"rows": 8, "ids": "modulo"} for name in ("price", "shunned", "noise_id")},
            "features": [
                {"name": "liking", "kind": "dense"},
                {"name": "price", "kind": "sparse"},
                {"name": "shunned", "kind": "sparse"},
                {"name": "noise", "kind": "dense"},
                {"name": "noise_id", "kind": "sparse"},
            ],
            "tasks": [{"name": "click"}],
            "traffics": ["all"],
        },
        "schedule": {"warmup": 4},
        "teachers": {"big": {"model": {"type": "dcnv2", "embedding_dim": 4, "hidden": [16]}, "training": training}},
        "groups": {"students": training},
        "students": {"vm": {"model": {"type": "fm", "embedding_dim": 4}}},
        "select": {
            "model": {"type": "deepfm", "embedding_dim": 4, "hidden": [8]},
            "batch_size": 64,
            "shuffles": 3,
            "top_k": 2,
        },
    }


def planted(folder: Path, rows: int = 1500, **select: Any) -> PipelineConfig:
    """The config, with keys of its ``select`` section changed."""
    config = mapping(folder, rows)
    return PipelineConfig.model_validate(config | {"select": config["select"] | select})
