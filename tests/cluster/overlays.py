"""The rendered overlays of cluster/kubernetes, and what tests read of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kustomized
import yaml

from rayfm.pipeline.config import PipelineConfig, load_config

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
KUBERNETES = CLUSTER / "kubernetes"
OVERLAYS = ("dev", "prod")
RAY_UP = ("aws", "gcp")
Object = dict[str, Any]


def config_of(objects: list[Object], folder: Path) -> PipelineConfig:
    """The pipeline's config as a pod of the overlay sees it."""
    for name, text in kustomized.select(objects, "ConfigMap", "rayfm-pipeline")["data"].items():
        (folder / name).write_text(text)
    return load_config(folder / "pipeline.yaml", [f"@{folder / 'overrides.yaml'}"])


def clusters(objects: list[Object]) -> dict[str, Object]:
    """Part -> spec of a Ray cluster."""
    specs = [
        kustomized.select(objects, "RayCluster", "rayfm")["spec"],
        kustomized.select(objects, "RayJob", "rayfm-stream")["spec"]["rayClusterSpec"],
        kustomized.select(objects, "RayCronJob", "rayfm-batch")["spec"]["jobTemplate"]["rayClusterSpec"],
        kustomized.select(objects, "RayService", "rayfm")["spec"]["rayClusterConfig"],
    ]
    return dict(zip(("cluster", "stream", "batch", "serve"), specs, strict=True))


def templates(spec: Object) -> list[Object]:
    """Pod templates of a Ray cluster, the head's first."""
    return [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]


def serve_config(objects: list[Object]) -> Object:
    found: Object = yaml.safe_load(kustomized.select(objects, "RayService", "rayfm")["spec"]["serveConfigV2"])
    return found


def walk(node: Any) -> Iterator[Object]:
    """Every mapping within."""
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from walk(value)
    elif isinstance(node, list):
        for item in node:
            yield from walk(item)


def ports_of(policy: Object) -> set[int]:
    return {port["port"] for rule in policy["spec"].get("ingress", []) for port in rule.get("ports", [])}


def ray_up(name: str) -> Object:
    found: Object = yaml.safe_load((CLUSTER / "ray-up" / f"{name}.yaml").read_text())
    return found


def job_files() -> list[Path]:
    return sorted((KUBERNETES / "jobs").glob("*.yaml"))


def entrypoints(objects: list[Object]) -> list[str]:
    return [one["entrypoint"] for one in walk(objects) if "entrypoint" in one]
