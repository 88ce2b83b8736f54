"""Groups of nodes: what the pipeline and the service ask of them fits, and policies and budgets select their pods.

| shared | one file | the other |
| --- | --- | --- |
| `rayfm/pool` | groups, their nodes and taints; ray-up/*.yaml | pipeline.yaml (`ray.nodes`) |
| CPUs, GPUs | groups of an overlay; node types of ray-up/*.yaml | what its pipeline asks for; docs/clouds.md |
| `rayfm/part` | pods of each cluster | network policies, disruption budgets |
"""

from __future__ import annotations

import re
from pathlib import Path

import kustomized
from overlays import RAY_UP, ROOT, Object, clusters, config_of, job_files, ray_up, templates, walk

from rayfm.pipeline.capacity import needs
from rayfm.pipeline.endpoints import plan_endpoints

# Groups, and what the pipeline asks of them


def test_groups_are_what_the_pipeline_selects(objects: list[Object], tmp_path: Path):
    nodes = config_of(objects, tmp_path).ray.nodes
    wanted = {"data": nodes.data, "training": nodes.training, "serving": nodes.serving}
    for part, spec in clusters(objects).items():
        groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
        assert groups.keys() == ({"serving"} if part == "serve" else wanted.keys())
        for name, group in groups.items():
            assert wanted[name] == {"rayfm/pool": name}
            assert wanted[name].items() <= group["labels"].items()
            pod = group["template"]["spec"]
            assert pod.get("nodeSelector", wanted[name]).items() >= wanted[name].items()
            for key, value in pod.get("nodeSelector", {}).items():
                assert {"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"} in pod["tolerations"]


def test_the_nodes_of_ray_up_are_the_same_groups(objects: list[Object], tmp_path: Path):
    nodes = config_of(objects, tmp_path).ray.nodes
    for name in RAY_UP:
        types = ray_up(name)["available_node_types"]
        assert types.keys() == {"head", "data", "training", "serving"}
        for group in ("data", "training", "serving"):
            assert getattr(nodes, group).items() <= types[group]["labels"].items()
        assert types["head"]["resources"] == {"CPU": 0}


