"""The files of ``ray up``, against Ray's schema after Ray's own preparation; no cloud is asked."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

RAY_UP = Path(__file__).resolve().parents[2] / "cluster" / "ray-up"


@pytest.fixture(params=["aws", "gcp"])
def cluster(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((RAY_UP / f"{request.param}.yaml").read_text())
    assert found["provider"]["type"] == request.param
    return found


def check(config: dict[str, Any]) -> None:
    """Ray's own preparation and check; and the keys of ``provider``, of which its schema refuses none."""
    validate_config(prepare_config(config))
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(config["provider"], schema["properties"]["provider"] | {"additionalProperties": False})


def test_it_is_what_ray_takes(cluster: dict[str, Any]):
    check(copy.deepcopy(cluster))
    prepared = prepare_config(copy.deepcopy(cluster))
    for name, wanted in cluster["available_node_types"].items():
        node = prepared["available_node_types"][name]
        assert node["resources"] == wanted["resources"]
        if name != cluster["head_node_type"]:
            assert 0 <= node["min_workers"] < node["max_workers"] <= prepared["max_workers"]
    assert prepared["docker"]["image"] == cluster["docker"]["image"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("max_worker",), 3),
        (("provider", "regions"), "a"),
        (("docker", "images"), "x"),
        (("available_node_types", "training", "label"), {}),
        (("available_node_types", "training", "max_workers"), "8"),
    ],
)
def test_a_mistake_is_found(cluster: dict[str, Any], path: tuple[str, ...], value: Any):
    node = cluster
    for step in path[:-1]:
        node = node[step]
    node[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError) as error:
        check(cluster)
    assert path[-1] in str(error.value)


def test_no_machine_has_a_public_address_and_no_file_a_secret(cluster: dict[str, Any]):
    assert cluster["provider"]["use_internal_ips"]
    assert "--env-file /home/ubuntu/rayfm.env" in cluster["docker"]["run_options"]
    assert not any("TOKEN=" in str(part) or "PASSWORD=" in str(part) for part in cluster.values())
