"""Every manifest against the schema of its kind, strictly, file by file and as the overlays render them."""

from __future__ import annotations

import copy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kube_schemas
import kustomized
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "cluster" / "kubernetes"
OVERLAYS = ("dev", "prod")
CONFIGS = {"kustomization.yaml", "pipeline.yaml", "overrides.yaml", "scrape.yaml", "alerts.yaml"}
PATCHES = set(KUBERNETES.glob("overlays/*/sizes/*.yaml"))
MANIFESTS = sorted(path for path in KUBERNETES.rglob("*.yaml") if path.name not in CONFIGS and path not in PATCHES)


@pytest.fixture(scope="module")
def rendered() -> dict[str, list[dict[str, Any]]]:
    return {overlay: kustomized.render(KUBERNETES / "overlays" / overlay) for overlay in OVERLAYS}


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: str(path.relative_to(KUBERNETES)))
def test_every_manifest_is_valid(path: Path):
    objects = kustomized.documents(path)
    assert objects
    assert [problem for found in objects for problem in kube_schemas.problems(_whole(found))] == []


def _whole(found: dict[str, Any]) -> dict[str, Any]:
    """The service's pods come from the component; on its own its file has an empty template."""
    if found["kind"] == "RayService":
        found = copy.deepcopy(found)
        template = found["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]
        assert template == {}
        template["spec"] = {"containers": [{"name": "ray-head"}]}
    return found


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_rendered_object_is_valid(overlay: str, rendered: dict[str, list[dict[str, Any]]]):
    objects = rendered[overlay]
    names = [(one["kind"], one["metadata"]["name"]) for one in objects]
    assert len(names) == len(set(names)) > 20
    assert {"RayCluster", "RayJob", "RayService", "RayCronJob"} <= {kind for kind, _ in names}
    assert [problem for one in objects for problem in kube_schemas.problems(one)] == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_renderer_of_the_tests_does_as_kubectl(overlay: str, rendered: dict[str, list[dict[str, Any]]]):
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl on the path")
    said = subprocess.run(
        ["kubectl", "kustomize", str(KUBERNETES / "overlays" / overlay)], capture_output=True, text=True, check=True
    )

    def key(one: dict[str, Any]) -> str:
        return f"{one['kind']} {one['metadata']['name']}"

    theirs = {key(one): one for one in yaml.safe_load_all(said.stdout)}
    ours = {key(one): one for one in rendered[overlay]}
    assert ours.keys() == theirs.keys()
    for name, one in ours.items():
        assert one == theirs[name], name


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("spec", "workerGroupSpec"), [], "'workerGroupSpec' was unexpected"),
        (("spec", "workerGroupSpecs", 0, "minReplica"), 1, "'minReplica' was unexpected"),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "volumeMount"), [], "'volumeMount' was"),
        (("spec", "headGroupSpec", "template", "spec", "volumes", 0, "persistentVolumeClaim", "name"), "x", "'name'"),
        (("spec", "authOptions", "mode"), "tokens", "'tokens' is not one of"),
        (("spec", "workerGroupSpecs", 0, "maxReplicas"), "2", "is not of type 'integer'"),
        (
            ("spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "resources", "limits", "cpu"),
            1.5,
            "1.5",
        ),
        (("metadata", "label"), {}, "'label' was unexpected"),
        (("metadata", "labels"), {"a": 1}, "is not of type 'string'"),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "ports", 1, "containerPort"), 6379, "twice"),
    ],
)
def test_a_mistake_in_a_ray_cluster_is_found(path: tuple[Any, ...], value: Any, complaint: str):
    (found,) = kustomized.documents(KUBERNETES / "base" / "raycluster.yaml")
    found = copy.deepcopy(found)
    assert list(kube_schemas.problems(found)) == []
    node: Any = found
    for step in path[:-1]:
        node = node[step]
    node[path[-1]] = value
    said = list(kube_schemas.problems(found))
    assert any(complaint in one for one in said), said


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("redis.yaml", ("spec", "replica"), 2),
        ("zookeeper.yaml", ("spec", "template", "spec", "containers", 0, "livenessProbes"), {}),
        ("network-policies.yaml", ("spec", "ingres"), []),
        ("disruption-budgets.yaml", ("spec", "minAvailble"), 1),
    ],
)
def test_a_mistake_in_a_core_kind_is_found(name: str, path: tuple[Any, ...], value: Any):
    found = kustomized.documents(KUBERNETES / "base" / name)[-1 if name != "redis.yaml" else 2]
    node: Any = found
    for step in path[:-1]:
        node = node[step]
    node[path[-1]] = value
    assert any(repr(path[-1]) in one for one in kube_schemas.problems(found))


def test_int_or_string_and_kept_fields_and_embedded_objects():
    import jsonschema

    schema = kube_schemas.strict(
        {
            "type": "object",
            "properties": {
                "port": {"x-kubernetes-int-or-string": True},
                "kept": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
                "map": {"type": "object", "additionalProperties": {"type": "string"}},
                "inner": {
                    "type": "object",
                    "x-kubernetes-embedded-resource": True,
                    "properties": {"spec": {"type": "object"}},
                },
            },
        }
    )
    check = jsonschema.Draft202012Validator(schema)
    good = {"port": "http", "kept": {"a": 1}, "map": {"a": "b"}, "inner": {"kind": "Pod", "metadata": {}, "spec": {}}}
    assert check.is_valid(good)
    assert check.is_valid(good | {"port": 80})
    assert not check.is_valid(good | {"port": 1.5})
    assert not check.is_valid(good | {"map": {"a": 1}})
    assert not check.is_valid(good | {"other": 1})
    assert not check.is_valid(good | {"inner": {"spec": {"a": 1}}})
