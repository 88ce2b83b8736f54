from __future__ import annotations

import json

import httpx
import pyarrow as pa
import pytest

from rayfm.client import (
    Client,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    NotLabelled,
    Overloaded,
    Reject,
    Retries,
    ServerFault,
    Ticket,
    TicketState,
    Unavailable,
)
from rayfm.client.wire import ARROW, JSON

ROWS = pa.table({"example_id": [1, 2], "time": [0, 1], "age": [0.5, 1.5]})
ACCEPTED = {
    "ticket": "0123", "teacher": "fm", "version": "v1", "rows": 1, "rejected": 1,
    "rejects": [{"row": 1, "reason": "unknown traffic"}],
}  # fmt: skip
TICKET = Ticket("0123", "fm", "v1", 1, 1, (Reject(1, "unknown traffic"),))


def answer(status: int, body: object, **headers: str) -> httpx.Response:
    return httpx.Response(status, headers=headers, json=body)


def state(name: str, **more: object) -> httpx.Response:
    plain = {"ticket": "0123", "teacher": "fm", "version": "v1", "rows": 1, "rejected": 1, "failures": 0}
    return answer(200, plain | {"state": name, "reason": None, "table_version": None, "expires": None} | more)


class Script:
    """A service that answers as it is told; the clock stands still but for the client's waits and `takes_s`."""

    def __init__(self, *answers, takes_s: float = 0.0) -> None:
        self.answers, self.requests, self.now, self.takes_s = list(answers), [], 0.0, takes_s

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        self.now += self.takes_s
        given = self.answers.pop(0)
        if isinstance(given, Exception):
            raise given
        return given

    def client(self, **options) -> Client:
        client = Client("http://service", transport=httpx.MockTransport(self), **options)
        client._clock = lambda: self.now
        client._sleep = self.sleep
        return client

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += seconds


def test_rows_are_posted_as_arrow_and_the_answer_is_a_ticket():
    script = Script(answer(202, ACCEPTED))
    assert script.client(token="secret").label("fm", ROWS) == TICKET
    (request,) = script.requests
    assert (request.method, str(request.url)) == ("POST", "http://service/v1/teachers/fm/label")
    assert (request.headers["content-type"], request.headers["authorization"]) == (ARROW, "Bearer secret")
    assert pa.ipc.open_stream(request.content).read_all().equals(ROWS)


def test_rows_are_posted_as_json_when_asked_for():
    script = Script(answer(202, ACCEPTED))
    script.client(arrow=False).label("fm", ROWS.to_pydict())
    assert script.requests[0].headers["content-type"] == JSON
    assert json.loads(script.requests[0].content) == {"rows": ROWS.to_pydict()}


def test_a_full_queue_is_waited_for_as_it_asks():
    full = answer(429, {"detail": "9 posts wait"}, **{"retry-after": "3"})
    script = Script(full, httpx.ReadError("reset"), answer(503, {"detail": "the disk"}), answer(202, ACCEPTED))
    assert script.client(retries=Retries(jitter=0.0)).label("fm", ROWS) == TICKET
    assert script.now == pytest.approx(3.0 + 0.1 + 0.2)
    assert len({request.content for request in script.requests}) == 1


def test_a_post_whose_replica_died_is_not_sent_again_as_it_may_be_accepted():
    died = httpx.Response(500, text="Internal Server Error")
    script = Script(died, answer(202, ACCEPTED))
    with pytest.raises(ServerFault, match="not known whether it had accepted the rows"):
        script.client().label("fm", ROWS)
    assert len(script.requests) == 1
    asked = Script(died, state("queued"))
    assert asked.client().ticket_state(TICKET).state == "queued", "to ask changes nothing"


def test_a_queue_that_stays_full_is_an_error_within_the_deadline():
    script = Script(*[answer(429, {"detail": "9 posts wait"}, **{"retry-after": "3"})] * 2)
    with pytest.raises(Overloaded, match="9 posts wait"):
        script.client(retries=Retries(jitter=0.0)).label("fm", ROWS, timeout_s=5.0)
    assert script.now == 3.0


