"""A whole pipeline small enough for a test: the simulator's smallest world, a teacher, two students."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def small_pipeline(folder: Path, **changes: Any) -> dict[str, Any]:
    """The demo's config, cut down: 4 periods of a small world, FM and two-tower, three variants."""
    config: dict[str, Any] = yaml.safe_load((EXAMPLES / "demo.yaml").read_text())
    config["name"] = "small"
    config["storage"], config["runs"] = str(folder / "data"), str(folder / "runs")
    config["data"] = {
        "source": {"type": "simulator", "seed": 3, "periods": 4, "requests_per_period": 400},
        "lanes": 4,
    }
    config["schedule"] = {"warmup": 2}
    config["teachers"]["teacher"]["model"] = {"type": "dcnv2", "embedding_dim": 8, "low_rank": 16, "hidden": [32]}
    training = {"batch_size": 64, "predict_batch_size": 1024, "checkpoint_every": 7}
    config["teachers"]["teacher"]["training"] = {**training, "reader": "ray_data"}
    config["groups"] = {"students": training}
    del config["students"]["dlrm"]
    for student in config["students"].values():
        student["labels"] = {"wait": 120}
        student["variants"] = {name: student["variants"][name] for name in ("none", "direct", "aux_adapter")}
    config["students"]["two_tower"]["model"] |= {"hidden": [16], "vector_dim": 8, "embedding_dim": 8}
    config["students"]["fm"]["model"]["embedding_dim"] = 8
    config["evaluation"] = {"replicates": 20, "consideration_share": 0.5}
    config["ray"] = {"cpus": 2}
    for key, value in changes.items():
        config[key] = value
    return config


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    path = folder / f"{config['name']}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def metric_lines(run_dir: Path) -> dict[tuple[Any, ...], float | None]:
    """A run's metrics: (period, model, variant, seed, traffic, kind, task, metric) -> value."""
    found: dict[tuple[Any, ...], float | None] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        key = tuple(row[name] for name in ("period", "model", "variant", "seed", "traffic", "kind", "task", "metric"))
        assert key not in found, f"{key} stands twice"
        found[key] = row["value"]
    return found
