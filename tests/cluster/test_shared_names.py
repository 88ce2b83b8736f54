"""What two files of cluster/ share is the same in both: each test names its pair.

| shared | one file | the other |
| --- | --- | --- |
| image, tag | every container of KubeRay's kinds; jobs/*.yaml; ray-up/*.yaml | kustomization.yaml (`images`) |
| Ray's version | raycluster.yaml | pyproject.toml, constraints.txt |
| name of the run, of its applications | rayservice.yaml | pipeline.yaml, as `rayfm serve` names them |
| ports 8000, 9000, host | rayservice.yaml (Serve) | pipeline.yaml (`endpoints`), container ports, network policies |
| metrics port | raycluster.yaml | container ports, scrape.yaml, network policies, ray-up/*.yaml |
| ZooKeeper's and Redis' names and ports | their services | pipeline.yaml, rayservice.yaml, network policies |
| paths below /mnt/rayfm, /etc/rayfm | mounts, the ConfigMap's keys; ray-up/*.yaml | pipeline.yaml, entry points |
| secrets and their keys | all that name one | secrets.example.yaml |
| entry points | jobs of all manifests | jobs/*.py, examples/*.yaml |
| the namespace | rendered objects | scrape.yaml |
"""

from __future__ import annotations

import os
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import kustomized
import yaml
from overlays import (
    CLUSTER,
    KUBERNETES,
    RAY_UP,
    ROOT,
    Object,
    clusters,
    config_of,
    entrypoints,
    job_files,
    ports_of,
    ray_up,
    serve_config,
    templates,
    walk,
)

from rayfm.pipeline.config import load_config
from rayfm.pipeline.endpoints import plan_endpoints
from rayfm.serving.application import application_name
from rayfm.serving.endpoints import GRPC_SERVICER, _teachers_of, endpoints_name
from rayfm.serving.nearline.application import consumer_name
from rayfm.serving.nearline.config import REDIS_PASSWORD

# Images and versions


def test_one_image_for_all_of_ray(rendered: dict[str, list[Object]]):
    images = {}
    for overlay, objects in rendered.items():
        found = {
            container["image"]
            for one in objects
            if one["apiVersion"] == "ray.io/v1"
            for part in walk(one)
            for container in part.get("containers", [])
        }
        assert len(found) == 1, overlay
        (images[overlay],) = found
    dev, prod = images["dev"], images["prod"]
    assert dev.removesuffix("-cpu") == prod.removesuffix("-cuda") != dev
    assert dev.endswith(f":{_version()}-cpu")
    for path in job_files():
        (job,) = kustomized.documents(path)
        assert [c["image"] for part in walk(job) for c in part.get("containers", [])] == [dev], path
    for name in RAY_UP:
        assert ray_up(name)["docker"]["image"] == prod
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    assert all(f"REGISTRY/{image.rpartition('/')[2]} " in dockerfile for image in images.values())


def _version() -> str:
    import rayfm

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return str(project.get("version") or rayfm.__version__)


def test_every_image_has_a_tag(objects: list[Object]):
    for part in walk(objects):
        for container in part.get("containers", []):
            assert re.fullmatch(r"[a-z0-9./-]+:[0-9][\w.-]+", container["image"]), container["image"]


def test_rays_version_is_the_projects(objects: list[Object]):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (pinned,) = [one for one in project["dependencies"] if one.startswith("ray[")]
    version = pinned.partition("==")[2]
    assert {spec["rayVersion"] for spec in clusters(objects).values()} == {version}
    assert f"\nray=={version}\n" in (CLUSTER / "constraints.txt").read_text()


# The service


def test_applications_are_named_as_rayfm_serve_names_them(objects: list[Object], tmp_path: Path):
    config = config_of(objects, tmp_path)
    plan = plan_endpoints(config, before_run=True)
    own = _teachers_of(config.name)
    expected = {endpoints_name(config.name): ("/", "endpoints", None)}
    for teacher in plan.teachers:
        expected[application_name(own, teacher.name)] = (None, "teacher", teacher.name)
    for name, near_line in plan.near_line().items():
        expected[consumer_name(near_line)] = (None, "consumers", name)
    found = {
        one["name"]: (one["route_prefix"], one["import_path"], one["args"].get("teacher"))
        for one in serve_config(objects)["applications"]
    }
    assert found == {
        name: (route, f"rayfm.pipeline.declared:{builder}", teacher)
        for name, (route, builder, teacher) in expected.items()
    }
    assert plan.students
    assert plan.teachers


