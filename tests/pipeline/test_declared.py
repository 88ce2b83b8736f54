"""Applications that a Serve config names are those that `rayfm serve` starts, and wrong ones say why."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from small_pipeline import write_config

from rayfm.config import ConfigError
from rayfm.pipeline import declared

TOKEN = "a-token-of-some-length"
ENDPOINTS = {
    "students": ["vm.none.1"],
    "teachers": ["fm"],
    "metadata": "zookeeper://zk-0:2181,zk-1:2181/ads",
    "host": "0.0.0.0",
    "replicas": 2,
}


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYFM_TOKEN", TOKEN)


def arguments(folder: Path, endpoints: dict[str, object] | None = None, **more: object) -> dict[str, object]:
    return {"config": str(write_config(folder, endpoints=endpoints or ENDPOINTS, ray={"nodes": NODES})), **more}


NODES = {"serving": {"rayfm/pool": "serving"}}


def test_the_endpoints_are_built_before_the_run_stands(tmp_path: Path):
    application = declared.endpoints(arguments(tmp_path))
    deployment = application._bound_deployment
    plan, check = deployment.init_args
    assert deployment.name == "Endpoints"
    assert deployment.num_replicas == 2
    assert deployment.ray_actor_options["label_selector"] == NODES["serving"]
    assert (plan["students"], [one["name"] for one in plan["teachers"]]) == (["vm.none.1"], ["fm"])
    assert plan["endpoints"]["metadata"] == ENDPOINTS["metadata"]
    assert check.allows(f"Bearer {TOKEN}")
    assert not (tmp_path / "runs").exists()


def test_a_teacher_is_built_alone(tmp_path: Path):
    given = arguments(tmp_path, teacher="fm", set=["serving.max_replicas=3", "serving.cpus=0.5"])
    deployment = declared.teacher(given)._bound_deployment
    (config,) = deployment.init_args
    assert deployment.name == "TeacherService"
    assert deployment._deployment_config.autoscaling_config.max_replicas == 3
    assert deployment.ray_actor_options["num_cpus"] == 0.5
    assert (config["model"], config["metadata"]) == ("fm.teacher.0", ENDPOINTS["metadata"])


def test_consumers_take_the_password_of_redis_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAYFM_REDIS_PASSWORD", "p@ss/word")
    near_line = {"redis": "redis://redis:6379/1", "consumer": {"max_replicas": 2}}
    given = arguments(tmp_path, {**ENDPOINTS, "near_line": near_line}, teacher="fm")
    deployment = declared.consumers(given)._bound_deployment
    config, service, _ = deployment.init_args
    assert (deployment.name, service) == ("NearLineConsumer", "rayfm-small-serve-fm")
    assert config["redis"] == "redis://redis:6379/1", "no config holds it"
    policy = deployment._deployment_config.autoscaling_config.policy
    assert policy.policy_kwargs["broker_url"] == "redis://:p%40ss%2Fword@redis:6379/1"


@pytest.mark.parametrize(
    ("builder", "change", "complaint"),
    [
        ("endpoints", {"sets": []}, "unknown key 'sets'; did you mean 'set'"),
        ("endpoints", {"teacher": "fm"}, "leave 'teacher' out of args"),
        ("endpoints", {"set": ["endpoints.metadata=null"]}, "write endpoints.metadata"),
        ("endpoints", {"set": ["endpoints.students=null"]}, "write endpoints.students"),
        ("endpoints", {"set": ["endpoints.teachers=[fn]"]}, "endpoints.teachers: 'fn' is not of this run; known: fm"),
        ("teacher", {}, "teacher None is not served"),
        ("teacher", {"teacher": "fn"}, "teacher 'fn' is not served; known: fm"),
        ("consumers", {"teacher": "fm"}, "without endpoints.near_line; leave the consumers out"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, builder: str, change: dict[str, object], complaint: str):
    with pytest.raises(ConfigError, match=complaint):
        getattr(declared, builder)(arguments(tmp_path, **change))


def test_without_a_token_nothing_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAYFM_TOKEN")
    for host in ("0.0.0.0", "127.0.0.1"):  # proxies on every node: loopback or not
        with pytest.raises(ConfigError, match="token"):
            declared.endpoints(arguments(tmp_path, {**ENDPOINTS, "host": host}))


def test_builders_take_one_argument_as_serve_calls_them():
    for builder in (declared.endpoints, declared.teacher, declared.consumers):
        assert len(inspect.signature(builder).parameters) == 1
