"""Replicas of a teacher come with load and go without it, and no request fails for either."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from example_store import every_feature_rows
from served_models import publish_model

from rayfm.serving.application import application_name, start_teacher, stop_teacher
from rayfm.serving.replicas import Replicas
from rayfm.serving.teacher import TeacherServiceConfig

MODEL = "fm.teacher.0"


def running() -> int:
    """Replicas that answer now."""
    from ray import serve

    deployment = serve.status().applications[application_name("scaled", "fm")].deployments["TeacherService"]
    return int(deployment.replica_states.get("RUNNING", 0))


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_replicas_follow_the_load_and_no_request_fails(tmp_path: Path, ray_session: None) -> None:
    publish_model(tmp_path, MODEL, "v1", 1)
    rows = every_feature_rows(3000, seed=2)
    handle = start_teacher(
        "scaled",
        "fm",
        TeacherServiceConfig(root=str(tmp_path), model=MODEL, poll_s=0.5),
        Replicas(max_replicas=3, cpus=0.1, target_requests=1.5, upscale_delay_s=1, downscale_delay_s=1),
    )
    stop, quiet = threading.Event(), threading.Event()
    answered, errors = [0, 0], list[Exception]()

    def ask() -> None:
        while not stop.is_set():
            try:
                version, found = handle.score.remote(rows).result(timeout_s=60)
                assert (version, found.num_rows) == ("v1", rows.num_rows)
                answered[quiet.is_set()] += 1
            except Exception as error:
                errors.append(error)
            if quiet.is_set():
                time.sleep(0.5)

    def until(replicas: int) -> None:
        deadline = time.monotonic() + 90
        while running() != replicas:
            assert not errors
            assert time.monotonic() < deadline, f"{running()} replicas run"
            time.sleep(0.25)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    try:
        assert running() == 1
        for thread in threads:
            thread.start()
        until(3)
        quiet.set()  # each asks twice a second from now on: what one replica does in little of its time
        until(1)
        after = answered[1]
        deadline = time.monotonic() + 30
        while answered[1] < after + 12:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        stop_teacher("scaled", "fm")
    assert not errors
    assert min(answered) > 12