def test_ports_of_serve_are_the_configs_the_containers_and_the_policys(objects: list[Object], tmp_path: Path):
    endpoints = config_of(objects, tmp_path).endpoints
    serve = serve_config(objects)
    assert serve["http_options"] == {"host": endpoints.host, "port": endpoints.http_port}
    assert serve["grpc_options"]["port"] == endpoints.grpc_port
    assert serve["grpc_options"]["grpc_servicer_functions"] == [GRPC_SERVICER]
    for spec in clusters(objects).values():
        for template in templates(spec):
            ports = {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0]["ports"]}
            assert (ports["serve"], ports["serve-grpc"]) == (endpoints.http_port, endpoints.grpc_port)
    assert ports_of(kustomized.select(objects, "NetworkPolicy", "scores")) == {
        endpoints.http_port,
        endpoints.grpc_port,
    }
    # KubeRay asks the proxies whether they are well, and the dashboards for everything else.
    dashboards = {
        port["containerPort"]
        for spec in clusters(objects).values()
        for port in templates(spec)[0]["spec"]["containers"][0]["ports"]
        if port["name"] == "dashboard"
    }
    assert ports_of(kustomized.select(objects, "NetworkPolicy", "kuberay-operator")) == {
        endpoints.http_port,
        *dashboards,
    }
    for part in ("cluster", "stream", "batch"):
        assert ports_of(kustomized.select(objects, "NetworkPolicy", f"ray-{part}")) == dashboards


def test_serves_config_has_only_keys_that_serve_knows(objects: list[Object]):
    from ray.serve.schema import ServeDeploySchema

    config = serve_config(objects)
    known = ServeDeploySchema.model_validate(config)
    assert config.keys() <= ServeDeploySchema.model_fields.keys()
    for given, one in zip(config["applications"], known.applications, strict=True):
        assert given.keys() <= type(one).model_fields.keys()
    for options in ("http_options", "grpc_options"):
        assert config[options].keys() <= type(getattr(known, options)).model_fields.keys()


def test_the_grpc_size_and_haproxy_are_the_same_on_every_node(objects: list[Object]):
    """Ray reads them in every process of a cluster: a head and workers that differ do not find one another."""
    for spec in clusters(objects).values():
        proxies = {
            tuple(env["value"] for env in template["spec"]["containers"][0]["env"] if env["name"].startswith("RAY_"))
            for template in templates(spec)
        }
        assert len(proxies) == 1


def test_the_size_of_grpc_messages_is_that_of_rayfm_serve(objects: list[Object], tmp_path: Path, monkeypatch: Any):
    from rayfm.serving.production import GRPC_MESSAGE, limit_messages

    monkeypatch.setenv(GRPC_MESSAGE, "0")  # so that it is put back
    monkeypatch.delenv(GRPC_MESSAGE)
    limit_messages(config_of(objects, tmp_path).endpoints.limits.max_body_bytes)
    for spec in clusters(objects).values():
        for template in templates(spec):
            env = {one["name"]: one.get("value") for one in template["spec"]["containers"][0]["env"]}
            assert env[GRPC_MESSAGE] == os.environ[GRPC_MESSAGE]


# Metrics


