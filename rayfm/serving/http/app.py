"""The HTTP app: routes, OpenAPI pages, and the guard that every request passes. Knows nothing of Ray or of models.

An endpoint that other parts add (labelling, retrieval) is an `APIRouter` given to `create_app`: token, body limit and
problem details hold for it too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, FastAPI, Path, Query
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayfm.client.wire import ARROW, JSON, PROBLEM, TIMEOUT_HEADER, VERSION_HEADER, Scored
from rayfm.serving.http.codecs import Payload, encode, media_of, reply_headers, reply_media
from rayfm.serving.http.config import LimitsConfig
from rayfm.serving.http.problems import Problem, problem_of
from rayfm.serving.http.queue import Deadline, too_late
from rayfm.serving.http.token import TokenCheck

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$"
"""Names of models, teachers and versions: they cannot hold a slash or begin with a dot."""


class Backend(Protocol):
    """What scores. Each method raises `Problem` or `DataError` for what the caller is to be told."""

    async def score_student(self, model: str, payload: Payload, deadline: Deadline) -> Scored:
        """Predictions for the request's candidates."""
        ...

    async def score_teacher(
        self, teacher: str, payload: Payload, deadline: Deadline, version: str | None, representation: bool
    ) -> Scored:
        """Predictions for the request's rows, by a version (by default the current one)."""
        ...

    async def status(self) -> tuple[bool, Mapping[str, Any]]:
        """Whether all is ready to answer, and what is: ``{"models": {name: version}, "teachers": ...}``."""
        ...


class Guard:
    """ASGI middleware: the token, the body's size, and problem details for whatever goes wrong behind it.

    Args:
        app: what it guards.
        token: who may pass.
        limits: how large a body may be.
    """

    def __init__(self, app: ASGIApp, token: TokenCheck, limits: LimitsConfig) -> None:
        self.app, self.token, self.limit = app, token, limits.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            headers = dict(scope["headers"])
            if not self.token.allows(headers.get(b"authorization")):
                raise Problem(401, "the bearer token is missing or wrong", {"WWW-Authenticate": "Bearer"})
            self._check_length(headers.get(b"content-length"))
            await self.app(scope, self._counted(receive), sending)
        except Exception as error:
            if started:  # too late to say it otherwise than by breaking off
                raise
            await problem_of(error).response()(scope, receive, send)

    def _too_large(self) -> Problem:
        return Problem(413, f"the body is larger than {self.limit} bytes; send fewer rows at a time")

    def _check_length(self, text: bytes | None) -> None:
        if text is None:
            return
        if not text.isdigit() or len(text) > 18:
            raise Problem(400, "header content-length is no number")
        if int(text) > self.limit:
            raise self._too_large()

    def _counted(self, receive: Receive) -> Receive:
        received = 0

        async def counting() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.limit:
                raise self._too_large()
            return message

        return counting


def _problem(what: str) -> dict[str, Any]:
    return {"description": what, "content": {PROBLEM: {"schema": {"$ref": "#/components/schemas/Problem"}}}}


RESPONSES: dict[int | str, dict[str, Any]] = {
    400: _problem("The request is wrong; the detail names the column and what to do."),
    401: _problem("The bearer token is missing or wrong."),
    404: _problem("No such model, teacher or version."),
    413: _problem("Too large: the body, its rows or its lists."),
    415: _problem("Neither Arrow IPC nor JSON, or compressed."),
    429: _problem("The queue is full; Retry-After says how many seconds to wait."),
    500: _problem("The service failed; its log says why under the number given."),
    503: _problem("No version can answer yet, or a replica was lost; try again."),
    504: _problem("No answer within the deadline."),
    "4XX": _problem("Any other refusal."),
}
"""What any endpoint may answer besides 200, for its OpenAPI document."""

_VALUES: dict[str, Any] = {"type": "array", "items": {}, "description": "A value a row; null where it is unknown."}
_COLUMNS: dict[str, Any] = {"type": "object", "additionalProperties": _VALUES}
_STUDENT_BODY: dict[str, Any] = {
    "type": "object",
    "required": ["user", "candidates"],
    "additionalProperties": False,
    "properties": {
        "user": {"type": "object", "description": "Feature -> value, shared by all candidates."},
        "candidates": {**_COLUMNS, "description": "Feature -> a value per candidate."},
    },
}
_TEACHER_BODY: dict[str, Any] = {
    "type": "object",
    "required": ["rows"],
    "additionalProperties": False,
    "properties": {"rows": {**_COLUMNS, "description": "Column of the example store -> a value per row."}},
}
_REPLY: dict[str, Any] = {
    "type": "object",
    "required": ["version", "predictions"],
    "properties": {
        "version": {"type": "string", "description": "The version that made all of the predictions."},
        "predictions": {"type": "object", "additionalProperties": {"type": "array"}},
    },
}
_SCHEMAS: dict[str, Any] = {
    "Problem": {
        "type": "object",
        "required": ["type", "title", "status", "detail"],
        "properties": {
            "type": {"type": "string"},
            "title": {"type": "string"},
            "status": {"type": "integer"},
            "detail": {"type": "string"},
        },
    }
}


