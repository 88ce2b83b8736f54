"""Work that only some nodes may run: refused where it would wait for ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_pipeline import small_pipeline

from rayfm.config import CapacityError
from rayfm.data.cluster import Node, cluster_nodes
from rayfm.pipeline.capacity import check_nodes, needs
from rayfm.pipeline.config import PipelineConfig

POOLS = {name: {"pool": name} for name in ("data", "training", "serving")}
CLUSTER = [Node({}, 4), Node({"pool": "data"}, 0.5), Node({"pool": "training"}, 2), Node({"pool": "serving"}, 0.25)]
"""Just what a small pipeline takes: its teacher's and its students' trainers, a service, Ray Data's tasks."""


def pooled(folder: Path, **changes: Any) -> PipelineConfig:
    ray = {"nodes": POOLS} | changes.pop("ray", {})
    training = {"cpus_per_worker": 1.5}
    return small_pipeline(folder, **{"ray": ray, "teachers": {"fm": {"training": training}}, **changes})


def test_each_part_has_the_labels_that_its_workers_get(tmp_path: Path) -> None:
    config = pooled(tmp_path, groups={"students": {"nodes": {"pool": "small"}}}, serving={"nodes": {"gpu": "L4"}})
    assert [need.nodes for need in needs(config)] == [
        {"pool": "training"}, {"gpu": "L4"}, {"pool": "small"}, {"pool": "data"}
    ]  # fmt: skip


def test_a_plan_that_fits_its_nodes(tmp_path: Path) -> None:
    check_nodes(pooled(tmp_path), CLUSTER)
    check_nodes(small_pipeline(tmp_path), [])


def test_labels_that_no_node_has_are_named(tmp_path: Path) -> None:
    without = [node for node in CLUSTER if node.labels.get("pool") != "training"]
    with pytest.raises(CapacityError, match=r"no node .* has \{pool: training\}, where trainer fm .*trainer students"):
        check_nodes(pooled(tmp_path), without)
    check_nodes(pooled(tmp_path, ray={"max_cpus": 8}), without)  # an autoscaler brings them


def test_parts_on_the_same_nodes_share_them(tmp_path: Path) -> None:
    small = [Node(node.labels, 1.75 if node.labels.get("pool") == "training" else node.cpus) for node in CLUSTER]
    with pytest.raises(CapacityError) as refused:
        check_nodes(pooled(tmp_path), small)
    said = str(refused.value)
    assert said.startswith(
        "the plan needs 2 CPUs at once on nodes with {pool: training}, and the 1 of them have 1.75: "
    )
    assert "1.5 trainer fm (1 x 1.5) + 0.5 trainer students (1 x 0.5); lower workers" in said


def test_gpus_are_counted_on_their_nodes(tmp_path: Path) -> None:
    config = pooled(tmp_path, serving={"gpus": 1})
    with pytest.raises(CapacityError, match=r"needs 1 GPUs at once on nodes with \{pool: serving\}"):
        check_nodes(config, [*CLUSTER, Node({"pool": "data"}, 4, gpus=1)])
    check_nodes(config, [*CLUSTER, Node({"pool": "serving"}, 4, gpus=1)])


@pytest.mark.ray
def test_rays_own_nodes(ray_session: None) -> None:
    (node,) = cluster_nodes()
    assert node.cpus == 4
    assert node.labels["ray.io/node-id"]
