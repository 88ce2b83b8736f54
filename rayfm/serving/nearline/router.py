"""The HTTP side: ``POST /v1/teachers/{teacher}/label`` and ``GET /v1/labels/{ticket}``."""

from __future__ import annotations

import http
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from rayfm.config import CapacityError, DataError, RayfmError, SnapshotError
from rayfm.serving.nearline.intake import Accepted, BadRows, Full, Intake, TooLarge
from rayfm.serving.nearline.rows import read_json
from rayfm.serving.nearline.tickets import TicketStatus

ARROW = "application/vnd.apache.arrow.stream"
PROBLEM = "application/problem+json"
VERSION_HEADER = "x-rayfm-version"

Authorize = Callable[..., Any]
"""A FastAPI dependency that raises an HTTP error for a request that may not pass."""


def build_router(intakes: Mapping[str, Intake], authorize: Authorize | None = None) -> APIRouter:
    """The near-line endpoints.

    Args:
        intakes: teacher -> where its posts go.
        authorize: checked before anything of a request is read; None: nobody is asked (loopback only).
    """
    router = APIRouter(dependencies=[] if authorize is None else [Depends(authorize)], tags=["near-line labels"])
    refusals: dict[int | str, dict[str, Any]] = {
        code: {"description": words}
        for code, words in {
            400: "a column is missing or no row can be labelled; names the row and the column",
            404: "no such teacher",
            413: "body or rows beyond the limit",
            415: "neither Arrow IPC nor JSON",
            429: "too many posts wait; see Retry-After",
            503: "nothing can be stored, or nothing is published that could label",
        }.items()
    }

    @router.post("/v1/teachers/{teacher}/label", status_code=202, response_model=Accepted, responses=refusals)
    async def post_rows(teacher: str, request: Request) -> JSONResponse:
        """Accept rows to be labelled: an Arrow IPC stream, or ``{"rows": [{column: value}]}``.

        The answer comes once the good rows are on disk; bad ones are listed, and kept with their reasons.
        """
        intake = intakes.get(teacher)
        if intake is None:
            return _refused(404, f"no teacher {teacher!r} takes rows here; there is {', '.join(intakes) or 'none'}")
        try:
            intake.check_room()
            media = request.headers.get("content-type", ARROW).partition(";")[0].strip().lower()
            if media not in (ARROW, "application/json", "application/octet-stream"):
                return _refused(415, f"content type {media!r}: send {ARROW} or application/json")
            body = await _body(request, int(intake.config.limits.body_mb * 1e6))
            accepted = await run_in_threadpool(_accept, intake, body, media == "application/json")
        except RayfmError as error:
            return _answer_to(error)
        return JSONResponse(
            accepted.dump(),
            202,
            {"Location": f"/v1/labels/{accepted.ticket}", VERSION_HEADER: accepted.version},
        )

    @router.get("/v1/labels/{ticket}", response_model=TicketStatus, responses={404: {"description": "no such ticket"}})
    async def get_ticket(ticket: str) -> JSONResponse:
        """Where a ticket stands: queued, scored, committed, or dead with the reason."""
        try:
            for intake in intakes.values():
                status = await run_in_threadpool(intake.status, ticket)
                if status is not None:
                    return JSONResponse(status.dump(), 200, {VERSION_HEADER: status.version})
        except RayfmError as error:
            return _answer_to(error, bad=404)
        return _refused(404, "no such ticket: it was never given, or it has expired")

    return router


def build_app(intakes: Mapping[str, Intake], authorize: Authorize | None = None) -> FastAPI:
    """An application of the near-line endpoints alone."""
    app = FastAPI(title="rayfm near-line labels")
    app.include_router(build_router(intakes, authorize))
    return app


async def _body(request: Request, limit: int) -> bytes:
    """The body, read only as far as it may go. Raises TooLarge beyond ``limit`` bytes."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise TooLarge(f"the body is longer than {limit / 1e6:g} MB; send fewer rows at a time")
        parts.append(part)
    return b"".join(parts)


def _accept(intake: Intake, body: bytes, is_json: bool) -> Accepted:
    return intake.accept(read_json(body) if is_json else _read_arrow(body))


def _read_arrow(body: bytes) -> pa.Table:
    try:
        table = pa.ipc.open_stream(body).read_all()
        table.validate(full=True)  # offsets and text from outside are not to be trusted
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"the request is not an Arrow IPC stream ({str(error).splitlines()[0]})") from None
    return table


def _answer_to(error: RayfmError, bad: int = 400) -> JSONResponse:
    if isinstance(error, Full):
        return _refused(429, str(error), {"Retry-After": str(error.retry_after_s)})
    if isinstance(error, TooLarge):
        return _refused(413, str(error))
    if isinstance(error, BadRows):
        return _refused(bad, str(error), rejects=error.rejects)
    if isinstance(error, (CapacityError, SnapshotError)):
        return _refused(503, str(error))
    return _refused(bad, str(error))


def _refused(code: int, detail: str, headers: dict[str, str] | None = None, **more: Any) -> JSONResponse:
    """Problem details (RFC 9457)."""
    body = {"type": "about:blank", "title": http.HTTPStatus(code).phrase, "status": code, "detail": detail, **more}
    return JSONResponse(body, code, headers, PROBLEM)
