"""What a scoring call can end with. `retryable` says whether the same call may succeed a little later."""

from __future__ import annotations

import dataclasses

from rayfm.config.errors import RayfmError


@dataclasses.dataclass(frozen=True)
class Reject:
    """A row of a post that was refused.

    Attributes:
        row: its position in the post, from 0.
        reason: what is wrong with it.
    """

    row: int
    reason: str


class ScoreError(RayfmError):
    """Base of every error of a scoring call.

    Args:
        message: what the service said.
        retry_after: seconds that the service asks to wait before the next try.
    """

    retryable = False

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class InvalidRequest(ScoreError):
    """The request is wrong: a column that is missing or unknown, a value that does not fit, too much (400, 413).

    Attributes:
        rejects: of a post to be labelled without one good row, its first rows with their reasons.
    """

    rejects: tuple[Reject, ...] = ()


class Unauthorized(ScoreError):
    """The token is missing or wrong (401)."""


class NotFound(ScoreError):
    """The service has no such model, teacher or version (404)."""


class Overloaded(ScoreError):
    """The service's queue is full (429)."""

    retryable = True


class Unavailable(ScoreError):
    """The service cannot answer now (503), or the connection, or the replica that scored, was lost before its reply."""

    retryable = True


class DeadlineExceeded(ScoreError):
    """No reply within the deadline (504, or the client's own clock)."""


class NotLabelled(ScoreError):
    """The rows of a post are a dead letter: they are kept, and labelled once somebody replays them."""


class ServerFault(ScoreError):
    """The service failed in a way that is not the request's fault (500), or its reply cannot be read."""


_BY_STATUS: dict[int, type[ScoreError]] = {
    400: InvalidRequest,
    401: Unauthorized,
    403: Unauthorized,
    404: NotFound,
    408: DeadlineExceeded,
    413: InvalidRequest,
    415: InvalidRequest,
    422: InvalidRequest,
    429: Overloaded,
    502: Unavailable,
    503: Unavailable,
    504: DeadlineExceeded,
}


def error_of_status(status: int, message: str, retry_after: float | None = None) -> ScoreError:
    """The typed error of an HTTP status."""
    return _BY_STATUS.get(status, ServerFault if status >= 500 else InvalidRequest)(message, retry_after)
