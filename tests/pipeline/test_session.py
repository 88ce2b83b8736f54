"""Ray of a run's own, or a cluster's."""

from __future__ import annotations

import pytest

from rayfm.config import ConfigError
from rayfm.config.nodes import NodesConfig
from rayfm.data import cluster
from rayfm.pipeline import session
from rayfm.pipeline.config import RayConfig


def test_a_ray_of_our_own_stays_as_large_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(session, "cluster_resources", lambda: (6.0, 0.0))
    assert session.own_cpus(RayConfig()) == 6
    assert session.own_cpus(RayConfig(address="10.0.0.1:6379")) is None
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert session.own_cpus(RayConfig()) is None


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
