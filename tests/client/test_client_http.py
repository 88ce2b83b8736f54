from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading

import httpx
import numpy as np
import pyarrow as pa
import pytest

from rayfm.client import (
    Client,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    Retries,
    ServerFault,
    Unauthorized,
    Unavailable,
)
from rayfm.client.wire import ARROW, JSON, PROBLEM, write_stream

PREDICTIONS = pa.table({"click": pa.array([0.25, 0.5], pa.float32())})


def reply(media: str = ARROW, version: str | None = "v1") -> httpx.Response:
    headers = {"content-type": media} | ({} if version is None else {"x-rayfm-version": version})
    if media == ARROW:
        return httpx.Response(200, headers=headers, content=write_stream(PREDICTIONS))
    return httpx.Response(200, headers=headers, json={"version": version, "predictions": PREDICTIONS.to_pydict()})


def refusal(status: int, detail: str = "no", **headers: str) -> httpx.Response:
    headers = {"content-type": PROBLEM} | headers
    return httpx.Response(status, headers=headers, json={"detail": detail, "status": status})


class Script:
    """A service that answers, or fails, as it is told; the clock stands still but for the client's waits."""

    def __init__(self, *answers) -> None:
        self.answers, self.requests, self.now = list(answers), [], 0.0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def client(self, **options) -> Client:
        client = Client("http://service", transport=httpx.MockTransport(self), **options)
        client._clock = lambda: self.now
        client._sleep = self.sleep
        return client

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def score(client: Client, **options):
    return client.score("vm.direct.1", {"user": 7, "history": ["a"]}, {"ad": ["x", "y"]}, **options)


def test_arrow_by_default():
    script = Script(reply())
    scored = score(script.client(token="secret-token"))
    assert (scored.version, scored.predictions.to_pydict()) == ("v1", PREDICTIONS.to_pydict())
    (request,) = script.requests
    assert str(request.url) == "http://service/v1/models/vm.direct.1:score"
    assert request.headers["authorization"] == "Bearer secret-token"
    assert (request.headers["content-type"], request.headers["accept"]) == (ARROW, ARROW)
    assert request.headers["x-rayfm-timeout-ms"] == "10000"
    source = pa.BufferReader(request.content)
    assert pa.ipc.open_stream(source).read_all().to_pylist() == [{"user": 7, "history": ["a"]}]
    assert pa.ipc.open_stream(source).read_all().to_pydict() == {"ad": ["x", "y"]}


def test_json_when_asked_for():
    script = Script(reply(JSON))
    scored = score(script.client(arrow=False))
    assert scored.predictions.schema.field("click").type == pa.float32()
    assert json.loads(script.requests[0].content) == {
        "user": {"user": 7, "history": ["a"]},
        "candidates": {"ad": ["x", "y"]},
    }
    assert "authorization" not in script.requests[0].headers


def test_tables_and_arrays_do_as_well():
    script = Script(reply(), reply())
    client = script.client()
    client.score("m", pa.table({"user": [7]}), {"price": np.array([1.0, 2.0], np.float32)})
    client.score_teacher("fm", pa.table({"ad": ["x"]}), version="v1", representation=True)
    assert str(script.requests[1].url).endswith("/v1/teachers/fm:score?version=v1&representation=true")
    assert pa.ipc.open_stream(script.requests[1].content).read_all().to_pydict() == {"ad": ["x"]}


@pytest.mark.parametrize("arrow", [True, False])
def test_items_are_retrieved(arrow):
    items = {"id": ["b", "a"], "score": [0.5, 0.25]}
    answer = httpx.Response(
        200, headers={"content-type": JSON, "x-rayfm-version": "v1"}, json={"version": "v1", "predictions": items}
    )
    script = Script(answer)
    found = script.client(arrow=arrow).retrieve("towers.none.1", {"user": 7}, k=2, exclude=["c"], task="click")
    assert found.predictions.to_pydict() == items
    (request,) = script.requests
    assert str(request.url) == "http://service/v1/models/towers.none.1:retrieve?k=2&task=click"
    if arrow:
        source = pa.BufferReader(request.content)
        assert pa.ipc.open_stream(source).read_all().to_pylist() == [{"user": 7}]
        assert pa.ipc.open_stream(source).read_all().to_pydict() == {"exclude": ["c"]}
    else:
        assert json.loads(request.content) == {"user": {"user": 7}, "exclude": ["c"]}


def test_what_may_pass_is_tried_again():
    lost = httpx.ReadError("reset"), httpx.ConnectError("refused"), httpx.RemoteProtocolError("closed")
    script = Script(refusal(429, **{"retry-after": "2"}), *lost, reply())
    assert score(script.client()).version == "v1"
    assert len(script.requests) == 5
    assert len({request.content for request in script.requests}) == 1
    assert 2.0 <= script.now < 5.0


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        (refusal(400, "row 3: column 'ad' is bad"), InvalidRequest, "row 3: column 'ad' is bad"),
        (refusal(401), Unauthorized, "401"),
        (refusal(500), ServerFault, "500"),
        (refusal(504), DeadlineExceeded, "504"),
        (httpx.ReadTimeout("slow"), DeadlineExceeded, "deadline"),
        (httpx.Response(502, text="<html>"), Unavailable, "<html>"),
        (reply(version=None), ServerFault, "names no version"),
        (
            httpx.Response(200, headers={"x-rayfm-version": "v", "content-type": ARROW}, content=b"x"),
            ServerFault,
            "read",
        ),
        (
            httpx.Response(200, headers={"x-rayfm-version": "v", "content-type": JSON}, content=b"x"),
            ServerFault,
            "read",
        ),
    ],
)
def test_errors_are_typed(answer, kind, said):
    script = Script(answer)
    with pytest.raises(kind, match=said):
        score(script.client(retries=Retries(attempts=1)))


