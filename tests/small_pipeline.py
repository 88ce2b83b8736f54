"""A small pipeline config over a Parquet log of three days, for tests of the pipeline and the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml
from example_store import DAY_US, every_feature_rows, every_feature_schema

from rayfm.pipeline.config import PipelineConfig

PERIODS = ("2024-01-01", "2024-01-02", "2024-01-03")
FIRST_DAY_US = 1_704_067_200_000_000
"""2024-01-01T00:00Z."""


def write_log(folder: Path, rows: int = 40) -> Path:
    """A log of a file a day; every column has the schema's name."""
    folder.mkdir(parents=True, exist_ok=True)
    for day, period in enumerate(PERIODS):
        table = every_feature_rows(rows, seed=day + 1, start=FIRST_DAY_US + day * DAY_US)
        pq.write_table(table, folder / f"{period}.parquet")
    return folder


def mapping(folder: Path) -> dict[str, Any]:
    """What the YAML file of the pipeline holds; its log, store and runs lie below ``folder``."""
    return {
        "name": "small",
        "storage": str(folder / "data"),
        "runs": str(folder / "runs"),
        "data": {
            "source": {
                "type": "parquet",
                "path": str(folder / "log"),
                "example_id": "example_id",
                "time": {"column": "time", "unit": "us"},
                "traffic": {"column": "traffic"},
            },
            "lanes": 4,
        },
        "schema": every_feature_schema().dump(),
        "schedule": {"warmup": 1},
        "teachers": {
            "fm": {
                "model": {"type": "dcnv2", "embedding_dim": 8, "hidden": [8]},
                "training": {"batch_size": 16, "predict_batch_size": 64, "reader": "arrow"},
            }
        },
        "groups": {"students": {"batch_size": 16, "predict_batch_size": 64}},
        "students": {
            "vm": {
                "tasks": ["click"],
                "model": {"type": "fm", "features": ["user", "ad"], "embedding_dim": 4},
                "variants": {"none": [], "direct": [{"type": "direct", "teacher": "fm"}]},
            }
        },
        "evaluation": {"replicates": 10},
    }


def merged(base: Any, changes: Any) -> Any:
    """``base`` with the keys of ``changes`` in place; mappings are merged."""
    if not isinstance(base, dict) or not isinstance(changes, dict):
        return changes
    return {key: merged(base.get(key), changes[key]) if key in changes else base[key] for key in {**base, **changes}}


def small_pipeline(folder: Path, **changes: Any) -> PipelineConfig:
    """The config, with the log that it names."""
    if not (folder / "log").exists():
        write_log(folder / "log")
    return PipelineConfig.model_validate(merged(mapping(folder), changes))


def write_config(folder: Path, **changes: Any) -> Path:
    """The config as a YAML file, with the log that it names."""
    small_pipeline(folder)
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(merged(mapping(folder), changes), sort_keys=False))
    return path
