"""Ray of a run's own, or a cluster's."""

from __future__ import annotations

import os
from typing import Any

import pytest

from rayfm.config import ConfigError
from rayfm.config.nodes import NodesConfig
from rayfm.data import cluster
from rayfm.pipeline import session
from rayfm.pipeline.config import RayConfig
from rayfm.quiet import QUIET_ENVIRONMENT, WORKER_ENVIRONMENT, WORKER_SETUP


def test_a_ray_of_our_own_stays_as_large_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(session, "cluster_resources", lambda: (6.0, 0.0))
    assert session.own_cpus(RayConfig()) == 6
    assert session.own_cpus(RayConfig(address="10.0.0.1:6379")) is None
    assert session.own_cpus(RayConfig(address="local")) == 6
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert session.own_cpus(RayConfig()) is None
    assert session.own_cpus(RayConfig(address="local")) == 6
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert session.own_cpus(RayConfig()) == 6


def test_nodes_are_those_of_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    started = session.ray_session(RayConfig(nodes=NodesConfig(data={"role": "data"})))
    with pytest.raises(ConfigError, match=r"ray\.nodes: the Ray that is started here has no node labels"), started:
        pass


def test_a_cluster_that_grows_has_what_it_has_at_its_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0, "GPU": 2.0, "memory": 1.0})
    for config, wanted in (({}, (4, 2)), ({"max_cpus": 64}, (64, 2)), ({"max_cpus": 1, "max_gpus": 8}, (4, 8))):
        assert cluster.cluster_resources(RayConfig(**config).largest) == wanted


class Started:
    """In the place of Ray: what it was started with, and in which environment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.environment: dict[str, str] = {}
        self.options: dict[str, Any] = {}
        for name in ("RAY_ADDRESS", *QUIET_ENVIRONMENT, *WORKER_ENVIRONMENT):
            monkeypatch.setenv(name, "")  # so that what is set here is taken back
            monkeypatch.delenv(name)
        monkeypatch.setattr("ray.is_initialized", lambda: False)
        monkeypatch.setattr("ray.shutdown", lambda: None)
        monkeypatch.setattr("ray.init", self.init)

    def init(self, **options: Any) -> None:
        self.environment, self.options = dict(os.environ), options


@pytest.mark.parametrize("address", [None, "local"])
def test_workers_of_our_own_ray_take_after_it_and_start_once(
    address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime environment makes Ray start each of its processes twice."""
    from ray._private import ray_constants

    started = Started(monkeypatch)
    monkeypatch.setenv("RAYFM_LOG_FORMAT", "json")
    monkeypatch.setenv("PYTHONWARNINGS", "default")
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    with session.ray_session(RayConfig()):
        during = dict(os.environ)
    assert started.options["address"] == "local"
    assert "runtime_env" not in started.options
    wanted = {**QUIET_ENVIRONMENT, **WORKER_ENVIRONMENT, "RAYFM_LOG_FORMAT": "json", "PYTHONWARNINGS": "default"}
    wanted[ray_constants.WORKER_PROCESS_SETUP_HOOK_ENV_VAR] = WORKER_SETUP
    assert wanted.items() <= started.environment.items()
    # What this process has of Ray Train's it would hand to each trainer, as a runtime environment.
    assert not [name for name in during if name.startswith("RAY_TRAIN_")]
    assert ray_constants.WORKER_PROCESS_SETUP_HOOK_ENV_VAR not in during


def test_workers_of_a_cluster_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    started = Started(monkeypatch)
    with session.ray_session(RayConfig(address="10.0.0.1:6379")):
        pass
    told = started.options["runtime_env"]
    assert told["worker_process_setup_hook"] == WORKER_SETUP
    assert {**QUIET_ENVIRONMENT, **WORKER_ENVIRONMENT}.items() <= told["env_vars"].items()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_workers_call_what_they_find_in_their_environment() -> None:
    import gc

    import ray

    assert ray.get(ray.remote(num_cpus=0)(lambda: gc.get_threshold()).remote()) == (10_000, 10, 10)
