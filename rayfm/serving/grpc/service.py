"""The two score calls over gRPC: the same backend, limits, token and checks as over HTTP."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import grpc

from rayfm.client.proto import scoring_pb2
from rayfm.client.wire import ARROW, TIMEOUT_HEADER, Scored, write_stream
from rayfm.serving.http.app import NAME, Backend
from rayfm.serving.http.codecs import Payload
from rayfm.serving.http.config import LimitsConfig
from rayfm.serving.http.problems import Problem, problem_of
from rayfm.serving.http.queue import Deadline
from rayfm.serving.http.token import TokenCheck

CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""Status of a problem -> code of its gRPC reply."""


class Context(Protocol):
    """What is used of a call's context; Ray Serve's has it, and grpc's own."""

    def invocation_metadata(self) -> Any: ...

    def trailing_metadata(self) -> Any: ...

    def set_trailing_metadata(self, trailing_metadata: Any) -> None: ...

    def set_code(self, code: grpc.StatusCode) -> None: ...

    def set_details(self, details: str) -> None: ...


class ScoringService:
    """Answers the calls of ``scoring.proto``.

    Args:
        backend: what scores.
        limits: what a request may ask for.
        token: checks the metadata's ``authorization``.
    """

    def __init__(self, backend: Backend, limits: LimitsConfig, token: TokenCheck) -> None:
        self.backend, self.limits, self.token = backend, limits, token

    async def score_student(self, request: Any, context: Context) -> Any:
        """``ScoreStudent``."""

        async def score(deadline: Deadline) -> Scored:
            _check_names(model=request.model)
            payload = self._payload(request.user + request.candidates)
            return await self.backend.score_student(request.model, payload, deadline)

        return await self._answer(context, score)

    async def score_teacher(self, request: Any, context: Context) -> Any:
        """``ScoreTeacher``."""

        async def score(deadline: Deadline) -> Scored:
            _check_names(teacher=request.teacher, **({"version": request.version} if request.version else {}))
            payload = self._payload(request.rows)
            version = request.version or None
            return await self.backend.score_teacher(request.teacher, payload, deadline, version, request.representation)

        return await self._answer(context, score)

    def _payload(self, body: bytes) -> Payload:
        if len(body) > self.limits.max_body_bytes:
            raise Problem(413, f"the tables are larger than {self.limits.max_body_bytes} bytes; send fewer rows")
        return Payload(body, ARROW, self.limits)

    async def _answer(self, context: Context, score: Callable[[Deadline], Awaitable[Scored]]) -> Any:
        """The reply, or an empty one beside the refusal's code: an exception would be logged as a failure."""
        try:
            metadata = dict(context.invocation_metadata())
            if not self.token.allows(metadata.get("authorization")):
                raise Problem(401, "the bearer token is missing or wrong")
            scored = await score(Deadline.of_header(metadata.get(TIMEOUT_HEADER), self.limits.timeout_s))
            return scoring_pb2.ScoreReply(
                version=scored.version, predictions=write_stream(scored.predictions, scored.version)
            )
        except Exception as error:
            problem = problem_of(error)
            context.set_code(CODES.get(problem.status, grpc.StatusCode.UNKNOWN))
            context.set_details(problem.detail)
            if "Retry-After" in problem.headers:
                before = list(context.trailing_metadata() or ())
                context.set_trailing_metadata([*before, ("retry-after", problem.headers["Retry-After"])])
            return scoring_pb2.ScoreReply()


def _check_names(**names: str) -> None:
    """As the paths of HTTP are checked. Raises Problem (400)."""
    for what, name in names.items():
        if not re.fullmatch(NAME, name):
            raise Problem(400, f"{what} {name[:80]!r} is no name; use letters, digits, '.', '_' and '-', at most 128")
