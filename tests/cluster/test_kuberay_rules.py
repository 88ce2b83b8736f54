"""What KubeRay itself refuses, beyond the schemas (its `ValidateRayClusterSpec`, `ValidateRayJobSpec` and the like)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import kustomized
import pytest

KUBERNETES = Path(__file__).resolve().parents[2] / "cluster" / "kubernetes"
LABEL = re.compile(r"([a-z0-9.-]+/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
RESOURCES = {"num-cpus", "num-gpus", "memory", "resources"}
LONGEST = {"RayCluster": 53, "RayJob": 47, "RayService": 47, "RayCronJob": 36}


@pytest.fixture(params=["dev", "prod"], scope="module")
def objects(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    rendered = kustomized.render(KUBERNETES / "overlays" / request.param)
    return [one for one in rendered if one["apiVersion"] == "ray.io/v1"]


def specs(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for one in objects:
        spec = one["spec"].get("jobTemplate", one["spec"])
        found.append(spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec)
    return found


def test_names_leave_room_for_what_kuberay_adds(objects: list[dict[str, Any]]):
    assert {one["kind"] for one in objects} == LONGEST.keys()
    for one in objects:
        name = one["metadata"]["name"]
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
        assert len(name) <= LONGEST[one["kind"]]


def test_groups(objects: list[dict[str, Any]]):
    for spec in specs(objects):
        names = [group["groupName"] for group in spec["workerGroupSpecs"]]
        assert len(names) == len(set(names)) > 0
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            assert group["template"]["spec"]["containers"]
            assert not (RESOURCES & group.get("rayStartParams", {}).keys() and group.get("resources"))
            assert "labels" not in group.get("rayStartParams", {})
            assert all(LABEL.fullmatch(text) for item in group.get("labels", {}).items() for text in item)
        for group in spec["workerGroupSpecs"]:
            assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_autoscaler_v2_restarts_no_pod_in_place(objects: list[dict[str, Any]]):
    for spec in specs(objects):
        assert spec["enableInTreeAutoscaling"]
        assert spec["autoscalerOptions"]["version"] == "v2"
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            assert group["template"]["spec"].get("restartPolicy", "Never") == "Never"
        names = {env["name"] for env in spec["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]}
        assert not names & {"RAY_enable_autoscaler_v2", "RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"}


def test_token_authentication_everywhere(objects: list[dict[str, Any]]):
    for spec in specs(objects):
        assert spec["authOptions"] == {"mode": "token", "secretName": "rayfm-ray-token"}
        assert tuple(map(int, spec["rayVersion"].split("."))) >= (2, 52, 0)


def test_jobs(objects: list[dict[str, Any]]):
    jobs = [one["spec"].get("jobTemplate", one["spec"]) for one in objects if one["kind"] in ("RayJob", "RayCronJob")]
    for path in sorted((KUBERNETES / "jobs").glob("*.yaml")):
        (job,) = kustomized.documents(path)
        assert set(job["metadata"]) == {"generateName"}
        assert len(job["metadata"]["generateName"]) + 5 <= LONGEST["RayJob"]
        jobs.append(job["spec"])
    for job in jobs:
        selects = "clusterSelector" in job
        assert selects != ("rayClusterSpec" in job)
        assert not (selects and (job.get("backoffLimit") or job.get("suspend") or job.get("shutdownAfterJobFinishes")))
        assert not (job.get("suspend") and not job["shutdownAfterJobFinishes"])
        assert job.get("shutdownAfterJobFinishes") or not job.get("ttlSecondsAfterFinished")
        assert "gcsFaultToleranceOptions" not in job.get("rayClusterSpec", {}), "a head that is replaced has no driver"


def test_pods_have_no_rights(objects: list[dict[str, Any]]):
    for spec in specs(objects):
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            pod = group["template"]["spec"]
            assert pod["securityContext"]["runAsNonRoot"]
            assert pod["securityContext"]["runAsUser"] == 1000
            for container in pod["containers"]:
                assert container["securityContext"] == {
                    "allowPrivilegeEscalation": False,
                    "capabilities": {"drop": ["ALL"]},
                }
        for group in spec["workerGroupSpecs"]:
            assert group["template"]["spec"]["automountServiceAccountToken"] is False
