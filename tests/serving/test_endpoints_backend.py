from __future__ import annotations

import asyncio
import os
import socket
import sys

import numpy as np
import pytest
import servers
from example_store import every_feature_rows
from served_models import LocalTeacher, as_examples, candidate_rows, predictions, publish_model, user_row

from rayfm.client.wire import ARROW, Scored, write_stream, write_streams
from rayfm.config import ConfigError, DataError, SnapshotError
from rayfm.export.config import CompileConfig
from rayfm.serving.backend import ScoringBackend
from rayfm.serving.endpoints import EndpointsPlan, endpoints_name, start_endpoints
from rayfm.serving.http.codecs import Payload
from rayfm.serving.http.config import EndpointsConfig, LimitsConfig
from rayfm.serving.http.problems import Problem
from rayfm.serving.http.queue import Deadline
from rayfm.serving.production import GRPC_MESSAGE, HA_PROXY, enable_production, limit_messages
from rayfm.serving.proxies import check_port
from rayfm.serving.student import Students

STUDENT, TEACHER = "vm.direct.1", "fm.teacher.0"
USER, CANDIDATES = user_row(), candidate_rows(6)
ROWS = every_feature_rows(8, seed=2)
LIMITS = LimitsConfig(max_queue=2)


class Told:
    """A teacher's service that does as it is told."""

    def __init__(self, error: Exception | None = None, gate: asyncio.Event | None = None) -> None:
        self.error, self.gate = error, gate

    async def score(self, rows, version, representation):
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        return Scored("v1", rows)

    async def version(self):
        if self.error is not None:
            raise self.error
        return "v1"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def models(root):
    return {name: publish_model(root, name, "v1", seed) for seed, name in enumerate((STUDENT, TEACHER))}


@pytest.fixture
def students(root, models):
    service = Students(str(root), (STUDENT,), EndpointsConfig(limits=LIMITS, compile=CompileConfig(compile="eager")))
    yield service
    service.close()


def teach(backend: ScoringBackend, name: str = "fm", version: str | None = None, seconds: float = 20.0, body=None):
    payload = Payload(write_stream(ROWS) if body is None else body, ARROW, LIMITS)
    return asyncio.run(backend.score_teacher(name, payload, Deadline(seconds), version, False))


def test_students_and_teachers_give_their_models_predictions(root, models, students):
    backend = ScoringBackend(students, {"fm": LocalTeacher(root, TEACHER)}, LIMITS)
    taught = teach(backend)
    np.testing.assert_allclose(
        taught.predictions["click"].to_numpy(), predictions(models[TEACHER], ROWS)["click"], rtol=1e-5, atol=1e-6
    )
    payload = Payload(write_streams([USER, CANDIDATES]), ARROW, LIMITS)
    scored = asyncio.run(backend.score_student(STUDENT, payload, Deadline(20)))
    expected = predictions(models[STUDENT], as_examples(USER, CANDIDATES))["click"]
    np.testing.assert_allclose(scored.predictions["click"].to_numpy(), expected, rtol=1e-5, atol=1e-6)
    ready, found = asyncio.run(backend.status())
    assert ready
    assert found == {"models": {STUDENT: "v1"}, "teachers": {"fm": "v1"}}


def test_a_teachers_version_may_be_named(root, models, students):
    backend = ScoringBackend(students, {"fm": LocalTeacher(root, TEACHER)}, LIMITS)
    assert teach(backend, version="v1").version == "v1"
    for version in ("v9", "../v1"):
        with pytest.raises(Problem, match="has no version") as missing:
            teach(backend, version=version)
        assert missing.value.status == 404
        assert str(root) not in missing.value.detail


@pytest.mark.parametrize(
    ("error", "status"),
    [(SnapshotError("/root"), 503), (Problem(429, "busy"), 429), (DataError("row 1 is bad"), None)],
)
def test_what_a_teacher_refuses_is_told(students, error, status):
    backend = ScoringBackend(students, {"fm": Told(error)}, LIMITS)
    with pytest.raises((Problem, DataError)) as told:
        teach(backend)
    assert getattr(told.value, "status", None) == status
    assert "/root" not in str(told.value)
    assert asyncio.run(backend.status()) == (False, {"models": students.versions(), "teachers": {"fm": None}})


def test_only_the_given_teachers_are_asked(students):
    backend = ScoringBackend(students, {"fm": Told()}, LIMITS)
    with pytest.raises(Problem, match="no teacher 'fn' is served; known: fm") as unknown:
        teach(backend, "fn")
    assert unknown.value.status == 404
    with pytest.raises(DataError, match="Arrow IPC"):
        teach(backend, body=b"x")


def test_a_teacher_is_waited_for_until_the_deadline_and_by_so_many(students):
    async def main():
        gate = asyncio.Event()
        backend = ScoringBackend(students, {"fm": Told(gate=gate)}, LIMITS)
        payload = Payload(write_stream(ROWS), ARROW, LIMITS)

        def ask(seconds):
            return backend.score_teacher("fm", payload, Deadline(seconds), None, False)

        with pytest.raises(Problem) as late:
            await ask(0.2)
        waiting = [asyncio.ensure_future(ask(20)) for _ in range(2)]
        await asyncio.sleep(0.2)
        with pytest.raises(Problem) as full:
            await ask(20)
        gate.set()
        assert [(await scored).version for scored in waiting] == ["v1", "v1"]
        assert (await ask(20)).version == "v1"
        return late.value.status, full.value.status

    assert asyncio.run(main()) == (504, 429)


def test_others_are_not_let_in_without_a_token(root):
    plan = EndpointsPlan(
        run="demo", root=str(root), students=(), teachers=(), endpoints=EndpointsConfig(host="0.0.0.0")
    )
    with pytest.raises(ConfigError, match="needs a token"):
        start_endpoints(plan, None)
    assert endpoints_name("demo") == "rayfm-demo"


def test_production_has_to_come_before_ray_serve(monkeypatch):
    monkeypatch.setenv(HA_PROXY, "0")
    monkeypatch.setitem(sys.modules, "ray.serve", sys)
    with pytest.raises(ConfigError, match=f"set {HA_PROXY}=1 before the start"):
        enable_production()
    monkeypatch.delitem(sys.modules, "ray.serve")
    with pytest.raises(ConfigError, match=f"start its nodes and this command with {HA_PROXY}=1"):
        enable_production("ray://cluster")
    enable_production()
    assert os.environ[HA_PROXY] == "1"
    enable_production("ray://cluster")


def test_messages_of_grpc_are_bounded_unless_an_operator_said_otherwise(monkeypatch):
    monkeypatch.delenv(GRPC_MESSAGE, raising=False)
    limit_messages(100 * 2**20)
    assert os.environ[GRPC_MESSAGE] == str(200 * 2**20)
    limit_messages(1)
    assert os.environ[GRPC_MESSAGE] == str(200 * 2**20)
    monkeypatch.setenv(GRPC_MESSAGE, "5")
    limit_messages(1)
    assert os.environ[GRPC_MESSAGE] == "5"


def test_ports_are_tried_in_both_families():
    check_port("127.0.0.1", servers.free_port())
    if socket.has_ipv6:
        check_port("::1", servers.free_port())
