"""The HTTP side: ``POST /v1/teachers/{teacher}/label`` and ``GET /v1/labels/{ticket}``.

Bodies are decoded and checked as the scoring endpoints' are, so the router can stand beside them in one app
(`rayfm.serving.http.app.create_app`) behind its guard, or in `build_app`'s by itself behind the same guard.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Path
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from rayfm.client.wire import ARROW, JSON, PROBLEM, TIMEOUT_HEADER, VERSION_HEADER
from rayfm.config import CapacityError, DataError, RayfmError, SnapshotError
from rayfm.serving.http.app import Guard
from rayfm.serving.http.codecs import Payload, media_of
from rayfm.serving.http.config import LimitsConfig
from rayfm.serving.http.problems import Problem, unavailable
from rayfm.serving.http.queue import Deadline, too_late
from rayfm.serving.http.token import TokenCheck
from rayfm.serving.nearline.intake import Accepted, BadRows, Full, Intake, TooLarge
from rayfm.serving.nearline.tickets import Backlog, TicketStatus

log = logging.getLogger(__name__)

_RETRY_S = 5.0
_REFUSALS = {
    400: "a column is missing, or no row can be labelled; names the column or the row",
    404: "no such teacher",
    413: "the body or its rows are beyond the limit",
    415: "neither Arrow IPC nor JSON",
    429: "too many posts wait; see Retry-After",
    503: "nothing can be stored, or no version is published that could label",
    504: "the body has not come in time",
}


def _problem(words: str) -> dict[str, Any]:
    properties = {name: {"type": "string"} for name in ("type", "title", "detail")}
    schema = {
        "type": "object",
        "required": ["type", "title", "status", "detail"],
        "properties": {**properties, "status": {"type": "integer"}, "rejects": {"type": "array"}},
    }
    return {"description": words, "content": {PROBLEM: {"schema": schema}}}


_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "Rows in the example store's columns, with example_id and time; as Arrow one IPC stream.",
        "content": {
            JSON: {
                "schema": {
                    "type": "object",
                    "required": ["rows"],
                    "additionalProperties": False,
                    "properties": {
                        "rows": {
                            "type": "object",
                            "additionalProperties": {"type": "array", "items": {}},
                            "description": "Column -> a value per row.",
                        }
                    },
                }
            },
            ARROW: {"schema": {"type": "string", "format": "binary"}},
        },
    }
}


def build_router(intakes: Mapping[str, Intake]) -> APIRouter:
    """The near-line endpoints. Token and body limit are the guard's, before which the router stands.

    Args:
        intakes: teacher -> where its posts go.
    """
    router = APIRouter(tags=["near-line labels"])

    @router.post(
        "/v1/teachers/{teacher}/label",
        status_code=202,
        response_model=Accepted,
        responses={code: _problem(words) for code, words in _REFUSALS.items()},
        openapi_extra=_BODY,
    )
    async def post_rows(teacher: Annotated[str, Path(description="The teacher's name.")], request: Request) -> Response:
        """Accept rows to be labelled. The answer comes once the good rows are durable; bad ones are listed, and kept
        with their reasons.
        """
        intake = intakes.get(teacher)
        if intake is None:
            raise _no_teacher(intakes)
        try:
            limits = intake.config.limits
            deadline = Deadline.of_header(request.headers.get(TIMEOUT_HEADER), limits.timeout_s)
            await run_in_threadpool(intake.check_room)  # before the body: it need not be sent in vain
            media = media_of(request.headers.get("content-type"), request.headers.get("content-encoding"))
            payload = Payload(
                await _body(request, int(limits.body_mb * 2**20), deadline),
                media,
                LimitsConfig(max_body_mb=limits.body_mb, max_rows=limits.rows),
            )
            accepted = await run_in_threadpool(lambda: intake.accept(payload.rows()))
        except BadRows as error:
            body = json.loads(bytes(Problem(400, str(error)).response().body)) | {"rejects": error.rejects}
            return JSONResponse(body, 400, media_type=PROBLEM)
        except RayfmError as error:
            raise _problem_of(error) from None
        return JSONResponse(
            accepted.dump(),
            202,
            {"Location": f"/v1/labels/{accepted.ticket}", VERSION_HEADER: accepted.version},
        )

    @router.get("/v1/teachers/{teacher}/label", response_model=Backlog, responses={404: _problem("no such teacher")})
    async def get_backlog(teacher: Annotated[str, Path(description="The teacher's name.")]) -> Response:
        """How far behind the labels are: an age that grows says that nobody labels."""
        intake = intakes.get(teacher)
        if intake is None:
            raise _no_teacher(intakes)
        return JSONResponse((await run_in_threadpool(intake.backlog)).dump())

    @router.get("/v1/labels/{ticket}", response_model=TicketStatus, responses={404: _problem("no such ticket")})
    async def get_ticket(ticket: Annotated[str, Path(description="What a post was answered with.")]) -> Response:
        """Where a ticket stands: queued, scored, committed, or dead with the reason."""
        for intake in intakes.values():
            try:
                status = await run_in_threadpool(intake.status, ticket)
            except DataError:  # it has no ticket's form
                break
            if status is not None:
                return JSONResponse(status.dump(), 200, {VERSION_HEADER: status.version})
        raise Problem(404, "no such ticket: it was never given, or it has expired")

    return router


def build_app(intakes: Mapping[str, Intake], token: TokenCheck | None = None) -> FastAPI:
    """An application of the near-line endpoints alone, behind the guard of the scoring endpoints.

    Args:
        intakes: teacher -> where its posts go.
        token: checks bearer tokens; None: nobody is asked (loopback).
    """
    app = FastAPI(title="rayfm near-line labels", version="1")
    app.include_router(build_router(intakes))

    @app.get("/healthz", tags=["health"])
    async def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @app.exception_handler(RequestValidationError)
    async def refused(request: Request, error: RequestValidationError) -> Response:
        return Problem(400, str(error.errors()[0]["msg"])).response()

    largest = max((intake.config.limits.body_mb for intake in intakes.values()), default=1.0)
    app.add_middleware(Guard, token=token or TokenCheck(None), limits=LimitsConfig(max_body_mb=largest))
    return app


async def _body(request: Request, limit: int, deadline: Deadline) -> bytes:
    """The body, read only as far as it may go. Raises Problem beyond ``limit`` bytes (413), or where it has not come
    before the deadline (504)."""

    async def read() -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise Problem(413, f"the body is larger than {limit} bytes; send fewer rows at a time")
            parts.append(part)
        return b"".join(parts)

    try:
        return await asyncio.wait_for(read(), deadline.left)
    except TimeoutError:
        raise too_late() from None


def _no_teacher(intakes: Mapping[str, Intake]) -> Problem:
    return Problem(404, f"no teacher of that name takes rows; there is {', '.join(intakes) or 'none'}")


def _problem_of(error: RayfmError) -> Problem:
    """What a client is told: of its own faults the words, of ours no path and no name of a machine."""
    if isinstance(error, Full):
        return Problem(429, str(error), {"Retry-After": str(error.retry_after_s)})
    if isinstance(error, TooLarge):
        return Problem(413, str(error))
    if isinstance(error, DataError):
        return Problem(400, str(error))
    log.error("a post was refused: %s", error)
    if isinstance(error, SnapshotError):
        return unavailable("no version of the teacher can label yet; try again later", _RETRY_S)
    if isinstance(error, CapacityError):
        return unavailable("the rows cannot be stored; nothing was accepted, try again later", _RETRY_S)
    return unavailable("nothing can be accepted; try again later", _RETRY_S)