def test_metrics_ports(rendered: dict[str, list[Object]]):
    scrape = yaml.safe_load((KUBERNETES / "components" / "monitoring" / "scrape.yaml").read_text())
    ray, zookeeper = scrape["scrape_configs"]
    for job in (ray, zookeeper):
        assert {
            "source_labels": ["__meta_kubernetes_pod_container_port_name"],
            "regex": "metrics",
            "action": "keep",
        } in (job["relabel_configs"])
    namespaces = {
        kustomized.select(objects, "RayCluster", "rayfm")["metadata"]["namespace"] for objects in rendered.values()
    }
    assert set(ray["kubernetes_sd_configs"][0]["namespaces"]["names"]) == namespaces
    (selector,) = zookeeper["kubernetes_sd_configs"][0]["selectors"]
    for objects in rendered.values():
        policy = kustomized.select(objects, "NetworkPolicy", "prometheus")
        for spec in clusters(objects).values():
            for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
                ports = {p["name"]: p["containerPort"] for p in group["template"]["spec"]["containers"][0]["ports"]}
                assert str(ports["metrics"]) == group["rayStartParams"]["metrics-export-port"]
                assert ports["metrics"] in ports_of(policy)
        ensemble = kustomized.select(objects, "StatefulSet", "zookeeper")["spec"]["template"]
        assert selector["label"] == "=".join(*ensemble["metadata"]["labels"].items())
        (container,) = ensemble["spec"]["containers"]
        port = {p["name"]: p["containerPort"] for p in container["ports"]}["metrics"]
        extra = {env["name"]: env.get("value") for env in container["env"]}["ZOO_CFG_EXTRA"]
        assert f"metricsProvider.httpPort={port}" in extra
        assert port in ports_of(policy)
    for name in RAY_UP:
        for command in (*ray_up(name)["head_start_ray_commands"], *ray_up(name)["worker_start_ray_commands"]):
            assert "ray start" not in command or f"--metrics-export-port={ports['metrics']}" in command


# ZooKeeper and Redis


def test_zookeepers_names_and_ports(objects: list[Object], tmp_path: Path):
    service = kustomized.select(objects, "Service", "zookeeper")
    state = kustomized.select(objects, "StatefulSet", "zookeeper")["spec"]
    (container,) = state["template"]["spec"]["containers"]
    ports = {port["name"]: port["port"] for port in service["spec"]["ports"]}
    assert ports == {port["name"]: port["containerPort"] for port in container["ports"]}
    assert state["serviceName"] == "zookeeper"
    assert service["spec"]["selector"] == state["template"]["metadata"]["labels"] == state["selector"]["matchLabels"]
    hosts = [f"zookeeper-{number}.zookeeper" for number in range(state["replicas"])]
    url = config_of(objects, tmp_path).endpoints.metadata
    client = ports["client"]
    assert url == f"zookeeper://{','.join(f'{host}:{client}' for host in hosts)}/rayfm"
    servers = {env["name"]: env.get("value") for env in container["env"]}["ZOO_SERVERS"].split()
    assert servers == [
        f"server.{number}={host}:{ports['peer']}:{ports['election']};{ports['client']}"
        for number, host in enumerate(hosts, 1)
    ]
    policy = kustomized.select(objects, "NetworkPolicy", "zookeeper")
    assert ports_of(policy) == {ports["client"], ports["peer"], ports["election"]}


