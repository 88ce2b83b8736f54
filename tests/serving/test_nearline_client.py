"""The Python client against the real router, spool and labeller; only the teacher's numbers are made up."""

from __future__ import annotations

import time

import pyarrow as pa
import pytest
from nearline_cases import MODEL, TEACHER, V1, Oracle, config, predicted, rows
from starlette.testclient import TestClient

from rayfm.client import Client, InvalidRequest, NotFound, NotLabelled, Overloaded, Reject, Retries, Unauthorized
from rayfm.serving.http.token import TokenCheck
from rayfm.serving.nearline.intake import Intake
from rayfm.serving.nearline.labeller import Labeller, take
from rayfm.serving.nearline.labels import NearLineLabels
from rayfm.serving.nearline.router import build_app
from rayfm.serving.nearline.rows import Versions
from rayfm.serving.nearline.spool import Spool
from rayfm.snapshots import SnapshotStore

TOKEN = "a-long-enough-token-for-tests-0123456789"


class Deaf:
    """A doorbell that nobody hears: the tests label by themselves."""

    def ring(self, ticket: str) -> None:
        pass


class Service:
    """The near-line endpoints of one teacher in this process."""

    def __init__(self, root, token: TokenCheck | None = None, **limits) -> None:
        self.config = config(root, limits=limits)
        self.spool, self.labels = Spool(root, TEACHER), NearLineLabels(root)
        self.versions = Versions(SnapshotStore(root), MODEL)
        self.oracle = Oracle()
        self.app = build_app({TEACHER: Intake(self.config, self.spool, self.versions, Deaf())}, token)

    def client(self, **options) -> Client:
        return Client("http://testserver", transport=TestClient(self.app)._transport, **options)

    def label_all(self) -> None:
        labeller = Labeller(self.config, self.spool, self.labels, self.versions, self.oracle)
        taken = [take(self.spool, ticket, self.config) for ticket, _ in list(self.spool.waiting())]
        labeller.label([entry for entry in taken if entry is not None])


@pytest.mark.parametrize("arrow", [True, False])
def test_from_rows_to_committed_labels(root, arrow):
    service = Service(root)
    client = service.client(arrow=arrow)
    posted = rows(10).to_pylist()
    posted[3]["traffic"] = "billboard"
    ticket = client.label(TEACHER, pa.Table.from_pylist(posted))
    assert (ticket.teacher, ticket.version, ticket.rows, ticket.rejected) == (TEACHER, V1, 9, 1)
    assert ticket.rejects == (Reject(3, "unknown traffic"),)
    assert client.ticket_state(ticket).state == "queued"

    # Labelled while the client waits.
    sleeps = []

    def sleep(seconds: float) -> None:
        sleeps.append(seconds)
        service.label_all()

    client._sleep = sleep
    done = client.wait_for_labels(ticket, timeout_s=30.0)
    assert (done.state, done.rows, done.rejected, done.version) == ("committed", 9, 1, V1)
    assert done.expires > time.time()
    assert len(sleeps) == 1

    good = rows(10).filter(pa.array([number != 3 for number in range(10)]))
    ids = rows(10)["example_id"].to_numpy()
    found = service.labels.lookup(TEACHER, ticket.version, "2024-01-02", ids, ["click"], done.table_version)
    assert found.mask[:, 0].tolist() == [number != 3 for number in range(10)]
    assert found.values[found.mask[:, 0], 0].tolist() == predicted(good)["click"].to_pylist()


def test_rows_that_the_teacher_cannot_label_are_a_dead_letter(root):
    service = Service(root)
    service.oracle.error = RuntimeError("index out of range")
    client = service.client()
    ticket = client.label(TEACHER, rows(2))
    service.label_all()
    state = client.ticket_state(ticket)
    assert (state.state, state.failures) == ("queued", 1)
    assert "index out of range" in state.reason
    service.spool.bury(ticket.ticket, state.reason)
    with pytest.raises(NotLabelled, match="index out of range"):
        client.wait_for_labels(ticket, timeout_s=5.0)


def test_what_the_service_refuses(root):
    service = Service(root, TokenCheck(TOKEN), rows=5)
    with pytest.raises(Unauthorized):
        service.client().label(TEACHER, rows(1))
    client = service.client(token=TOKEN)
    with pytest.raises(NotFound, match="no teacher of that name"):
        client.label("nobody", rows(1))
    with pytest.raises(NotFound, match="no such ticket"):
        client.ticket_state("0123")
    with pytest.raises(InvalidRequest, match="lacks column 'user'"):
        client.label(TEACHER, rows(1).drop_columns(["user"]))
    with pytest.raises(InvalidRequest, match="more than 5 rows; send fewer"):
        client.label(TEACHER, rows(6))
    with pytest.raises(InvalidRequest, match="trained through") as caught:
        client.label(TEACHER, rows(2, day=-1))  # the leak rule
    assert [entry.row for entry in caught.value.rejects] == [0, 1]


def test_a_full_queue_is_waited_for(root, monkeypatch):
    import rayfm.serving.nearline.intake as module

    monkeypatch.setattr(module, "_COUNTED_S", 0.0)  # every post counts what waits
    service = Service(root, queued=1, retry_after_s=4)
    client = service.client(retries=Retries(attempts=2, jitter=0.0))
    client.label(TEACHER, rows(1))
    sleeps = []

    def sleep(seconds: float) -> None:
        sleeps.append(seconds)
        service.label_all()

    client._sleep = sleep
    assert client.label(TEACHER, rows(1, first_id=1)).rows == 1
    assert sleeps == [4.0]
    client._sleep = sleeps.append
    with pytest.raises(Overloaded, match="1 posts wait") as caught:
        client.label(TEACHER, rows(1, first_id=2))
    assert caught.value.retry_after == 4.0
