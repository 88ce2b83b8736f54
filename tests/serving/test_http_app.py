from __future__ import annotations

import asyncio
import json

import pyarrow as pa
import pytest
from fastapi import APIRouter
from starlette.testclient import TestClient

from rayfm.client.wire import ARROW, JSON, PROBLEM, TIMEOUT_HEADER, VERSION_HEADER, Scored, write_stream, write_streams
from rayfm.config import DataError, SnapshotError
from rayfm.serving.http.app import create_app
from rayfm.serving.http.config import LimitsConfig
from rayfm.serving.http.problems import Problem, unavailable
from rayfm.serving.http.token import TokenCheck

TOKEN = "a-token-of-some-length"
LIMITS = LimitsConfig(max_body_mb=0.01, max_candidates=5, max_rows=5, timeout_s=5)
STUDENT = {"user": {"user": 7}, "candidates": {"ad": ["a", "b"]}}
USER, ADS = pa.table({"user": [7]}), pa.table({"ad": ["a", "b"]})


class Echo:
    """Answers with the number of rows; raises what it is told to."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.asked: list[tuple] = []
        self.ready = True

    def _scored(self, rows: int) -> Scored:
        if self.error is not None:
            raise self.error
        return Scored("v7", pa.table({"click": pa.array([0.5] * rows, pa.float32())}))

    async def score_student(self, model, payload, deadline):
        self.asked.append((model, deadline.left))
        return self._scored(payload.student()[1].num_rows)

    async def score_teacher(self, teacher, payload, deadline, version, representation):
        self.asked.append((teacher, version, representation))
        return self._scored(payload.rows().num_rows)

    async def status(self):
        return self.ready, {"models": {"m": "v7" if self.ready else None}, "teachers": {}}


@pytest.fixture
def echo():
    return Echo()


@pytest.fixture
def client(echo):
    return TestClient(create_app(echo, LIMITS), raise_server_exceptions=False)


def problem(response, status: int) -> str:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == PROBLEM
    body = response.json()
    assert set(body) == {"type", "title", "status", "detail"}
    assert body["status"] == status
    return body["detail"]


def test_json_in_json_out(client, echo):
    response = client.post("/v1/models/vm.direct.1:score", json=STUDENT)
    assert response.status_code == 200
    assert response.json() == {"version": "v7", "predictions": {"click": [0.5, 0.5]}}
    assert response.headers[VERSION_HEADER] == "v7"
    assert response.headers["content-type"] == JSON
    assert echo.asked[0][0] == "vm.direct.1"
    assert 4 < echo.asked[0][1] <= 5


def test_arrow_in_arrow_out(client):
    body = write_streams([USER, ADS])
    response = client.post("/v1/models/m:score", content=body, headers={"content-type": ARROW})
    assert (response.status_code, response.headers["content-type"]) == (200, ARROW)
    assert response.headers[VERSION_HEADER] == "v7"
    assert pa.ipc.open_stream(response.content).read_all().to_pydict() == {"click": [0.5, 0.5]}


def test_a_reply_may_be_asked_for_in_the_other_format(client):
    body = write_streams([USER, ADS])
    response = client.post("/v1/models/m:score", content=body, headers={"content-type": ARROW, "accept": JSON})
    assert response.json()["version"] == "v7"


def test_a_teacher_takes_rows(client, echo):
    response = client.post("/v1/teachers/fm:score", json={"rows": {"ad": ["a", "b", "c"]}})
    assert response.json()["predictions"] == {"click": [0.5] * 3}
    url = "/v1/teachers/fm:score?version=v3&representation=true"
    response = client.post(url, content=write_stream(ADS), headers={"content-type": ARROW})
    assert response.headers[VERSION_HEADER] == "v7"
    assert echo.asked == [("fm", None, False), ("fm", "v3", True)]


def test_every_path_needs_the_token(echo):
    client = TestClient(create_app(echo, LIMITS, TokenCheck(TOKEN)))
    for method, path in (
        ("POST", "/v1/models/m:score"),
        ("POST", "/v1/teachers/t:score"),
        ("GET", "/healthz"),
        ("GET", "/readyz"),
        ("GET", "/openapi.json"),
        ("GET", "/docs"),
        ("GET", "/nothing"),
    ):
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {TOKEN}"}):
            response = client.request(method, path, headers=headers)
            assert "bearer token" in problem(response, 401)
            assert response.headers["www-authenticate"] == "Bearer"
        assert client.request(method, path, headers={"authorization": f"Bearer {TOKEN}"}).status_code != 401
    assert echo.asked == []


def test_a_large_body_is_refused_whether_it_says_so_or_not(client, echo):
    body = b"x" * 20_000
    assert "larger than 10485 bytes" in problem(client.post("/v1/models/m:score", content=body), 413)
    parts = (body[start : start + 1000] for start in range(0, len(body), 1000))
    chunked = client.post("/v1/models/m:score", content=parts, headers={"content-type": JSON})
    problem(chunked, 413)
    problem(client.post("/v1/models/m:score", content=b"", headers={"content-length": "many"}), 400)
    assert echo.asked == []


@pytest.mark.parametrize("name", ["..", "%2e%2e", "..%2f..%2fetc", "a%2fb", ".hidden", "a%00b", "%c3%a9", "x" * 129])
def test_names_cannot_leave_their_folder(client, echo, name):
    for kind in ("models", "teachers"):
        response = client.post(f"/v1/{kind}/{name}:score", json=STUDENT)
        assert response.status_code in (400, 404)
        problem(response, response.status_code)
    assert "version" in problem(client.post(f"/v1/teachers/t:score?version={name}", json={"rows": {}}), 400)
    assert echo.asked == []


def test_what_is_wrong_with_a_request_is_said(client):
    url = "/v1/models/m:score"
    assert "lacks 'candidates'" in problem(client.post(url, json={"user": {}}), 400)
    assert "send application/vnd.apache.arrow.stream or" in problem(client.post(url, content=b"x"), 415)
    pickled = client.post(url, content=b"\x80\x04.", headers={"content-type": "application/octet-stream"})
    problem(pickled, 415)
    cut = client.post(url, content=write_streams([USER, ADS])[:-1], headers={"content-type": ARROW})
    assert "Arrow IPC" in problem(cut, 400)
    many = {"user": {}, "candidates": {"ad": ["a"] * 6}}
    assert "more than 5 rows" in problem(client.post(url, json=many), 413)
    assert TIMEOUT_HEADER in problem(client.post(url, json=STUDENT, headers={TIMEOUT_HEADER: "soon"}), 400)
    assert "representation" in problem(client.post("/v1/teachers/t:score?representation=maybe", json={"rows": {}}), 400)
    problem(client.get(url), 405)
    problem(client.post("/v1/models/m", json=STUDENT), 404)


def test_a_request_may_shorten_its_deadline(client, echo):
    client.post("/v1/models/m:score", json=STUDENT, headers={TIMEOUT_HEADER: "2000"})
    assert 0 < echo.asked[0][1] <= 2


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (DataError("row 3: column 'ad' is bad"), 400, "row 3: column 'ad' is bad"),
        (Problem(404, "no student 'm' is served"), 404, "no student 'm' is served"),
        (SnapshotError("/srv/secret/m/v1: bytes differ"), 500, "its log has the reason under"),
        (RuntimeError("/srv/secret"), 500, "its log has the reason under"),
    ],
)
def test_errors_are_problems_without_internals(client, echo, error, status, said):
    echo.error = error
    detail = problem(client.post("/v1/models/m:score", json=STUDENT), status)
    assert said in detail
    assert "secret" not in detail


def test_refusals_say_when_to_come_again(client, echo):
    echo.error = Problem(429, "full", {"Retry-After": "3"})
    assert client.post("/v1/models/m:score", json=STUDENT).headers["retry-after"] == "3"
    echo.error = unavailable("not yet", 5)
    response = client.post("/v1/models/m:score", json=STUDENT)
    problem(response, 503)
    assert response.headers["retry-after"] == "5"


def test_health_and_readiness(client, echo):
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"ready": True, "models": {"m": "v7"}, "teachers": {}}
    echo.ready = False
    response = client.get("/readyz")
    assert (response.status_code, response.json()["ready"]) == (503, False)


def test_the_openapi_document_has_every_endpoint(echo):
    document = TestClient(create_app(echo, LIMITS)).get("/openapi.json").json()
    assert set(document["paths"]) == {
        "/v1/models/{model}:score",
        "/v1/teachers/{teacher}:score",
        "/healthz",
        "/readyz",
    }
    score = document["paths"]["/v1/models/{model}:score"]["post"]
    assert set(score["requestBody"]["content"]) == {JSON, ARROW}
    assert {"200", "400", "401", "404", "413", "415", "429", "500", "503", "504"} <= set(score["responses"])
    assert "422" not in score["responses"]
    assert "security" not in document
    assert json.dumps(document).count("#/components/schemas/Problem") > 10
    assert "Problem" in document["components"]["schemas"]
    headers = {"authorization": f"Bearer {TOKEN}"}
    client = TestClient(create_app(echo, LIMITS, TokenCheck(TOKEN)), headers=headers)
    assert client.get("/openapi.json").json()["security"] == [{"token": []}]
    assert "swagger" in client.get("/docs").text


def test_further_endpoints_pass_the_same_guard(echo):
    router = APIRouter()

    @router.get("/v1/labels/{ticket}")
    async def ticket(ticket: str) -> dict[str, str]:
        if ticket == "none":
            raise DataError("no such ticket")
        return {"ticket": ticket}

    client = TestClient(create_app(echo, LIMITS, TokenCheck(TOKEN), [router]))
    problem(client.get("/v1/labels/7"), 401)
    client.headers["authorization"] = f"Bearer {TOKEN}"
    assert client.get("/v1/labels/7").json() == {"ticket": "7"}
    assert problem(client.get("/v1/labels/none"), 400) == "no such ticket"


def test_a_caller_that_leaves_is_not_an_error(echo):
    """Cancelling a request must reach the work behind it, not become a reply."""
    started, cancelled = asyncio.Event(), []

    class Slow(Echo):
        async def score_student(self, model, payload, deadline):
            started.set()
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled.append(model)
                raise

    app = create_app(Slow(), LIMITS)

    async def main():
        sent = []
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/models/m:score",
            "raw_path": b"/v1/models/m:score",
            "query_string": b"",
            "headers": [(b"content-type", JSON.encode())],
        }

        async def receive():
            return {"type": "http.request", "body": json.dumps(STUDENT).encode(), "more_body": False}

        async def send(message):
            sent.append(message)

        task = asyncio.ensure_future(app(scope, receive, send))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return sent

    assert asyncio.run(main()) == []
    assert cancelled == ["m"]


def test_a_body_that_does_not_come_is_not_waited_for(echo):
    """Neither for ever, nor in a place of those that score."""
    app = create_app(echo, LIMITS)
    sent = []

    async def never():
        await asyncio.sleep(3600)

    async def send(message):
        sent.append(message)

    headers = [(b"content-type", ARROW.encode()), (TIMEOUT_HEADER.encode(), b"50")]
    scope = {
        "type": "http", "method": "POST", "path": "/v1/models/m:score", "raw_path": b"", "query_string": b"",
        "headers": headers, "root_path": "", "scheme": "http", "http_version": "1.1", "client": None, "server": None,
    }  # fmt: skip
    asyncio.run(asyncio.wait_for(app(scope, never, send), 10))
    assert sent[0]["status"] == 504
    assert echo.asked == []
