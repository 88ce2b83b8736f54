from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import numpy as np
import pytest
from example_store import every_feature_rows
from served_models import predictions, publish_model
from test_teacher_service import MODEL, score

from rayfm.config import SnapshotError
from rayfm.serving.follow import follow_current, student_follower
from rayfm.serving.http.config import EndpointsConfig
from rayfm.serving.student import Students
from rayfm.serving.teacher import TeacherService
from rayfm.snapshots import Collector, Pointer, SnapshotStore, open_metadata, read_current, refusals
from rayfm.snapshots.manifest import MANIFEST


@pytest.fixture(scope="module")
def rows():
    return every_feature_rows(50, seed=3)


@pytest.fixture
def url(tmp_path) -> str:
    return f"sqlite://{tmp_path}/meta.db"


@pytest.fixture
def service(tmp_path, url):
    publish_model(tmp_path, MODEL, "v1", 1)
    made = TeacherService({"root": str(tmp_path), "model": MODEL, "metadata": url, "poll_s": 0.02})
    yield made
    made._follower.close()


def wait_for(service: TeacherService, version: str) -> None:
    deadline = time.monotonic() + 20
    while asyncio.run(service.current_version()) != version:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def break_model(root: Path, version: str) -> None:
    """An intact version of a model that this code does not know."""
    path = SnapshotStore(root).folder(MODEL, version) / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["config"]["type"] = "of_the_future"
    path.write_text(json.dumps(manifest))


def test_a_replica_follows_current_and_says_who_answered(tmp_path, url, service, rows):
    collector = Collector(SnapshotStore(tmp_path), open_metadata(url))
    (lease,) = collector.holders(MODEL, "v1")
    assert lease.owner.startswith(f"{MODEL} on ")
    models = {"v2": publish_model(tmp_path, MODEL, "v2", 2)}
    wait_for(service, "v2")
    version, found = score(service, rows)
    assert version == "v2"
    np.testing.assert_allclose(
        found["click"].to_numpy(), predictions(models["v2"], rows)["click"], rtol=1e-5, atol=1e-6
    )
    assert score(service, rows, "v1")[0] == "v1", "a job that still names the old version gets it"
    assert asyncio.run(service.score_request(rows)).version == "v2"
    pointer = Pointer(collector, MODEL, "operator")
    pointer.rollback("bad")
    wait_for(service, "v1")
    assert score(service, rows)[0] == "v1"
    with pytest.raises(SnapshotError, match="not published"):
        score(service, rows, "v9")


def test_a_version_of_an_unknown_model_is_passed_over(tmp_path, url, service, rows, caplog):
    publish_model(tmp_path, MODEL, "v2", 2)
    wait_for(service, "v2")
    metadata = open_metadata(url)
    pointer = Pointer(Collector(SnapshotStore(tmp_path), metadata), MODEL, "operator")
    pointer.pin("v2", "while v3 is made")
    publish_model(tmp_path, MODEL, "v3", 3)
    break_model(tmp_path, "v3")
    pointer.unpin()
    deadline = time.monotonic() + 20
    while "of_the_future" not in caplog.text:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert refusals(metadata, MODEL) == {}, "another's code may know it"
    assert read_current(metadata, MODEL).version == "v2"
    assert score(service, rows)[0] == "v2"


@pytest.mark.parametrize("stage", ["_encoding", "_scoring"])
def test_a_request_that_began_before_a_swap_ends_with_its_version(tmp_path, url, service, rows, monkeypatch, stage):
    threads = getattr(service, stage)
    run = threads.submit

    async def slow_submit():
        monkeypatch.setattr(threads, "submit", lambda *a: run(lambda: (swap(), a[0](*a[1:]))[1]))
        return await service.score(rows)

    def swap() -> None:
        for number in (2, 3):
            publish_model(tmp_path, MODEL, f"v{number}", number)
            deadline = time.monotonic() + 20
            while service._follower.loader.version != f"v{number}":
                assert time.monotonic() < deadline
                time.sleep(0.01)

    assert asyncio.run(slow_submit())[0] == "v1"
    deadline = time.monotonic() + 20
    while service._loader.versions() != ["v2", "v3"]:  # the loader swaps first, and drops the oldest then
        assert time.monotonic() < deadline, service._loader.versions()
        time.sleep(0.01)


def test_students_follow_where_the_config_names_a_store(tmp_path, url):
    assert student_follower(str(tmp_path), EndpointsConfig()) is None
    with pytest.raises(ValueError, match="write sqlite:///absolute/path or zookeeper"):
        EndpointsConfig(metadata="redis://x")
    publish_model(tmp_path, MODEL, "v1", 1)
    publish_model(tmp_path, MODEL, "v2", 2)
    Pointer(Collector(SnapshotStore(tmp_path), open_metadata(url)), MODEL, "operator").pin("v1", "an experiment")
    students = Students(str(tmp_path), [MODEL], EndpointsConfig(), student_follower(str(tmp_path), config(url)))
    deadline = time.monotonic() + 20
    while students.versions() != {MODEL: "v1"}:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    students.close()


def config(url: str) -> EndpointsConfig:
    return EndpointsConfig(metadata=url, poll_s=0.02)


def test_any_service_may_follow(tmp_path, url):
    metadata = open_metadata(url)
    store = SnapshotStore(tmp_path)
    follower = follow_current(store, MODEL, metadata, poll_s=60.0)
    with pytest.raises(SnapshotError, match="no version that can be served yet"):
        follower.current()
    publish_model(tmp_path, MODEL, "v1", 1)
    assert follower.refresh()
    assert follower.current().version == "v1"
    publish_model(tmp_path, MODEL, "v2", 2)
    assert follower.refresh()
    assert follower.loader.versions() == ["v2"]
    follower.close()
