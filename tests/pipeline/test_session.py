"""Ray of a run's own, or a cluster's."""

from __future__ import annotations

import pytest

from rayfm.pipeline import session
from rayfm.pipeline.config import RayConfig


def test_a_ray_of_our_own_stays_as_large_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(session, "cluster_resources", lambda: (6.0, 0.0))
    assert session.own_cpus(RayConfig()) == 6
    assert session.own_cpus(RayConfig(address="10.0.0.1:6379")) is None
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert session.own_cpus(RayConfig()) is None