def test_redis_name_port_and_password(objects: list[Object], tmp_path: Path):
    (port,) = kustomized.select(objects, "Service", "redis")["spec"]["ports"]
    state = kustomized.select(objects, "StatefulSet", "redis")["spec"]
    (container,) = state["template"]["spec"]["containers"]
    assert port["port"] == container["ports"][0]["containerPort"]
    options = kustomized.select(objects, "RayService", "rayfm")["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]
    assert options["redisAddress"] == f"redis:{port['port']}"
    near_line = config_of(objects, tmp_path).endpoints.near_line
    assert near_line is not None
    queue = urlsplit(near_line.redis)
    assert (queue.hostname, queue.port, queue.password) == ("redis", port["port"], None)
    assert queue.path not in ("", "/", "/0"), "the head's state is in database 0"
    assert ports_of(kustomized.select(objects, "NetworkPolicy", "redis")) == {port["port"]}
    secret = options["redisPassword"]["valueFrom"]
    assert {"name": "REDIS_PASSWORD", "valueFrom": secret} in container["env"]
    for spec in clusters(objects).values():
        for template in templates(spec):
            assert {"name": REDIS_PASSWORD, "valueFrom": secret} in template["spec"]["containers"][0]["env"]


# Storage, configs, entry points


def test_paths_are_mounted(objects: list[Object], tmp_path: Path):
    config = config_of(objects, tmp_path)
    files = {f"/etc/rayfm/{name}" for name in kustomized.select(objects, "ConfigMap", "rayfm-pipeline")["data"]}
    for spec in clusters(objects).values():
        for template in templates(spec):
            mounts = {m["name"]: m["mountPath"] for m in template["spec"]["containers"][0]["volumeMounts"]}
            volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
            assert mounts.keys() == volumes.keys()
            assert mounts["storage"] == "/mnt/rayfm"
            assert mounts["pipeline"] == "/etc/rayfm"
            claim = volumes["storage"]["persistentVolumeClaim"]["claimName"]
            assert kustomized.select(objects, "PersistentVolumeClaim", claim)["spec"]["accessModes"] == [
                "ReadWriteMany"
            ]
            assert volumes["pipeline"]["configMap"]["name"] == "rayfm-pipeline"
    for path in (config.storage, config.runs, vars(config.data.source)["path"]):
        assert path.startswith("/mnt/rayfm/")
    for name in RAY_UP:
        text = (CLUSTER / "ray-up" / f"{name}.yaml").read_text()
        assert "--volume /mnt/rayfm:/mnt/rayfm" in text
    for one in serve_config(objects)["applications"]:
        assert {one["args"]["config"], *(path.removeprefix("@") for path in one["args"]["set"])} == files
    for entry in entrypoints(objects):
        assert {word.removeprefix("@") for word in shlex.split(entry) if "/etc/rayfm/" in word} == files


def test_entry_points_exist_and_take_their_arguments(rendered: dict[str, list[Object]]):
    from typer.main import get_command

    from rayfm.cli.jobs import JOBS, command_line
    from rayfm.cli.main import app

    found = {entry for objects in rendered.values() for entry in entrypoints(objects)}
    found |= {entry for path in job_files() for entry in entrypoints(kustomized.documents(path))}
    assert len(found) >= 6
    for entry in found:
        python, script, *arguments = shlex.split(entry)
        assert python == "python"
        path = ROOT / Path(script).relative_to("/opt/rayfm")
        assert path.is_file(), script
        assert path.parent.name == "jobs"
        assert path.stem in JOBS
        command, *rest = command_line(path.stem, arguments)
        get_command(app).commands[command].make_context(command, list(rest))  # raises where it takes none of them
        for word in arguments:
            if word.startswith("/opt/rayfm/"):
                example = ROOT / Path(word).relative_to("/opt/rayfm")
                sets = [one for one in arguments if re.match(r"[\w.]+=", one)]
                config = load_config(example, sets)
                assert {config.storage[:11], config.runs[:11]} == {"/mnt/rayfm/"}
    copied = (CLUSTER / "Dockerfile").read_text()
    assert "WORKDIR /opt/rayfm\nCOPY jobs jobs\nCOPY examples examples\n" in copied


def test_the_stream_or_the_batch_but_never_both(objects: list[Object]):
    stream = kustomized.select(objects, "RayJob", "rayfm-stream")["spec"]
    batch = kustomized.select(objects, "RayCronJob", "rayfm-batch")["spec"]
    assert stream["suspend"] != batch["suspend"]
    assert stream["entrypoint"] == f"{batch['jobTemplate']['entrypoint']} --follow"
    for job in (stream, batch["jobTemplate"]):
        assert job["backoffLimit"] > 0
        assert job["shutdownAfterJobFinishes"]


# Secrets


def test_secrets_are_those_of_the_example_which_has_no_value(rendered: dict[str, list[Object]]):
    secrets = kustomized.documents(KUBERNETES / "secrets.example.yaml")
    example = {one["metadata"]["name"]: set(one["stringData"]) for one in secrets}
    assert [value for one in secrets for value in one["stringData"].values() if value] == []
    named: dict[str, set[str]] = {}
    for objects in rendered.values():
        assert [one for one in objects if one["kind"] == "Secret"] == []
        for part in walk(objects):
            if "secretKeyRef" in part:
                named.setdefault(part["secretKeyRef"]["name"], set()).add(part["secretKeyRef"]["key"])
            if "secretRef" in part:
                named[part["secretRef"]["name"]] = example[part["secretRef"]["name"]]
            if "authOptions" in part:
                named.setdefault(part["authOptions"]["secretName"], set()).add("auth_token")  # KubeRay's own key
    assert named == example
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    for name, keys in example.items():
        command = re.search(rf"kubectl create secret generic {name} .*?(?=\nkubectl|\n```)", text, re.DOTALL)
        assert command, name
        assert set(re.findall(r"--from-literal=(\w+)=", command.group())) == keys
