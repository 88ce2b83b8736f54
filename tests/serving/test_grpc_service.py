"""The gRPC service and its client over a real connection, without Ray."""

from __future__ import annotations

import asyncio
import threading

import grpc
import numpy as np
import pytest
from example_store import every_feature_rows
from served_models import LocalTeacher, as_examples, candidate_rows, predictions, publish_model, user_row

from rayfm.client import DeadlineExceeded, GrpcClient, InvalidRequest, NotFound, Overloaded, Retries, Unauthorized
from rayfm.client.proto import scoring_pb2, scoring_pb2_grpc
from rayfm.export.config import CompileConfig
from rayfm.serving.backend import ScoringBackend
from rayfm.serving.grpc.service import ScoringService
from rayfm.serving.http.config import EndpointsConfig, LimitsConfig
from rayfm.serving.http.problems import Problem
from rayfm.serving.http.token import TokenCheck
from rayfm.serving.student import Students

TOKEN = "a-token-of-some-length"
STUDENT, TEACHER = "vm.direct.1", "fm.teacher.0"
LIMITS = LimitsConfig(max_body_mb=0.02, max_candidates=50)
USER, CANDIDATES = user_row(), candidate_rows(6)


class Server:
    """A server with an event loop of its own, and what it serves."""

    def __init__(self, service: ScoringService) -> None:
        self.service = service
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        asyncio.run_coroutine_threadsafe(self._start(), self.loop).result(20)

    async def _start(self) -> None:
        self.server = grpc.aio.server()
        scoring_pb2_grpc.add_ScoringServicer_to_server(self, self.server)
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        await self.server.start()

    async def ScoreStudent(self, request, context):
        return await self.service.score_student(request, context)

    async def ScoreTeacher(self, request, context):
        return await self.service.score_teacher(request, context)

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self.server.stop(None), self.loop).result(20)
        self.loop.call_soon_threadsafe(self.loop.stop)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    return root, {name: publish_model(root, name, "v1", seed) for seed, name in enumerate((STUDENT, TEACHER))}


@pytest.fixture(scope="module")
def server(models):
    students = Students(
        str(models[0]), (STUDENT,), EndpointsConfig(limits=LIMITS, compile=CompileConfig(compile="eager"))
    )
    backend = ScoringBackend(students, {"fm": LocalTeacher(models[0], TEACHER)}, LIMITS)
    server = Server(ScoringService(backend, LIMITS, TokenCheck(TOKEN)))
    yield server
    server.stop()
    backend.close()


@pytest.fixture
def client(server):
    with GrpcClient(f"127.0.0.1:{server.port}", TOKEN, retries=Retries(attempts=1)) as client:
        yield client


def test_both_calls_give_the_models_predictions(models, client):
    scored = client.score(STUDENT, USER, CANDIDATES)
    assert scored.version == "v1"
    expected = predictions(models[1][STUDENT], as_examples(USER, CANDIDATES))["click"]
    np.testing.assert_allclose(scored.predictions["click"].to_numpy(), expected, rtol=1e-5, atol=1e-6)
    rows = every_feature_rows(5, seed=1)
    taught = client.score_teacher("fm", rows, representation=True)
    expected = predictions(models[1][TEACHER], rows)["click"]
    np.testing.assert_allclose(taught.predictions["click"].to_numpy(), expected, rtol=1e-5, atol=1e-6)
    assert "representation" in taught.predictions.column_names


@pytest.mark.parametrize("token", [None, "wrong", TOKEN + "x"])
def test_every_call_needs_the_token(server, token):
    with GrpcClient(f"127.0.0.1:{server.port}", token) as client:
        with pytest.raises(Unauthorized, match="bearer token"):
            client.score(STUDENT, USER, CANDIDATES)
        with pytest.raises(Unauthorized, match="bearer token"):
            client.score_teacher("fm", CANDIDATES)


def test_refusals_are_typed(client):
    with pytest.raises(NotFound, match="no student"):
        client.score("other", USER, CANDIDATES)
    with pytest.raises(NotFound, match="has no version"):
        client.score_teacher("fm", every_feature_rows(5, seed=1), version="v9")
    with pytest.raises(InvalidRequest, match="lacks column 'tags'"):
        client.score(STUDENT, USER, CANDIDATES.drop_columns(["tags"]))
    with pytest.raises(InvalidRequest, match="more than 50 rows"):
        client.score(STUDENT, USER, candidate_rows(51))
    with pytest.raises(InvalidRequest, match="larger than 20971 bytes"):
        client.score_teacher("fm", every_feature_rows(500, seed=1))


def test_malformed_tables_are_refused(client):
    for user, candidates in ((b"", b""), (b"x" * 99, b"y"), (b"\xff" * 64, b"\xff" * 64)):
        request = scoring_pb2.ScoreStudentRequest(model=STUDENT, user=user, candidates=candidates)
        with pytest.raises(InvalidRequest, match="Arrow IPC"):
            client._score(client._stub.ScoreStudent, request, None)


def test_a_full_queue_says_when_to_come_again(server, client, monkeypatch):
    async def full(*arguments):
        raise Problem(429, "full", {"Retry-After": "3"})

    monkeypatch.setattr(server.service.backend, "score_student", full)
    with pytest.raises(Overloaded, match="full") as busy:
        client.score(STUDENT, USER, CANDIDATES)
    assert busy.value.retry_after == 3.0


def test_deadlines_and_failures_have_their_codes(server, client, monkeypatch):
    asked = []

    async def late(model, payload, deadline):
        asked.append(deadline.left)
        raise Problem(504, "too late")

    monkeypatch.setattr(server.service.backend, "score_student", late)
    with pytest.raises(DeadlineExceeded, match="too late"):
        client.score(STUDENT, USER, CANDIDATES, timeout_s=3.0)
    assert 0 < asked[0] <= 3.0

    async def broken(*arguments):
        raise RuntimeError("/srv/secret")

    monkeypatch.setattr(server.service.backend, "score_student", broken)
    with pytest.raises(Exception, match="its log has the reason") as failed:
        client.score(STUDENT, USER, CANDIDATES)
    assert "secret" not in str(failed.value)


def test_names_are_checked_as_paths_are(client):
    for name in ("../vm", "a" * 129, ""):
        with pytest.raises(InvalidRequest, match="is no name; use letters"):
            client.score(name, USER, CANDIDATES)
        with pytest.raises(InvalidRequest, match="is no name; use letters"):
            client.score_teacher(name, every_feature_rows(2, seed=1))
    with pytest.raises(InvalidRequest, match=r"version 'v1/\.\./v2' is no name"):
        client.score_teacher("fm", every_feature_rows(2, seed=1), version="v1/../v2")
