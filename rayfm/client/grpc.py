"""The gRPC client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import pyarrow as pa

from rayfm.client.call import Caller
from rayfm.client.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    Overloaded,
    ScoreError,
    ServerFault,
    Unauthorized,
    Unavailable,
)
from rayfm.client.proto import scoring_pb2, scoring_pb2_grpc
from rayfm.client.retry import Retries, parse_retry_after
from rayfm.client.wire import TIMEOUT_HEADER, Columns, Scored, to_row, to_table, write_stream

_BY_CODE: dict[grpc.StatusCode, type[ScoreError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.UNAUTHENTICATED: Unauthorized,
    grpc.StatusCode.PERMISSION_DENIED: Unauthorized,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
}

MAX_REPLY_BYTES = 256 * 2**20


class GrpcClient(Caller):
    """Asks for scores over gRPC. One client may be shared by threads.

    Args:
        target: where the service is: ``127.0.0.1:9000``.
        token: the bearer token. gRPC always needs one.
        timeout_s: seconds in which a call ends, its retries included.
        retries: when to try again.
        application: name of the Serve application, where a cluster runs several.
        credentials: for TLS; by default the channel is not encrypted.
    """

    def __init__(
        self,
        target: str,
        token: str | None = None,
        timeout_s: float = 10.0,
        retries: Retries | None = None,
        application: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        super().__init__(timeout_s, retries)
        options = [("grpc.max_receive_message_length", MAX_REPLY_BYTES), ("grpc.max_send_message_length", -1)]
        if credentials is None:
            self._channel = grpc.insecure_channel(target, options)
        else:
            self._channel = grpc.secure_channel(target, credentials, options)
        self._stub: Any = scoring_pb2_grpc.ScoringStub(self._channel)
        self._metadata = [("authorization", f"Bearer {token}")] if token is not None else []
        self._metadata += [("application", application)] if application is not None else []

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def score(self, model: str, user: Columns, candidates: Columns, timeout_s: float | None = None) -> Scored:
        """A student's predictions; as `rayfm.client.Client.score`."""
        request = scoring_pb2.ScoreStudentRequest(
            model=model, user=_bytes(to_row, user), candidates=_bytes(to_table, candidates)
        )
        return self._score(self._stub.ScoreStudent, request, timeout_s)

    def score_teacher(
        self,
        teacher: str,
        rows: Columns,
        version: str | None = None,
        representation: bool = False,
        timeout_s: float | None = None,
    ) -> Scored:
        """A teacher's predictions; as `rayfm.client.Client.score_teacher`."""
        request = scoring_pb2.ScoreTeacherRequest(
            teacher=teacher, version=version or "", rows=_bytes(to_table, rows), representation=representation
        )
        return self._score(self._stub.ScoreTeacher, request, timeout_s)

    def _score(self, method: Any, request: Any, timeout_s: float | None) -> Scored:
        def send(left: float) -> Scored:
            metadata = [*self._metadata, (TIMEOUT_HEADER, f"{left * 1000:.0f}")]
            try:
                return _scored(method(request, timeout=left, metadata=metadata))
            except grpc.RpcError as error:
                raise _error(error) from None

        return self._call(send, timeout_s)


def _bytes(make: Callable[[Columns], pa.Table], columns: Columns) -> bytes:
    try:
        return write_stream(make(columns))
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise InvalidRequest(f"the columns are no table: {error}") from None


def _error(error: Any) -> ScoreError:
    trailing = dict(error.trailing_metadata() or ())
    kind = _BY_CODE.get(error.code(), ServerFault)
    retry_after = parse_retry_after(trailing.get("retry-after"))
    if kind is Overloaded and retry_after is None:
        kind = InvalidRequest  # gRPC has one code for too large and for too busy; only the latter passes
    return kind(f"{error.details()} ({error.code().name})", retry_after)


def _scored(reply: Any) -> Scored:
    if not reply.version:
        raise ServerFault("the reply names no version")
    try:
        return Scored(reply.version, pa.ipc.open_stream(reply.predictions).read_all())
    except (pa.ArrowException, OSError) as error:
        raise ServerFault(f"the reply cannot be read: {error}") from None
