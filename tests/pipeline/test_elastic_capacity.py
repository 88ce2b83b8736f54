"""Elastic trainers beside what Ray Train does not see: replicas, and the room for Ray Data's tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as coordinator
from small_pipeline import small_pipeline

from rayfm.config import CapacityError
from rayfm.pipeline.capacity import check_capacity, elastic_trainers, needs
from rayfm.pipeline.config import PipelineConfig

FIXED = 0.25 + 0.5 + 0.5
"""CPUs of a small pipeline beside its teacher's trainer: service, students, Ray Data's tasks."""


def elastic(tmp_path: Path, workers: int = 1, most: int | None = 4, **changes: Any) -> PipelineConfig:
    training = {"workers": workers, "max_workers": most, "cpus_per_worker": 1}
    return small_pipeline(tmp_path, teachers={"fm": {"training": training}}, **changes)


def test_what_is_needed_at_most(tmp_path: Path) -> None:
    config = elastic(tmp_path, serving={"max_replicas": 3})
    least, most = ({need.part: need.cpus for need in needs(config, grown)} for grown in (False, True))
    assert (least["trainer fm (1 x 1)"], most["trainer fm (4 x 1)"]) == (1, 4)
    assert (least["service fm (1 x 0.25)"], most["service fm (3 x 0.25)"]) == (0.25, 0.75)
    assert list(elastic_trainers(config)) == ["fm"]
    assert not elastic_trainers(elastic(tmp_path, workers=4)), "it has no more to grow to"


def test_room_for_all_that_may_grow(tmp_path: Path) -> None:
    check_capacity(elastic(tmp_path), cpus=4 + FIXED)
    check_capacity(elastic(tmp_path, most=None), cpus=1 + FIXED)


def test_growing_over_replicas_is_refused_with_what_fits(tmp_path: Path) -> None:
    with pytest.raises(CapacityError) as refused:
        check_capacity(elastic(tmp_path), cpus=3.5 + FIXED)
    said = str(refused.value)
    assert said.startswith("grown as far as it may, the plan takes 5.25 CPUs and Ray has 4.75 at its largest: ")
    assert "4 trainer fm (4 x 1) + 0.25 service fm (1 x 0.25)" in said
    assert "would grow over it: lower max_workers of fm to 3, join a larger cluster, or say how large" in said
    assert "how large it grows (ray.max_cpus)" in said
    check_capacity(elastic(tmp_path, most=3), cpus=3.5 + FIXED)


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"workers": 2}, r"lower max_workers of fm \(no more than its 2 workers fit: leave it out\)"),
        ({"workers": 2, "serving": {"max_replicas": 9}}, r"take away what services may grow to \(max_replicas\)"),
    ],
)
def test_what_to_do_where_no_more_workers_fit(tmp_path: Path, changes: dict[str, Any], advice: str) -> None:
    with pytest.raises(CapacityError, match=advice):
        check_capacity(elastic(tmp_path, **changes), cpus=2.5 + FIXED)


def test_several_elastic_trainers_count_at_their_largest_together(tmp_path: Path) -> None:
    config = elastic(tmp_path, groups={"students": {"max_workers": 2}})
    with pytest.raises(CapacityError, match="lower max_workers of fm, students, join"):
        check_capacity(config, cpus=4 + FIXED)
    check_capacity(config, cpus=4.5 + FIXED)


def test_gpus_count_where_an_elastic_trainer_has_them(tmp_path: Path) -> None:
    training = {"workers": 1, "max_workers": 4, "gpus_per_worker": 1}
    config = small_pipeline(tmp_path, teachers={"fm": {"training": training}}, serving={"gpus": 1})
    check_capacity(config, cpus=16, gpus=5)
    with pytest.raises(CapacityError, match=r"takes 5 GPUs and Ray has 4 .*lower max_workers of fm to 3"):
        check_capacity(config, cpus=16, gpus=4)


@pytest.mark.parametrize(("cpus", "started"), [(6, 4), (4, 4)])
def test_what_ray_train_would_start_beside_replicas(cpus: int, started: int) -> None:
    """The reason for the check: what a replica (here 2 CPUs) holds is not taken from what a trainer is given."""
    nodes = [{"Alive": True, "NodeID": "n", "Resources": {"CPU": cpus}}]
    actor = coordinator._AutoscalingCoordinatorActor(
        get_current_time=lambda: 0.0, send_resources_request=lambda *_: None, get_cluster_nodes=lambda: nodes
    )
    actor.request_resources("train-fm", [{"CPU": 1}] * 4, expire_after_s=10.0)
    actor._tick()
    given = actor.get_reserved_resources("train-fm")
    assert sum(resources["CPU"] for resources in given.values()) == started