def test_training_is_on_spot_machines(rendered: dict[str, list[Object]]):
    (training,) = [g for g in clusters(rendered["prod"])["stream"]["workerGroupSpecs"] if g["groupName"] == "training"]
    assert training["labels"]["ray.io/market-type"] == "spot"
    assert training["template"]["spec"]["nodeSelector"]["rayfm/capacity"] == "spot"
    aws, gcp = (ray_up(name)["available_node_types"]["training"]["node_config"] for name in RAY_UP)
    assert aws["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert gcp["scheduling"]["provisioningModel"] == "SPOT"


def _room(group: Object) -> tuple[float, float]:
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    return float(limits["cpu"]), float(limits.get("nvidia.com/gpu", 0))


def test_what_the_pipeline_asks_for_fits_its_groups(objects: list[Object], tmp_path: Path):
    config = config_of(objects, tmp_path)
    groups = {group["groupName"]: group for group in clusters(objects)["stream"]["workerGroupSpecs"]}
    asked: dict[str, list[tuple[float, float]]] = {"data": [], "training": [], "serving": []}
    for need in needs(config):
        kind = {"trainer": "training", "service": "serving", "Ray": "data"}[need.part.split()[0]]
        asked[kind].append((need.cpus, need.gpus))
    for kind, amounts in asked.items():
        cpus, gpus = _room(groups[kind])
        most = groups[kind]["maxReplicas"]
        assert amounts, kind
        assert sum(cpu for cpu, _ in amounts) <= cpus * most, f"{kind}: CPUs"
        assert sum(gpu for _, gpu in amounts) <= gpus * most, f"{kind}: GPUs"
    trainings = [teacher.training for teacher in config.teachers.values()] + list(config.groups.values())
    for training in trainings:
        assert _fits((training.cpus_per_worker, training.gpus_per_worker), groups["training"])
    serving = config.serving
    assert _fits((serving.cpus, serving.gpus), groups["serving"])
    if serving.members > 1:
        assert _fits((serving.member_cpus, serving.member_gpus), groups["serving"])
    assert _fits((config.data.cpus_per_task, 0), groups["data"])


def test_the_largest_cluster_is_what_the_groups_come_to(objects: list[Object], tmp_path: Path):
    """Ray does not say how far its autoscaler can go: the config does."""
    groups = clusters(objects)["stream"]["workerGroupSpecs"]
    cpus = sum(group["maxReplicas"] * _room(group)[0] for group in groups)
    gpus = sum(group["maxReplicas"] * _room(group)[1] for group in groups)
    assert config_of(objects, tmp_path).ray.largest == (cpus, gpus)


def test_the_largest_cluster_of_ray_up_is_what_the_page_says():
    page = (ROOT / "docs" / "clouds.md").read_text()
    said = {unit: int(re.search(rf"^  max_{unit}: (\d+)", page, re.MULTILINE).group(1)) for unit in ("cpus", "gpus")}
    for name in RAY_UP:
        types = ray_up(name)["available_node_types"].values()
        for unit, resource in (("cpus", "CPU"), ("gpus", "GPU")):
            assert sum(one.get("max_workers", 0) * one["resources"].get(resource, 0) for one in types) == said[unit]
        assert sum(one.get("max_workers", 0) for one in types) == ray_up(name)["max_workers"]


def _fits(one: tuple[float, float], group: Object) -> bool:
    return all(asked <= room for asked, room in zip(one, _room(group), strict=True))


def test_what_the_service_asks_for_fits_its_group(objects: list[Object], tmp_path: Path):
    plan = plan_endpoints(config_of(objects, tmp_path), before_run=True)
    (group,) = clusters(objects)["serve"]["workerGroupSpecs"]
    cpus, gpus = _room(group)
    most = [(plan.endpoints.max_replicas or plan.endpoints.replicas, plan.endpoints.cpus, 0.0)]
    for teacher in plan.teachers:
        most.append((teacher.max_replicas or teacher.replicas, teacher.whole_cpus, teacher.whole_gpus))
    for near_line in plan.near_line().values():
        most.append((near_line.consumer.max_replicas, near_line.consumer.cpus, 0.0))
    assert sum(count * cpu for count, cpu, _ in most) <= cpus * group["maxReplicas"]
    assert sum(count * gpu for count, _, gpu in most) <= gpus * group["maxReplicas"]


# Labels that policies and budgets select


def test_each_cluster_has_a_part_of_its_own(objects: list[Object]):
    for part, spec in clusters(objects).items():
        assert {template["metadata"]["labels"]["rayfm/part"] for template in templates(spec)} == {part}
    submitters = [one["submitterPodTemplate"] for one in walk(objects) if "submitterPodTemplate" in one]
    assert [one["metadata"]["labels"]["rayfm/part"] for one in submitters] == ["stream", "batch"]
    for path in job_files():
        (job,) = kustomized.documents(path)
        assert job["spec"]["submitterPodTemplate"]["metadata"]["labels"]["rayfm/part"] == "cluster"
        assert job["spec"]["clusterSelector"] == {"ray.io/cluster": "rayfm"}


def test_policies_and_budgets_select_pods_that_there_are(objects: list[Object]):
    pods = [{"app.kubernetes.io/name": name} for name in ("zookeeper", "redis")]
    for part, spec in clusters(objects).items():
        groups = ["headgroup", *(group["groupName"] for group in spec["workerGroupSpecs"])]
        for group in groups:  # as KubeRay labels them
            kind = "head" if group == "headgroup" else "worker"
            ray = {"ray.io/is-ray-node": "yes", "ray.io/node-type": kind, "ray.io/group": group}
            pods.append({"rayfm/part": part, **ray})
        pods.append({"rayfm/part": part, "rayfm/role": "submitter"})
    selectors = [
        one["podSelector"].get("matchLabels", {})
        for kind in objects
        if kind["kind"] == "NetworkPolicy"
        for one in walk(kind)
        if "podSelector" in one
    ]
    selectors += [one["spec"]["selector"]["matchLabels"] for one in objects if one["kind"] == "PodDisruptionBudget"]
    assert len(selectors) > 10
    for selector in selectors:
        assert any(selector.items() <= pod.items() for pod in pods), selector
    policies = {one["metadata"]["name"] for one in objects if one["kind"] == "NetworkPolicy"}
    assert {f"ray-{part}" for part in clusters(objects)} <= policies


def test_budgets_leave_what_has_to_stay(objects: list[Object]):
    (serving,) = clusters(objects)["serve"]["workerGroupSpecs"]
    for one in objects:
        if one["kind"] == "PodDisruptionBudget" and "ray.io/node-type" not in one["spec"]["selector"]["matchLabels"]:
            continue
        if one["kind"] == "PodDisruptionBudget":
            assert isinstance(one["spec"]["minAvailable"], int), "shares need a controller with a scale"
    budget = kustomized.select(objects, "PodDisruptionBudget", "rayfm-serving")
    assert 1 <= budget["spec"]["minAvailable"] <= serving["minReplicas"]
