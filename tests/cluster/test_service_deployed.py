"""The manifest's own Serve config, deployed on a local Ray Serve as KubeRay's operator deploys it."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import httpx
import kustomized
import numpy as np
import pytest
import yaml
from example_store import every_feature_schema
from served_models import as_examples, candidate_rows, predictions, publish_model, user_row
from small_pipeline import mapping

from rayfm.client import Client

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "a-token-of-some-length"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A small pipeline in the place of the manifest's: the same run, teacher and keys, its models published."""
    small = mapping(tmp_path)
    small["name"] = "ads"
    small["teachers"] = {"large": small["teachers"]["fm"]}
    small["students"]["vm"]["variants"] = {"none": []}
    small["endpoints"] = {
        "host": "127.0.0.1",
        "http_port": free_port(),
        "grpc_port": free_port(),
        "students": ["vm.none.1"],
        "teachers": ["large"],
        "metadata": f"sqlite://{tmp_path}/metadata.sqlite",
        "cpus": 0.25,
        "poll_s": 0.2,
        "compile": {"compile": "torchscript"},
    }
    assert small["schema"] == every_feature_schema().dump()
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump(small))
    return path


@pytest.mark.ray
def test_the_manifests_applications_answer(
    fresh_ray: None, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    (service,) = kustomized.documents(ROOT / "cluster" / "kubernetes" / "base" / "rayservice.yaml")
    manifest: dict[str, Any] = yaml.safe_load(service["spec"]["serveConfigV2"])
    endpoints = yaml.safe_load(config.read_text())["endpoints"]
    manifest["http_options"] = {"host": "127.0.0.1", "port": endpoints["http_port"]}
    manifest["grpc_options"]["port"] = endpoints["grpc_port"]
    # Near-line labels need a Redis, and are tested with one elsewhere.
    manifest["applications"] = [one for one in manifest["applications"] if not one["name"].endswith("nearline")]
    assert [one["name"] for one in manifest["applications"]] == ["rayfm-ads", "rayfm-ads-serve-large"]
    for one in manifest["applications"]:
        one["args"] |= {"config": str(config), "set": []}
        one["runtime_env"] = {"env_vars": {"RAYFM_TOKEN": TOKEN}}  # of the pods, there
    serve.start(
        proxy_location=manifest["proxy_location"],
        http_options=manifest["http_options"],
        grpc_options=manifest["grpc_options"],
    )
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(manifest), _blocking=True)

    url = f"http://127.0.0.1:{endpoints['http_port']}"
    headers = {"Authorization": f"Bearer {TOKEN}"}
    assert httpx.get(f"{url}/readyz").status_code == 401
    ready = httpx.get(f"{url}/readyz", headers=headers, timeout=30)
    assert (ready.status_code, ready.json()["ready"]) == (503, False), "nothing is published yet, nor is there a run"

    # What the stream publishes is taken up by itself.
    root = tmp_path / "runs" / "ads"
    models = {name: publish_model(root, name, "v1", seed) for seed, name in enumerate(("vm.none.1", "large.teacher.0"))}
    end = time.monotonic() + 60
    while httpx.get(f"{url}/readyz", headers=headers, timeout=30).status_code != 200:
        assert time.monotonic() < end
        time.sleep(0.2)
    user, candidates = user_row(), candidate_rows(10)
    with Client(url, TOKEN) as client:
        scored = client.score("vm.none.1", user, candidates)
        rows = as_examples(user, candidates)
        taught = client.score_teacher(
            "large", rows.select([n for n in rows.column_names if n not in ("click", "watch")])
        )
    for found, name in ((scored, "vm.none.1"), (taught, "large.teacher.0")):
        expected = predictions(models[name], rows)["click"]
        np.testing.assert_allclose(found.predictions["click"].to_numpy(), expected, rtol=1e-5, atol=1e-6)
    serve.shutdown()
