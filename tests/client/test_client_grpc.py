from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pyarrow as pa
import pytest

from rayfm.client import DeadlineExceeded, GrpcClient, InvalidRequest, Overloaded, Retries, ServerFault, Unauthorized
from rayfm.client.proto import scoring_pb2, scoring_pb2_grpc
from rayfm.client.wire import write_stream

ROOT = Path(__file__).resolve().parents[2]
PREDICTIONS = pa.table({"click": pa.array([0.25, 0.5], pa.float32())})
GOOD = scoring_pb2.ScoreReply(version="v1", predictions=write_stream(PREDICTIONS))
CODE = grpc.StatusCode


class Script(scoring_pb2_grpc.ScoringServicer):
    """A service that answers as it is told."""

    def __init__(self) -> None:
        self.answers, self.requests, self.metadata = [], [], []

    def _answer(self, request, context):
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        answer = self.answers.pop(0)
        if isinstance(answer, tuple):
            code, retry_after = answer
            context.set_trailing_metadata([("retry-after", retry_after)] if retry_after else [])
            context.abort(code, "why")
        return answer

    ScoreStudent = ScoreTeacher = _answer


@pytest.fixture
def script():
    return Script()


@pytest.fixture
def client(script):
    server = grpc.server(ThreadPoolExecutor(2))
    scoring_pb2_grpc.add_ScoringServicer_to_server(script, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with GrpcClient(f"127.0.0.1:{port}", token="secret", application="rayfm-demo") as client:
        client._sleep = lambda seconds: None
        yield client
    server.stop(None)


def test_a_student_is_asked(script, client):
    script.answers = [GOOD]
    scored = client.score("vm.direct.1", {"user": 7}, {"ad": ["x", "y"]})
    assert (scored.version, scored.predictions.to_pydict()) == ("v1", PREDICTIONS.to_pydict())
    (request,) = script.requests
    assert request.model == "vm.direct.1"
    assert pa.ipc.open_stream(request.user).read_all().to_pylist() == [{"user": 7}]
    assert pa.ipc.open_stream(request.candidates).read_all().to_pydict() == {"ad": ["x", "y"]}
    metadata = script.metadata[0]
    assert (metadata["authorization"], metadata["application"]) == ("Bearer secret", "rayfm-demo")
    assert 0 < float(metadata["x-rayfm-timeout-ms"]) <= 10_000


def test_a_teacher_is_asked(script, client):
    script.answers = [GOOD]
    client.score_teacher("fm", {"ad": ["x"]}, version="v1", representation=True)
    (request,) = script.requests
    assert (request.teacher, request.version, request.representation) == ("fm", "v1", True)
    assert pa.ipc.open_stream(request.rows).read_all().to_pydict() == {"ad": ["x"]}


def test_what_may_pass_is_tried_again(script, client):
    script.answers = [(CODE.RESOURCE_EXHAUSTED, "0.1"), (CODE.UNAVAILABLE, None), GOOD]
    assert client.score("m", {}, {"ad": ["x"]}).version == "v1"
    assert len(script.requests) == 3


@pytest.mark.parametrize(
    ("answer", "kind", "tries"),
    [
        ((CODE.INVALID_ARGUMENT, None), InvalidRequest, 1),
        ((CODE.RESOURCE_EXHAUSTED, None), InvalidRequest, 1),
        ((CODE.RESOURCE_EXHAUSTED, "0"), Overloaded, 2),
        ((CODE.UNAUTHENTICATED, None), Unauthorized, 1),
        ((CODE.INTERNAL, None), ServerFault, 1),
        ((CODE.DEADLINE_EXCEEDED, None), DeadlineExceeded, 1),
        (scoring_pb2.ScoreReply(version="v1", predictions=b"x"), ServerFault, 1),
        (scoring_pb2.ScoreReply(predictions=write_stream(PREDICTIONS)), ServerFault, 1),
    ],
)
def test_errors_are_typed(script, client, answer, kind, tries):
    client.retries = Retries(attempts=2)
    script.answers = [answer] * 2
    with pytest.raises(kind):
        client.score("m", {}, {"ad": ["x"]})
    assert len(script.requests) == tries


def test_the_generated_code_is_that_of_the_proto_file(tmp_path):
    proto = "rayfm/client/proto/scoring.proto"
    assert "python -m grpc_tools.protoc -I. " + "--python_out=. --pyi_out=. --grpc_python_out=. " + proto in (
        ROOT / proto
    ).read_text().replace("// ", "")
    options = [f"--{kind}={tmp_path}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I.", *options, proto], cwd=ROOT, check=True, timeout=60
    )
    for name in ("scoring_pb2.py", "scoring_pb2.pyi", "scoring_pb2_grpc.py"):
        made = (tmp_path / "rayfm" / "client" / "proto" / name).read_text()
        assert made == (ROOT / "rayfm" / "client" / "proto" / name).read_text(), f"generate {name} again"
