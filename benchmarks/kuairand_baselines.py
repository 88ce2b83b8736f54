"""Undistilled DCNv2, DeepFM and FM on KuaiRand under the protocol of examples/kuairand.yaml, three seeds.

``python -m benchmarks.kuairand_baselines FOLDER [RUNS]``: FOLDER holds the official files; the run goes below RUNS.
The models read the 38 categorical features alone and predict clicks, as public benchmarks of these models do.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rayfm.cli.display import Display, print_summary
from rayfm.config import read_yaml, validate
from rayfm.pipeline.config import PipelineConfig
from rayfm.pipeline.stream import run

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "kuairand.yaml"


def baselines(data: str, runs: str) -> PipelineConfig:
    """The example's config with three undistilled students and no teacher."""
    mapping: dict[str, Any] = read_yaml(EXAMPLE)
    mapping["name"] = "kuairand-baselines"
    mapping["seeds"] = [1, 2, 3]
    mapping["data"]["source"]["path"] = data
    mapping["storage"], mapping["runs"] = f"{runs}/data/kuairand", runs
    fm = mapping["students"]["fm"]
    mapping["teachers"] = {}
    mapping["students"] = {
        name: {
            "tasks": ["click"],
            "model": {"type": name, "features": fm["model"]["features"]},
            "variants": {"none": []},
        }
        for name in ("dcnv2", "deepfm", "fm")
    }
    return validate(PipelineConfig, mapping, str(EXAMPLE))


def main(data: str, runs: str = "runs") -> None:
    """Run and print the table."""
    config = baselines(data, runs)
    with Display(config) as display:
        result = run(config, overwrite=True, watch=display.update)
    for row in result.summary["metrics"]:
        if row["task"] == "click" and row["metric"] in ("ne", "auc_daily"):
            print(f"{row['model']:<8} {row['metric']:<10} {row['value']:.4f} [{row['lo']:.4f}, {row['hi']:.4f}]")
    print_summary(result.summary, result.seconds, result.report)


if __name__ == "__main__":
    main(*sys.argv[1:])
