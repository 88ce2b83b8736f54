"""Errors as JSON problem details (RFC 9457), without internals: no paths, no tracebacks."""

from __future__ import annotations

import http
import logging
import uuid
from collections.abc import Mapping

from starlette.responses import JSONResponse

from rayfm.client.wire import PROBLEM
from rayfm.config import DataError

log = logging.getLogger(__name__)


class Problem(Exception):
    """A refused request.

    Args:
        status: the HTTP status.
        detail: one sentence for the caller: what is wrong and what to do.
        headers: response headers, e.g. ``Retry-After``.
    """

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, dict(headers or {})

    def __reduce__(self) -> tuple[type[Problem], tuple[int, str, dict[str, str]]]:
        # Exceptions are pickled by their `args`, which here are not the constructor's.
        return Problem, (self.status, self.detail, self.headers)

    def response(self) -> JSONResponse:
        """The problem as a response."""
        body = {
            "type": "about:blank",
            "title": http.HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
        }
        return JSONResponse(body, self.status, self.headers, PROBLEM)


def unavailable(detail: str, retry_after: float = 1.0) -> Problem:
    """503: try again a little later."""
    return Problem(503, detail, {"Retry-After": f"{max(1, round(retry_after))}"})


def problem_of(error: BaseException) -> Problem:
    """What a caller is told about an exception.

    A `DataError` is about the request and is told as it is. Anything else is logged under a number, and only that
    number leaves the process.
    """
    if isinstance(error, Problem):
        return error
    if isinstance(error, DataError):
        return Problem(400, str(error))
    number = uuid.uuid4().hex[:12]
    log.error("request failed (%s)", number, exc_info=error)
    return Problem(500, f"the service failed; its log has the reason under {number}")
