"""The HTTP client."""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import httpx
import pyarrow as pa

from rayfm.client.errors import DeadlineExceeded, InvalidRequest, ScoreError, ServerFault, Unavailable, error_of_status
from rayfm.client.retry import Retries, parse_retry_after
from rayfm.client.wire import (
    ARROW,
    JSON,
    TIMEOUT_HEADER,
    VERSION_HEADER,
    Columns,
    Scored,
    to_row,
    to_table,
    write_stream,
    write_streams,
)

Body = tuple[bytes, str]
"""Bytes and their content type."""


class Client:
    """Asks for scores over HTTP. One client may be shared by threads; it keeps connections open.

    Args:
        url: where the service is: ``http://127.0.0.1:8000``.
        token: the bearer token; may be left out on loopback.
        timeout_s: seconds in which a call ends, its retries included.
        retries: when to try again.
        arrow: send Arrow IPC; otherwise JSON.
        verify: for https: whether, or how, to check the server's certificate.
        transport: instead of the network, for tests.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        timeout_s: float = 10.0,
        retries: Retries | None = None,
        arrow: bool = True,
        verify: bool | ssl.SSLContext = True,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.timeout_s, self.retries, self.arrow = timeout_s, retries or Retries(), arrow
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._http = httpx.Client(base_url=url, headers=headers, verify=verify, transport=transport)
        self._clock: Callable[[], float] = time.monotonic
        self._sleep: Callable[[float], None] = time.sleep

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def score(self, model: str, user: Columns, candidates: Columns, timeout_s: float | None = None) -> Scored:
        """A student's predictions for one user's candidates.

        Args:
            model: the student's key, ``<student>.<variant>.<seed>``.
            user: feature -> value, or a table of one row; sent once.
            candidates: feature -> values, or a table of a row per candidate.
            timeout_s: instead of the client's own.

        Raises:
            ScoreError: one of its kinds, by what went wrong.
        """
        return self._score(f"/v1/models/{model}:score", self._body("candidates", user, candidates), {}, timeout_s)

    def score_teacher(
        self,
        teacher: str,
        rows: Columns,
        version: str | None = None,
        representation: bool = False,
        timeout_s: float | None = None,
    ) -> Scored:
        """A teacher's predictions for rows.

        Args:
            teacher: its name.
            rows: the example store's columns, except labels and times.
            version: by default the current one.
            representation: also ask for the column ``representation``.
            timeout_s: instead of the client's own.

        Raises:
            ScoreError: one of its kinds, by what went wrong.
        """
        asked = {"version": version, "representation": "true" if representation else None}
        query = {name: value for name, value in asked.items() if value is not None}
        return self._score(f"/v1/teachers/{teacher}:score", self._teacher_body(rows), query, timeout_s)

    def retrieve(
        self,
        model: str,
        user: Columns,
        k: int = 100,
        exclude: Sequence[Any] = (),
        task: str | None = None,
        timeout_s: float | None = None,
    ) -> Scored:
        """A two-tower's best items for one user: columns ``id`` and ``score``, best first.

        Args:
            model: the student's key.
            user: feature -> value, or a table of one row.
            k: how many items.
            exclude: ids of items to leave out.
            task: rank by this task alone.
            timeout_s: instead of the client's own.

        Raises:
            ScoreError: one of its kinds, by what went wrong.
        """
        query = {"k": str(k)} | ({} if task is None else {"task": task})
        body = self._body("exclude", user, {"exclude": list(exclude)})
        return self._score(f"/v1/models/{model}:retrieve", body, query, timeout_s)

    def ready(self) -> dict[str, Any]:
        """What ``/readyz`` says: whether all can answer, and which version of each model does.

        Raises:
            ScoreError: no answer.
        """
        try:
            response = self._http.get("/readyz", timeout=self.timeout_s)
        except httpx.HTTPError as error:
            raise Unavailable(f"no answer: {error or type(error).__name__}") from None
        if response.status_code not in (200, 503) or "ready" not in response.text:
            raise _error(response)
        found: dict[str, Any] = response.json()
        return found

    def _body(self, what: str, user: Columns, columns: Columns) -> Body:
        """The user's row and ``what`` goes with it."""
        try:
            row, rows = to_row(user), to_table(columns)
            if self.arrow:
                return write_streams([row, rows]), ARROW
            values = rows.to_pydict()
            first = row.to_pylist()[0] if row.num_rows else {}
            return _json({"user": first, what: values["exclude"] if what == "exclude" else values})
        except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
            raise InvalidRequest(f"the columns are no table: {error}") from None

    def _teacher_body(self, rows: Columns) -> Body:
        try:
            table = to_table(rows)
            return (write_stream(table), ARROW) if self.arrow else _json({"rows": table.to_pydict()})
        except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
            raise InvalidRequest(f"the columns are no table: {error}") from None

    def _score(self, path: str, body: Body, query: Mapping[str, str], timeout_s: float | None) -> Scored:
        end = self._clock() + (self.timeout_s if timeout_s is None else timeout_s)
        for attempt in range(1, self.retries.attempts + 1):
            try:
                return _scored(self._post(path, body, query, end - self._clock()))
            except ScoreError as error:
                wait = self.retries.wait(attempt, error.retry_after)
                last = attempt == self.retries.attempts
                if last or not error.retryable or self._clock() + wait >= end:
                    raise
                self._sleep(wait)
        raise AssertionError("unreachable")

    def _post(self, path: str, body: Body, query: Mapping[str, str], left: float) -> httpx.Response:
        if left <= 0:
            raise DeadlineExceeded("no reply within the deadline")
        content, media = body
        headers = {"Content-Type": media, "Accept": media, TIMEOUT_HEADER: f"{left * 1000:.0f}"}
        try:
            return self._http.post(path, content=content, params=dict(query), headers=headers, timeout=left)
        except (httpx.ReadTimeout, httpx.WriteTimeout):
            raise DeadlineExceeded("no reply within the deadline") from None
        except httpx.TransportError as error:
            # Scoring changes nothing: whether the request arrived before the connection was lost does not matter.
            raise Unavailable(f"connection lost: {error or type(error).__name__}") from None


def _json(value: Any) -> Body:
    return json.dumps(value, allow_nan=False).encode(), JSON


def _error(response: httpx.Response) -> ScoreError:
    try:
        message = str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        message = response.text[:200] or response.reason_phrase
    retry_after = parse_retry_after(response.headers.get("retry-after"))
    return error_of_status(response.status_code, f"{message} ({response.status_code})", retry_after)


def _scored(response: httpx.Response) -> Scored:
    if response.status_code != 200:
        raise _error(response)
    version = response.headers.get(VERSION_HEADER)
    if not version:
        raise ServerFault("the reply names no version")
    try:
        if response.headers["content-type"] == ARROW:
            return Scored(version, pa.ipc.open_stream(response.content).read_all())
        columns = response.json()["predictions"]
        return Scored(version, pa.table({name: pa.array(v, _type(name, v)) for name, v in columns.items()}))
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise ServerFault(f"the reply cannot be read: {error}") from None


def _type(name: str, values: list[Any]) -> pa.DataType | None:
    if name == "id":
        return None  # text or whole numbers, as the catalogue has them
    return pa.list_(pa.float32(), len(values[0])) if values and isinstance(values[0], list) else pa.float32()