def score_operation(
    body: dict[str, Any],
    arrow: str,
    answer: str = "A float32 column per task, a row per candidate or row, in the request's order.",
) -> dict[str, Any]:
    """OpenAPI's part of an endpoint that takes JSON or Arrow and answers with predictions.

    Args:
        body: JSON Schema of the JSON request.
        arrow: what the Arrow request is, in words.
        answer: what comes back, in words.
    """
    binary = {"schema": {"type": "string", "format": "binary"}}
    timeout = {
        "name": TIMEOUT_HEADER,
        "in": "header",
        "required": False,
        "description": "Milliseconds in which an answer is still wanted.",
        "schema": {"type": "number", "exclusiveMinimum": 0},
    }
    return {
        "parameters": [timeout],
        "requestBody": {"required": True, "description": arrow, "content": {JSON: {"schema": body}, ARROW: binary}},
        "responses": {
            "200": {
                "description": answer,
                "headers": {VERSION_HEADER: {"schema": {"type": "string"}, "required": True}},
                "content": {JSON: {"schema": _REPLY}, ARROW: binary},
            }
        },
    }


async def read_body(request: Request, deadline: Deadline) -> bytes:
    """A request's body.

    Raises:
        Problem: it has not come before the deadline (504).
    """
    try:
        return await asyncio.wait_for(request.body(), deadline.left)
    except TimeoutError:
        raise too_late() from None


async def reply(request: Request, payload: Payload, scored: Scored, deadline: Deadline) -> Response:
    """The answer in the form that the caller takes.

    Raises:
        Problem: too much for JSON (413), or it is not ready before the deadline (504).
    """
    media = reply_media(request.headers.get("accept"), payload.media)
    if media == ARROW:  # a copy
        body = encode(scored, media)
    else:
        try:
            body = await asyncio.wait_for(asyncio.to_thread(encode, scored, media), deadline.left)
        except TimeoutError:
            raise too_late() from None
    return Response(body, 200, reply_headers(scored.version), media)


def _score_routes(backend: Backend, limits: LimitsConfig) -> APIRouter:
    router = APIRouter(tags=["score"], responses=RESPONSES)

    async def read(request: Request) -> tuple[Payload, Deadline]:
        deadline = Deadline.of_header(request.headers.get(TIMEOUT_HEADER), limits.timeout_s)
        media = media_of(request.headers.get("content-type"), request.headers.get("content-encoding"))
        return Payload(await read_body(request, deadline), media, limits), deadline

    @router.post(
        "/v1/models/{model}:score",
        response_class=Response,
        openapi_extra=score_operation(
            _STUDENT_BODY, "As Arrow: two IPC streams back to back, the user's (one row), then the candidates'."
        ),
    )
    async def score_student(
        request: Request, model: Annotated[str, Path(pattern=NAME, description="The student's key.")]
    ) -> Response:
        """Score up to 10,000 candidates of one user; the user's features are sent once."""
        payload, deadline = await read(request)
        return await reply(request, payload, await backend.score_student(model, payload, deadline), deadline)

    @router.post(
        "/v1/teachers/{teacher}:score",
        response_class=Response,
        openapi_extra=score_operation(_TEACHER_BODY, "As Arrow: one IPC stream of rows."),
    )
    async def score_teacher(
        request: Request,
        teacher: Annotated[str, Path(pattern=NAME, description="The teacher's name.")],
        version: Annotated[str | None, Query(pattern=NAME, description="By default the current version.")] = None,
        representation: Annotated[bool, Query(description="Also answer with the teacher's representation.")] = False,
    ) -> Response:
        """Score rows with a teacher."""
        payload, deadline = await read(request)
        scored = await backend.score_teacher(teacher, payload, deadline, version, representation)
        return await reply(request, payload, scored, deadline)

    return router


def _health_routes(backend: Backend) -> APIRouter:
    router = APIRouter(tags=["health"], responses={401: RESPONSES[401]})

    @router.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @router.get("/readyz", responses={503: {"description": "Some model cannot answer yet."}})
    async def readyz() -> JSONResponse:
        """Whether every model can answer, and with which version."""
        ready, found = await backend.status()
        return JSONResponse({"ready": ready, **found}, 200 if ready else 503)

    return router


def create_app(
    backend: Backend, limits: LimitsConfig, token: TokenCheck | None = None, routers: Sequence[APIRouter] = ()
) -> FastAPI:
    """The app.

    Args:
        backend: what scores.
        limits: what a request may ask for.
        token: checks the bearer token that every request needs, for the pages too; None: no token (loopback).
        routers: further endpoints, behind the same guard.
    """
    app = FastAPI(
        title="rayfm",
        version="1",
        summary="Scores candidates with students, and rows with teachers.",
        description=(
            "Every reply with predictions names the version that made them. Errors are problem details (RFC 9457)."
        ),
    )
    for router in (_score_routes(backend, limits), _health_routes(backend), *routers):
        app.include_router(router)

    @app.exception_handler(RequestValidationError)
    async def refused(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])[:80]
        return Problem(400, f"{place}: {first['msg']}").response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return Problem(error.status_code, str(error.detail), error.headers).response()

    token = token or TokenCheck(None)
    app.add_middleware(Guard, token=token, limits=limits)
    _describe(app, token.required)
    return app


def _describe(app: FastAPI, protected: bool) -> None:
    """Add what FastAPI does not know to the OpenAPI document: the problem's schema, and the token."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        document = make()
        components = document.setdefault("components", {})
        components.setdefault("schemas", {}).update(_SCHEMAS)
        if protected:
            components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{"token": []}]
        return document

    app.openapi = openapi  # type: ignore[method-assign]
