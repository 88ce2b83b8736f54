"""The HTTP client."""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx
import pyarrow as pa

from rayfm.client.call import LATE, Caller
from rayfm.client.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NotLabelled,
    Reject,
    ScoreError,
    ServerFault,
    Unavailable,
    error_of_status,
)
from rayfm.client.labels import Ticket, TicketState, read_rejects, read_state, read_ticket
from rayfm.client.retry import Retries, parse_retry_after
from rayfm.client.wire import (
    ARROW,
    JSON,
    PROBLEM,
    TIMEOUT_HEADER,
    VERSION_HEADER,
    Columns,
    Scored,
    to_row,
    to_table,
    write_stream,
    write_streams,
)

_FIRST_POLL_S = 0.05
_SHORTEST_S = 1e-3
"""A socket's timeout is above 0, which would mean not to wait at all."""

Body = tuple[bytes, str]
"""Bytes and their content type."""


class Client(Caller):
    """Asks for scores over HTTP, and posts rows to be labelled.

    One client may be shared by threads; it keeps connections open.

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
        super().__init__(timeout_s, retries)
        self.arrow = arrow
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._http = httpx.Client(base_url=url, headers=headers, verify=verify, transport=transport)

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

    def label(self, teacher: str, rows: Columns, timeout_s: float | None = None) -> Ticket:
        """Post rows that the teacher is to label near-line; good rows are accepted, bad ones listed.

        A post whose reply is lost with its connection is sent again, as every call is. It may have been accepted, and
        then its rows have two tickets; a look-up takes the first one's labels. A post whose process died (a 500 that is
        no answer of the service's) is not sent again: it may have been accepted too, and the caller is to decide.

        Args:
            teacher: its name.
            rows: the example store's columns, with ``example_id`` and ``time`` (int64 microseconds since 1970, UTC).
            timeout_s: instead of the client's own.

        Returns:
            The ticket to ask with, the version that will label, and the rows that were refused.

        Raises:
            InvalidRequest: a column is missing, or no row is good; ``rejects`` has the first reasons.
            Overloaded: too many posts wait still, after the last try.
            ServerFault: the service failed; the rows may have been accepted.
            ScoreError: another of its kinds, by what went wrong.
        """
        content, media = self._teacher_body(rows)
        headers = {"Content-Type": media, "Accept": JSON}
        path = f"/v1/teachers/{teacher}/label"
        return read_ticket(
            self._call(
                lambda left: _answer(self._send("POST", path, headers, left, content), 202, repeatable=False), timeout_s
            )
        )

    def ticket_state(self, ticket: Ticket | str, timeout_s: float | None = None) -> TicketState:
        """Where the rows of a post are.

        Args:
            ticket: what `label` returned, or its text.
            timeout_s: instead of the client's own.

        Raises:
            NotFound: it was never given, or it is committed and has expired.
            ScoreError: another of its kinds, by what went wrong.
        """
        path = f"/v1/labels/{ticket if isinstance(ticket, str) else ticket.ticket}"
        return read_state(
            self._call(lambda left: _answer(self._send("GET", path, {"Accept": JSON}, left), 200), timeout_s)
        )

    def wait_for_labels(self, ticket: Ticket | str, timeout_s: float, poll_s: float = 1.0) -> TicketState:
        """Ask for a ticket until its labels are committed. A service that cannot answer for a while is waited for.

        Args:
            ticket: what `label` returned, or its text.
            timeout_s: how long at most.
            poll_s: seconds between two questions; the first few come sooner.

        Returns:
            The committed state: its ``table_version`` of the near-line label table holds the rows.

        Raises:
            NotLabelled: the ticket is a dead letter; the message has the reason.
            DeadlineExceeded: the time is over; the message says where the rows are. They may still be labelled.
            NotFound: the ticket was never given, or it is committed and has expired.
            ScoreError: another of its kinds, where it will not pass or lasts until the time is over.
        """
        end, pause = self._clock() + timeout_s, min(poll_s, _FIRST_POLL_S)
        seen = "the service did not say where the rows are"
        while (left := end - self._clock()) > 0:
            try:
                state = self.ticket_state(ticket, min(left, self.timeout_s))
            except ScoreError as error:
                if not (error.retryable or isinstance(error, DeadlineExceeded)) or self._clock() + pause >= end:
                    raise
            else:
                if state.state == "committed":
                    return state
                if state.state == "dead":
                    raise NotLabelled(f"ticket {state.ticket} is a dead letter: {state.reason}")
                why = f", after {state.failures} failed tries: {state.reason}" if state.failures else ""
                seen = f"the rows are {state.state}{why}"
            self._sleep(min(pause, max(0.0, end - self._clock())))
            pause = min(poll_s, 2.0 * pause)
        raise DeadlineExceeded(f"not committed within {timeout_s:g} s: {seen}; ask again later")

    def ready(self) -> dict[str, Any]:
        """What ``/readyz`` says: whether all can answer, and which version of each model does.

        Raises:
            ScoreError: no answer.
        """
        response = self._send("GET", "/readyz", {}, self.timeout_s)
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
        content, media = body
        headers = {"Content-Type": media, "Accept": media}
        return self._call(
            lambda left: _scored(self._send("POST", path, headers, left, content, dict(query))), timeout_s
        )

    def _send(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        left: float,
        content: bytes | None = None,
        query: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        told = {**headers, TIMEOUT_HEADER: f"{left * 1000:.0f}"}
        remaining = _Remaining(self._clock, self._clock() + left)
        request = self._http.build_request(
            method, path, content=content, params=query, headers=told, extensions={"timeout": remaining}
        )
        try:
            response = self._http.send(request, stream=True)
            try:
                return self._read(response, remaining)
            finally:
                response.close()
        except (httpx.ReadTimeout, httpx.WriteTimeout):
            raise DeadlineExceeded(LATE) from None
        except httpx.TransportError as error:
            # No call does harm when it comes twice: whether it arrived before the connection was lost does not matter.
            raise Unavailable(f"connection lost: {error or type(error).__name__}") from None
        except httpx.DecodingError as error:
            raise ServerFault(f"the reply cannot be read: {error}") from None

    @staticmethod
    def _read(response: httpx.Response, remaining: _Remaining) -> httpx.Response:
        """The whole reply, unless the time is over: each piece may come in time, and their last one never."""
        pieces = []
        for piece in response.iter_bytes():
            if remaining.seconds <= 0:
                raise DeadlineExceeded(LATE)
            pieces.append(piece)
        headers = response.headers.copy()
        headers.pop("content-encoding", None)  # the pieces are decoded
        return httpx.Response(response.status_code, headers=headers, content=b"".join(pieces))


class _Remaining(dict[str, float]):
    """The timeouts of a request's phases (to get a connection, to connect, to write, to read), which the transport
    looks up when each begins: then each has what the ones before it have left.
    """

    def __init__(self, clock: Callable[[], float], end: float) -> None:
        super().__init__()
        self._clock, self._end = clock, end

    @property
    def seconds(self) -> float:
        """Until the deadline; 0 or less where it is over."""
        return self._end - self._clock()

    def get(self, key: str, default: Any = None) -> float:  # the transport asks for every phase by this
        return max(self.seconds, _SHORTEST_S)

    def __getitem__(self, key: str) -> float:
        return self.get(key)


def _json(value: Any) -> Body:
    return json.dumps(value, allow_nan=False).encode(), JSON


def _error(response: httpx.Response, repeatable: bool = True) -> ScoreError:
    """What a refusal raises. A call that is ``repeatable`` changes nothing, so that it may be sent twice."""
    rejects: tuple[Reject, ...] = ()
    try:
        body = response.json()
        message, rejects = str(body["detail"]), read_rejects(body)
    except (ValueError, KeyError, TypeError):
        message = response.text[:200] or response.reason_phrase
    retry_after = parse_retry_after(response.headers.get("retry-after"))
    said = f"{message} ({response.status_code})"
    if response.status_code == 500 and not response.headers.get("content-type", "").startswith(PROBLEM):
        # The service's own faults are problems. This is its proxy's, whose replica died with the request.
        if repeatable:
            return Unavailable(f"the replica was lost: {said}", retry_after)
        said = f"the replica was lost, and it is not known whether it had accepted the rows: {said}"
    error = error_of_status(response.status_code, said, retry_after)
    if isinstance(error, InvalidRequest):
        error.rejects = rejects
    return error


def _answer(response: httpx.Response, status: int, repeatable: bool = True) -> Any:
    if response.status_code != status:
        raise _error(response, repeatable)
    try:
        return response.json()
    except ValueError as error:
        raise ServerFault(f"the reply cannot be read: {error}") from None


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