def test_a_post_without_a_good_row_says_which_are_bad():
    body = {"detail": "no row can be labelled", "status": 400, "rejects": [{"row": 0, "reason": "unknown traffic"}]}
    with pytest.raises(InvalidRequest, match="no row can be labelled") as caught:
        Script(answer(400, body)).client().label("fm", ROWS)
    assert caught.value.rejects == (Reject(0, "unknown traffic"),)


@pytest.mark.parametrize("body", [{"ticket": "0123"}, [], {**ACCEPTED, "rejects": [{"row": 1}]}])
def test_an_answer_that_is_no_ticket(body):
    with pytest.raises(ServerFault, match="no ticket"):
        Script(answer(202, body)).client().label("fm", ROWS)


@pytest.mark.parametrize("body", [{"ticket": "0123"}, []])
def test_an_answer_that_is_no_state(body):
    with pytest.raises(ServerFault, match="no ticket's state"):
        Script(answer(200, body)).client().ticket_state("0123")


def test_an_answer_that_is_no_json():
    with pytest.raises(ServerFault, match="cannot be read"):
        Script(httpx.Response(200, text="<html>")).client().ticket_state("0123")


def test_where_a_ticket_stands():
    script = Script(state("queued", failures=2, reason="no replica", newer="key"), answer(404, {"detail": "gone"}))
    found = script.client().ticket_state(TICKET)
    assert found == TicketState("0123", "fm", "v1", 1, "queued", rejected=1, failures=2, reason="no replica")
    assert (script.requests[0].method, script.requests[0].url.path) == ("GET", "/v1/labels/0123")
    with pytest.raises(NotFound, match="gone"):
        script.client().ticket_state("0123")


def test_labels_are_waited_for():
    script = Script(state("queued"), state("scored"), state("queued"), state("committed", table_version=7))
    done = script.client().wait_for_labels(TICKET, timeout_s=60.0, poll_s=0.1)
    assert (done.state, done.table_version) == ("committed", 7)
    assert script.now == pytest.approx(0.05 + 0.1 + 0.1)


def test_a_dead_letter_is_an_error_with_its_reason():
    script = Script(state("queued"), state("dead", reason="the teacher predicts nan"))
    with pytest.raises(NotLabelled, match="ticket 0123 is a dead letter: the teacher predicts nan"):
        script.client().wait_for_labels(TICKET, timeout_s=60.0)


def test_the_wait_ends_and_says_where_the_rows_are():
    script = Script(*[state("queued", failures=3, reason="no replica")] * 20)
    with pytest.raises(
        DeadlineExceeded, match=r"within 2 s: the rows are queued, after 3 failed tries: no replica; ask"
    ):
        script.client().wait_for_labels(TICKET, timeout_s=2.0, poll_s=0.5)
    assert script.now == pytest.approx(2.0)
    assert len(script.requests) == 7  # at 0, 0.05, 0.15, 0.35, 0.75, 1.25, 1.75


def test_a_ticket_that_is_forgotten_ends_the_wait():
    script = Script(state("queued"), answer(404, {"detail": "no such ticket"}))
    with pytest.raises(NotFound, match="no such ticket"):
        script.client().wait_for_labels(TICKET, timeout_s=60.0)


def test_a_service_that_is_away_for_a_while_is_waited_for():
    away = [httpx.ConnectError("refused")] * 6 + [httpx.ReadTimeout("slow")]
    script = Script(*away, state("committed", table_version=7))
    client = script.client(retries=Retries(attempts=2, jitter=0.0))
    assert client.wait_for_labels(TICKET, timeout_s=60.0).table_version == 7


def test_a_service_that_stays_away_is_the_error():
    script = Script(*[httpx.ConnectError("refused")] * 100)
    with pytest.raises(Unavailable, match="refused"):
        script.client(retries=Retries(attempts=2, jitter=0.0)).wait_for_labels(TICKET, timeout_s=3.0, poll_s=0.5)
    assert script.now <= 3.0


def test_a_question_has_what_is_left_of_the_wait():
    script = Script(*[state("queued")] * 9, takes_s=0.9)
    with pytest.raises(DeadlineExceeded):
        script.client(timeout_s=1.5).wait_for_labels(TICKET, timeout_s=2.0, poll_s=0.1)
    assert [request.headers["x-rayfm-timeout-ms"] for request in script.requests] == ["1500", "1050", "50"]