@pytest.mark.parametrize("answer", [httpx.Response(500, text="Internal Server Error"), httpx.Response(500, json={})])
def test_a_replica_that_died_with_a_request_is_asked_for_again(answer):
    script = Script(answer, reply())
    assert score(script.client()).version == "v1"
    with pytest.raises(Unavailable, match="the replica was lost"):
        score(Script(answer).client(retries=Retries(attempts=1)))


@pytest.mark.parametrize("status", [400, 401, 404, 413, 500, 504])
def test_what_will_not_pass_is_not_tried_again(status):
    script = Script(refusal(status), reply())
    with pytest.raises(Exception, match=str(status)):
        score(script.client())
    assert len(script.requests) == 1


def test_tries_end():
    script = Script(*[refusal(503, **{"retry-after": "1"})] * 3)
    with pytest.raises(Unavailable):
        score(script.client(retries=Retries(attempts=3)))
    assert len(script.requests) == 3


def test_a_wait_past_the_deadline_is_not_begun():
    script = Script(refusal(429, **{"retry-after": "5"}))
    with pytest.raises(Overloaded):
        score(script.client(), timeout_s=3.0)
    assert script.now == 0.0


def test_each_try_has_what_is_left_of_the_deadline():
    script = Script(refusal(503, **{"retry-after": "1"}), reply())
    score(script.client(retries=Retries(jitter=0.0)))
    assert [request.headers["x-rayfm-timeout-ms"] for request in script.requests] == ["10000", "9000"]


class Drip(httpx.SyncByteStream):
    """A reply that comes in pieces, each some seconds after the one before."""

    def __init__(self, script: Script, body: bytes, every_s: float) -> None:
        self.script, self.body, self.every_s, self.closed = script, body, every_s, False

    def __iter__(self):
        for position in range(len(self.body)):
            self.script.now += self.every_s
            yield self.body[position : position + 1]

    def close(self) -> None:
        self.closed = True


def test_a_reply_that_drips_ends_with_the_deadline():
    script = Script()
    whole = reply()
    drips = [Drip(script, whole.content, seconds) for seconds in (1.0, 0.001)]
    script.answers += [httpx.Response(200, headers=whole.headers, stream=drip) for drip in drips]
    client = script.client()
    with pytest.raises(DeadlineExceeded):
        score(client)
    assert script.now == 10.0
    assert drips[0].closed
    assert score(client).predictions.equals(PREDICTIONS)


def test_each_phase_has_what_the_ones_before_it_have_left():
    script, given = Script(), []

    def answer(request: httpx.Request) -> httpx.Response:
        for phase, seconds in (("pool", 1.0), ("connect", 4.0), ("write", 7.0), ("read", 0.0)):
            given.append(request.extensions["timeout"].get(phase))
            script.now += seconds
        return reply()

    client = Client("http://service", transport=httpx.MockTransport(answer))
    client._clock = lambda: script.now
    with pytest.raises(DeadlineExceeded):
        score(client)
    assert given == [10.0, 9.0, 5.0, 0.001]


@pytest.mark.parametrize("beginning", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"])
def test_a_service_that_falls_silent_is_not_waited_for_longer(beginning):
    over = threading.Event()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(beginning)
            over.wait(20)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        with Client(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout_s=0.3) as client:
            with pytest.raises(DeadlineExceeded):
                score(client)
            assert not over.is_set()
        over.set()
        thread.join()


def test_columns_that_are_no_table_are_refused_here():
    client = Script().client()
    with pytest.raises(InvalidRequest, match="no table"):
        client.score("m", {}, {"a": [1], "b": [1, 2]})
    with pytest.raises(InvalidRequest, match="no table"):
        client.score("m", {"a": 2**70}, {"b": [1]})
    with pytest.raises(InvalidRequest, match="no table"):
        Script().client(arrow=False).score_teacher("t", {"a": [float("nan")]})


def test_readiness():
    body = {"ready": False, "models": {}, "teachers": {}}
    script = Script(httpx.Response(503, json=body), refusal(401), httpx.ConnectError("refused"))
    client = script.client()
    assert client.ready() == body
    with pytest.raises(Unauthorized):
        client.ready()
    with pytest.raises(Unavailable):
        client.ready()


def test_the_client_needs_neither_torch_nor_ray():
    program = (
        "import sys; import rayfm.client.http, rayfm.client.grpc; from rayfm.client import Client, GrpcClient; "
        "heavy = {'torch', 'ray', 'pandas', 'torchrec', 'fastapi'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
