from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from nearline_cases import DAY2_US, MODEL, TEACHER, V1, Oracle, as_arrow, as_json, config, publish_teacher, rows
from starlette.testclient import TestClient

from rayfm.client.wire import PROBLEM, TIMEOUT_HEADER
from rayfm.config import CapacityError, ConfigError, validate
from rayfm.serving.application import application_name
from rayfm.serving.endpoints import EndpointsPlan, EndpointsReplica, ServedTeacher, TeacherPlan
from rayfm.serving.http.app import create_app
from rayfm.serving.http.config import EndpointsConfig, LimitsConfig
from rayfm.serving.http.token import TokenCheck
from rayfm.serving.nearline.application import autoscaling, start_intake
from rayfm.serving.nearline.config import NearLineConfig, load_nearline
from rayfm.serving.nearline.consumer import NearLineConsumer, NotLabelled
from rayfm.serving.nearline.doorbell import Doorbell, sweep, task_processor
from rayfm.serving.nearline.intake import Intake
from rayfm.serving.nearline.labeller import take
from rayfm.serving.nearline.labels import NearLineLabels
from rayfm.serving.nearline.router import build_app, build_router
from rayfm.serving.nearline.rows import Versions, fitted
from rayfm.serving.nearline.spool import ROW, Spool
from rayfm.snapshots import SnapshotStore

ARROW = {"content-type": "application/vnd.apache.arrow.stream"}
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    publish_teacher(root, V1)
    return root


@pytest.fixture
def root(tmp_path, published):
    (tmp_path / "snapshots").symlink_to(published / "snapshots")
    return tmp_path


class Bell:
    """Hears the rings."""

    def __init__(self) -> None:
        self.rung: list[str] = []
        self.down = False

    def ring(self, ticket: str) -> None:
        if self.down:
            raise CapacityError("Redis does not answer")
        self.rung.append(ticket)


def make_intake(root, bell, **limits) -> Intake:
    settings = config(root, limits=limits)
    return Intake(settings, Spool(root, TEACHER), Versions(SnapshotStore(root), settings.model), bell)


@pytest.fixture
def bell():
    return Bell()


@pytest.fixture
def client(root, bell):
    return TestClient(build_app({TEACHER: make_intake(root, bell)}))


def until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def queued(spool: Spool, count: int = 2) -> str:
    return spool.accept(rows(count).append_column(ROW, pa.array(range(count), pa.int64())), V1)


# The door.


@pytest.mark.parametrize(("encode", "headers"), [(as_arrow, ARROW), (as_json, JSON)])
def test_a_post_is_accepted_with_a_ticket(client, root, bell, encode, headers):
    answer = client.post(f"/v1/teachers/{TEACHER}/label", content=encode(rows(20)), headers=headers)
    assert answer.status_code == 202
    accepted = answer.json()
    ticket = accepted["ticket"]
    assert accepted == {
        "ticket": ticket, "teacher": TEACHER, "version": V1, "rows": 20, "rejected": 0, "rejects": [],
    }  # fmt: skip
    assert answer.headers["location"] == f"/v1/labels/{ticket}"
    assert answer.headers["x-rayfm-version"] == V1
    assert Spool(root, TEACHER).read(ticket).table.drop_columns([ROW]).to_pylist() == rows(20).to_pylist()
    until(lambda: bell.rung == [ticket])
    status = client.get(answer.headers["location"])
    assert status.status_code == 200
    assert status.headers["x-rayfm-version"] == V1
    assert (status.json()["state"], status.json()["rows"], status.json()["ticket"]) == ("queued", 20, ticket)


def test_bad_rows_are_listed_and_kept_and_the_others_accepted(client, root):
    table = rows(10).to_pylist()
    table[3]["traffic"] = "billboard"
    answer = client.post(f"/v1/teachers/{TEACHER}/label", content=as_json(pa.Table.from_pylist(table)), headers=JSON)
    assert answer.status_code == 202
    assert (answer.json()["rows"], answer.json()["rejected"]) == (9, 1)
    assert answer.json()["rejects"] == [{"row": 3, "reason": "unknown traffic"}]
    assert client.get(answer.headers["location"]).json()["rejected"] == 1
    spool = Spool(root, TEACHER)
    assert spool.rejected_rows() == 1
    (file,) = spool.rejects.glob("*.arrow")
    kept = pa.ipc.open_file(file).read_all().to_pylist()
    assert kept == [table[3] | {ROW: 3, "reason": "unknown traffic"}]


@pytest.mark.parametrize(
    ("body", "headers", "code", "words"),
    [
        (as_json(rows(3).drop_columns(["user"])), JSON, 400, "lacks column 'user'"),
        (as_json(rows(0)), JSON, 400, "no rows"),
        (b'{"rows": [', JSON, 400, "the body is no JSON"),
        (b'{"rows": [{"age": 1}]}', JSON, 400, '"rows" is no object'),
        (b'{"rows": {"age": [1, "two"]}}', JSON, 400, "column 'age' of 'rows' mixes types"),
        (b"\x00\x01\x02", ARROW, 400, "no Arrow IPC stream"),
        (as_arrow(rows(20))[:700], ARROW, 400, "no Arrow IPC stream"),
        (as_arrow(rows(3)), {"content-type": "text/csv"}, 415, "send application/vnd.apache.arrow.stream or"),
        (as_arrow(rows(21)), ARROW, 413, "more than 20 rows; send fewer at a time"),
        (b" " * 20_972, JSON, 413, "the body is larger than 20971 bytes"),
    ],
)
def test_what_cannot_be_accepted_says_why(root, bell, body, headers, code, words):
    client = TestClient(build_app({TEACHER: make_intake(root, bell, rows=20, body_mb=0.02)}))
    answer = client.post(f"/v1/teachers/{TEACHER}/label", content=body, headers=headers)
    assert answer.status_code == code
    assert words in answer.json()["detail"]
    assert answer.headers["content-type"] == "application/problem+json"
    assert list(Spool(root, TEACHER).waiting()) == []
    assert bell.rung == []


def test_a_post_without_a_good_row_is_refused_with_the_reasons(client, root):
    table = rows(3).set_column(2, "traffic", pa.array(["x", "y", "z"]))
    answer = client.post(f"/v1/teachers/{TEACHER}/label", content=as_arrow(table), headers=ARROW)
    assert answer.status_code == 400
    assert "no row can be labelled; row 0: unknown traffic" in answer.json()["detail"]
    assert [reject["row"] for reject in answer.json()["rejects"]] == [0, 1, 2]
    assert list(Spool(root, TEACHER).waiting()) == []


def test_arrow_whose_offsets_point_outside_is_refused(client, root):
    """A list whose offsets lie: read without a check, it would be another's memory."""
    body = as_arrow(rows(3).append_column("tags", pa.array([[1], [2], [3]])))
    offsets = pa.array([0, 1, 2, 3], pa.int32()).buffers()[1].to_pybytes()[:16]
    assert body.count(offsets) >= 1
    forged = body.replace(offsets, pa.array([0, 1, 2, 1 << 30], pa.int32()).buffers()[1].to_pybytes()[:16])
    answer = client.post(f"/v1/teachers/{TEACHER}/label", content=forged, headers=ARROW)
    assert answer.status_code == 400


ODD = [
    pa.array([None, None, None]),
    pa.array([True, False, True]),
    pa.array([1, 2, 3], pa.uint64()),
    pa.array([2**64 - 1, 0, 1], pa.uint64()),
    pa.array([1.5, float("inf"), float("nan")]),
    pa.array([1, 2, 3], pa.timestamp("us")),
    pa.array([1, 2, 3], pa.date32()),
    pa.array(["a", "", None]),
    pa.array([b"\xff", b"", None]),
    pa.array(["a", "b", "a"]).dictionary_encode(),
    pa.array([[1], None, []]),
    pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.int64(), 2)),
    pa.array([{"a": 1}, {"a": 2}, None]),
    pa.array([1, 2, 3], pa.decimal128(38, 2)),
    pa.array([-(2**63), 2**63 - 1, 0]),
    pa.array(["x" * 5000, "y", "z"]),
]


@pytest.mark.parametrize("column", ["example_id", "time", "traffic", "age", "user", "note"])
def test_no_type_of_a_column_is_the_servers_fault(client, root, column):
    for odd in ODD:
        table = rows(3)
        table = table.set_column(table.column_names.index(column), column, odd)
        answer = client.post(f"/v1/teachers/{TEACHER}/label", content=as_arrow(table), headers=ARROW)
        assert answer.status_code in (202, 400, 413), (odd.type, answer.text)
    for ticket, _ in Spool(root, TEACHER).waiting():
        found = Spool(root, TEACHER).read(ticket)
        version = Versions(SnapshotStore(root), MODEL).get(V1)
        assert fitted(found.table, version).num_rows == found.table.num_rows, "what is accepted can be labelled"


def test_no_damage_to_a_body_is_the_servers_fault(client):
    rng = np.random.default_rng(0)
    answers = set()
    for encode, headers in ((as_arrow, ARROW), (as_json, JSON)):
        good = encode(rows(5))
        for _ in range(100):
            body = bytearray(good)
            for place in rng.integers(0, len(body), rng.integers(1, 4)):
                body[place] = rng.integers(0, 256)
            cut = bytes(body[: rng.integers(0, len(body) + 1)]) if rng.random() < 0.3 else bytes(body)
            answer = client.post(f"/v1/teachers/{TEACHER}/label", content=cut, headers=headers)
            assert answer.status_code < 500, answer.text
            answers.add(answer.status_code)
    assert {202, 400} <= answers


def test_unknown_teachers_and_tickets_are_not_found(client):
    answer = client.post("/v1/teachers/nobody/label", content=as_arrow(rows(1)), headers=ARROW)
    assert (answer.status_code, answer.json()["detail"]) == (404, "no teacher of that name takes rows; there is fm")
    for ticket in ("0" * 32, "x", "..%2F..%2Fetc"):
        assert client.get(f"/v1/labels/{ticket}").status_code == 404


def test_too_many_waiting_posts_are_told_to_come_back(root, bell):
    intake = make_intake(root, bell, queued=2, retry_after_s=7)
    client = TestClient(build_app({TEACHER: intake}))

    def post():
        return client.post(f"/v1/teachers/{TEACHER}/label", content=as_arrow(rows(1)), headers=ARROW)

    assert [post().status_code for _ in range(2)] == [202, 202]
    refused = post()
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "7")
    assert intake.spool.queued()[0] == 2
    for ticket, _ in intake.spool.waiting():
        intake.spool.finish(ticket, V1, 1, 0, 1, 60.0)
    intake._counted = -10.0  # as if the count's second had passed
    assert post().status_code == 202


def test_rows_that_fill_the_disk_are_told_to_come_back(root, bell):
    intake = make_intake(root, bell, queued_mb=0.001)
    client = TestClient(build_app({TEACHER: intake}))
    answers = [
        client.post(f"/v1/teachers/{TEACHER}/label", content=as_arrow(rows(50)), headers=ARROW).status_code
        for _ in range(2)
    ]
    assert answers == [202, 429]
    assert intake.spool.queued()[1] > 1000


def test_refused_rows_fill_the_disk_as_well(root, bell):
    intake = make_intake(root, bell, queued_mb=0.001)
    client = TestClient(build_app({TEACHER: intake}))
    table = rows(50).to_pylist()
    for row in table[1:]:
        row["traffic"] = "billboard"

    def post():
        body = as_json(pa.Table.from_pylist(table))
        return client.post(f"/v1/teachers/{TEACHER}/label", content=body, headers=JSON)

    accepted = post()
    assert (accepted.status_code, accepted.json()["rejected"]) == (202, 49)
    (ticket, _) = next(intake.spool.waiting())
    intake.spool.finish(ticket, V1, 1, 0, 1, 60.0)
    for again in (intake, make_intake(root, bell, queued_mb=0.001)):  # as it remembers, and as it finds
        client = TestClient(build_app({TEACHER: again}))
        again._counted = -10.0
        refused = post()
        assert refused.status_code == 429
        assert "of refused ones are kept; post again later" in refused.json()["detail"]
    assert intake.spool.queued() == (0, 0)


def test_a_post_of_too_many_periods_is_told_so(root, bell):
    client = TestClient(build_app({TEACHER: make_intake(root, bell, periods=2)}))
    table = pa.concat_tables([rows(1, first_id=day, day=day) for day in range(3)])
    answer = client.post(f"/v1/teachers/{TEACHER}/label", content=as_arrow(table), headers=ARROW)
    assert answer.status_code == 400
    assert answer.json()["detail"] == "the post's rows are of 3 days; send those of at most 2 at a time"
    assert list(Spool(root, TEACHER).waiting()) == []
    future = table.set_column(1, "time", pa.array([DAY2_US, DAY2_US + 1, round((time.time() + 90_000) * 1e6)]))
    answer = client.post(f"/v1/teachers/{TEACHER}/label", content=as_arrow(future), headers=ARROW)
    assert answer.json()["rejects"] == [{"row": 2, "reason": "time is more than 86400 s in the future"}]


@pytest.mark.parametrize(("told", "limits"), [(b"50", {}), (None, {"timeout_s": 0.05})], ids=["asked", "limit"])
def test_a_body_that_does_not_come_is_not_waited_for_and_files_are_counted_elsewhere(root, bell, told, limits):
    intake = make_intake(root, bell, **limits)
    real, counted_in, sent = intake.spool.queued, [], []

    def queued_files():
        counted_in.append(threading.current_thread())
        return real()

    async def never():
        await asyncio.sleep(3600)

    async def send(message):
        sent.append(message)

    intake.spool.queued = queued_files
    headers = [(b"content-type", ARROW["content-type"].encode())]
    if told is not None:
        headers.append((TIMEOUT_HEADER.encode(), told))
    scope = {
        "type": "http", "method": "POST", "path": f"/v1/teachers/{TEACHER}/label", "raw_path": b"", "query_string": b"",
        "headers": headers, "root_path": "", "scheme": "http", "http_version": "1.1", "client": None, "server": None,
    }  # fmt: skip
    asyncio.run(asyncio.wait_for(build_app({TEACHER: intake})(scope, never, send), 10))
    assert sent[0]["status"] == 504
    assert len(counted_in) == 1
    assert threading.current_thread() not in counted_in, "the event loop waits for no folder"
    assert list(intake.spool.waiting()) == []


def test_the_backlog_tells_whether_anybody_labels(client, root):
    url = f"/v1/teachers/{TEACHER}/label"
    none = {"waiting": 0, "oldest_s": 0.0, "dead_letters": 0, "rejected_rows": 0}
    assert client.get(url).json() == none
    spool = Spool(root, TEACHER)
    spool.bury(queued(spool), "test")
    queued(spool)
    found = client.get(url).json()
    assert 0.0 <= found.pop("oldest_s") < 30.0
    assert found == {"waiting": 1, "dead_letters": 1, "rejected_rows": 0}
    assert spool.backlog(time.time() + 100).oldest_s > 99.0
    assert client.get("/v1/teachers/nobody/label").status_code == 404
    assert client.get("/healthz").json() == {"status": "ok"}


def test_a_reason_names_no_folder_of_the_server(root, bell, client):
    intake = make_intake(root, bell)
    ticket = queued(intake.spool)
    (intake.spool.folder / "queued" / f"{ticket}.arrow").write_bytes(b"damaged")
    take(intake.spool, ticket, intake.config)
    status = client.get(f"/v1/labels/{ticket}").json()
    assert (status["state"], str(root) in status["reason"]) == ("dead", False)
    assert "the spooled rows are damaged" in status["reason"]


def test_nothing_published_is_not_the_clients_fault(tmp_path, bell):
    client = TestClient(build_app({TEACHER: make_intake(tmp_path, bell)}))
    answer = client.post(f"/v1/teachers/{TEACHER}/label", content=as_arrow(rows(1)), headers=ARROW)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert "no version of the teacher can label yet" in answer.json()["detail"]
    assert str(tmp_path) not in answer.text


def test_a_token_is_asked_for_before_anything_is_read(root, bell):
    token = "a-token-of-enough-length"
    client = TestClient(build_app({TEACHER: make_intake(root, bell)}, TokenCheck(token)))
    right = {"authorization": f"Bearer {token}"}
    for method, path in (("POST", f"/v1/teachers/{TEACHER}/label"), ("GET", "/v1/labels/" + "0" * 32)):
        for headers in ({}, {"authorization": "Bearer wrong"}):
            assert client.request(method, path, content=as_arrow(rows(1)), headers=ARROW | headers).status_code == 401
        assert client.request(method, path, content=b"", headers=right).status_code in (404, 415)
    assert list(Spool(root, TEACHER).waiting()) == []


def test_the_endpoints_stand_beside_those_that_score(root, bell):
    """In one app, under one guard, in one OpenAPI document."""
    router = build_router({TEACHER: make_intake(root, bell)})
    token = "a-token-of-enough-length"
    app = create_app(None, LimitsConfig(), TokenCheck(token), [router])
    client = TestClient(app, headers={"authorization": f"Bearer {token}"})
    answer = client.post(f"/v1/teachers/{TEACHER}/label", content=as_arrow(rows(2)), headers=ARROW)
    assert answer.status_code == 202
    assert client.get(answer.headers["location"]).json()["rows"] == 2
    assert client.post("/v1/teachers/nobody/label", headers=ARROW).headers["content-type"] == PROBLEM
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/v1/teachers/{teacher}/label", "/v1/labels/{ticket}", "/v1/teachers/{teacher}:score"} <= set(paths)
    assert TestClient(app).get(answer.headers["location"]).status_code == 401


def test_rows_are_accepted_while_redis_is_down(root, bell):
    """A 202 never depends on the queue; the sweeper rings for what could not be rung."""
    bell.down = True
    client = TestClient(build_app({TEACHER: make_intake(root, bell)}))
    tickets = [
        client.post(f"/v1/teachers/{TEACHER}/label", content=as_arrow(rows(1)), headers=ARROW).json()["ticket"]
        for _ in range(3)
    ]
    assert [ticket for ticket, _ in Spool(root, TEACHER).waiting()] == sorted(tickets)


# The queue, in a real Redis.


@pytest.fixture
def settings(root, redis_server, request):
    name = "".join(letter for letter in request.node.name if letter.isalnum())[:60]
    return config(root, run=name, redis=f"redis://{redis_server.address}/0", consumer={"sweep_s": 10.0, "stall_s": 61})


@pytest.fixture
def doorbell(settings):
    made = Doorbell(settings)
    yield made
    made.close()


def test_messages_carry_tickets_and_their_time(doorbell):
    assert doorbell.oldest() is None
    before = time.time()
    tickets = [f"ticket{number}" for number in range(3)]
    for ticket in tickets:
        doorbell.ring(ticket)
    assert doorbell.waiting() == 3
    assert before <= doorbell.oldest() <= time.time()


def test_the_sweeper_rings_for_what_was_lost_and_for_nothing_else(settings, doorbell):
    spool = Spool(settings.root, TEACHER)
    ticket = queued(spool)
    now = time.time()
    assert sweep(spool, doorbell, settings, now + 5) == 0, "its message may be on its way"
    assert sweep(spool, doorbell, settings, now + 11) == 1, "no message waits: it was lost"
    assert doorbell.waiting() == 1
    assert sweep(spool, doorbell, settings, time.time() + 1000) == 0, "its message waits, however long"
    doorbell._redis.delete(settings.queue)
    assert sweep(spool, doorbell, settings, time.time() + 11) == 1
    spool.note(ticket, "delivered")
    assert sweep(spool, doorbell, settings, time.time() + 1) == 0


def test_a_message_that_was_overtaken_is_lost(settings, doorbell):
    """What was sent before the message that is next, and is not in work, will never come."""
    spool = Spool(settings.root, TEACHER)
    lost, waits = queued(spool), queued(spool)
    doorbell.ring(waits)
    assert sweep(spool, doorbell, settings, time.time() + 100) == 0, "both may have been sent at the same time"
    path = spool.folder / "queued" / f"{lost}.arrow"
    os.utime(path, (time.time() - 60, time.time() - 60))
    assert sweep(spool, doorbell, settings, time.time() + 100) == 1
    assert doorbell.waiting() == 2


def test_what_only_fails_is_given_up_in_the_end(settings, doorbell):
    spool = Spool(settings.root, TEACHER)
    failing, waiting = queued(spool), queued(spool)
    spool.note(failing, "delivered")
    spool.note(failing, "failed", why="the service is down", lasting=False)
    sweep(spool, doorbell, settings, time.time() + settings.consumer.give_up_s - 5)
    assert spool.status(failing).state == "queued"
    sweep(spool, doorbell, settings, time.time() + settings.consumer.give_up_s + 5)
    assert spool.status(failing).state == "dead"
    assert "the service is down (still, 86400 s after" in spool.status(failing).reason
    assert spool.status(waiting).state == "queued", "what merely waits has not failed"


def test_a_redis_that_restarts_is_found_again(settings, doorbell, redis_server):
    doorbell.ring("before")
    redis_server.kill()
    try:
        started = time.monotonic()
        with pytest.raises(CapacityError, match=r"Redis at 127\.0\.0\.1:[0-9]+ does not answer"):
            doorbell.ring("meanwhile")
        with pytest.raises(CapacityError, match="does not answer"):
            doorbell.waiting()
        assert time.monotonic() - started < 30, "nobody hangs on a dead Redis"
    finally:
        redis_server.start()
    doorbell.ring("after")
    assert doorbell.waiting() == 2, "the append-only file kept the first"


def test_ray_serve_counts_the_same_queue(settings, doorbell):
    """The name and the address that the autoscaling policy is given lead to our messages."""
    several = settings.model_copy(
        update={"consumer": settings.consumer.model_copy(update={"max_replicas": 3, "queue_per_replica": 2})}
    )
    options = autoscaling(several)["autoscaling_config"]
    assert (options.min_replicas, options.max_replicas) == (1, 3)
    policy = options.policy.get_policy()
    policy = policy(**options.policy.policy_kwargs) if isinstance(policy, type) else policy
    for number in range(5):
        doorbell.ring(f"ticket{number}")
    context = SimpleNamespace(current_num_replicas=1, total_num_requests=0, config=options)

    async def decide():
        policy(context)
        for _ in range(100):
            await asyncio.sleep(0.01)
            if policy._queue_length:
                break
        return policy(context)

    wanted, state = asyncio.run(decide())
    assert state == {"queue_length": 5}
    assert wanted == 2.5, "five messages, two for each consumer"
    assert autoscaling(settings) == {"num_replicas": 1}


# The consumer, without its Ray and its Celery.


@pytest.fixture
def consumer(settings):
    oracle = Oracle()
    made = NearLineConsumer(settings.dump(), "none", oracle)
    made.oracle = oracle
    yield made
    made.stop()


def test_a_consumer_labels_a_ticket_and_forgets_one_that_is_done(consumer, settings):
    ticket = queued(consumer.spool, 4)
    consumer.label(ticket)
    assert consumer.spool.status(ticket).state == "committed"
    assert NearLineLabels(settings.root).rows(TEACHER)["example_id"].to_pylist() == [0, 1, 2, 3]
    consumer.label(ticket)
    assert consumer.oracle.asked == [4]
    consumer.check_health()


def test_a_ticket_that_keeps_failing_is_a_dead_letter_that_can_be_replayed(consumer, settings):
    ticket = queued(consumer.spool, 4)
    consumer.oracle.poison = {2}
    for _ in range(settings.consumer.retries):
        with pytest.raises(NotLabelled, match="index out of range"):
            consumer.label(ticket)
    consumer.label(ticket)  # the last time: there is nothing to try again
    status = consumer.spool.status(ticket)
    assert (status.state, status.reason) == ("dead", "RuntimeError: index out of range")
    consumer.label(ticket)
    assert consumer.spool.dead_rows(ticket).table.num_rows == 4
    consumer.oracle.poison = set()
    consumer.spool.replay(ticket)
    consumer.label(ticket)
    assert consumer.spool.status(ticket).state == "committed"
    assert NearLineLabels(settings.root).rows(TEACHER).num_rows == 4


def test_a_ticket_in_hand_is_neither_rung_for_nor_given_up_while_the_teacher_hangs(consumer, settings, monkeypatch):
    ticket = queued(consumer.spool, 4)
    hangs, asked = threading.Event(), threading.Event()

    def score(table, version):
        asked.set()
        assert hangs.wait(20)
        raise TimeoutError("no answer")

    consumer.batcher._label.__self__._score = score
    with ThreadPoolExecutor(20) as threads:
        first = threads.submit(consumer.label, ticket)
        assert asked.wait(20)
        path = consumer.spool.folder / "queued" / f"{ticket}.arrow"
        os.utime(path, (0, 0))
        later = time.time() + 60
        held = consumer._in_hand.tickets()
        assert held == {ticket}
        assert sweep(consumer.spool, consumer.doorbell, settings, later, in_hand=held) == 0
        until(lambda: path.stat().st_mtime > 0)  # nor do the sweepers of others ring for it
        consumer._starved_since = consumer._last_delivery = time.monotonic() - 100
        consumer.check_health()  # threads that wait for the teacher take no messages
        again = [threads.submit(consumer.label, ticket) for _ in range(15)]  # a message may come twice all the same
        until(lambda: consumer.spool.history(ticket).deliveries == 16)
        hangs.set()
        assert {type(future.exception(20)) for future in [first, *again]} == {NotLabelled}
    assert consumer._in_hand.tickets() == frozenset()
    assert sweep(consumer.spool, consumer.doorbell, settings, later) == 1
    history = consumer.spool.history(ticket)
    assert history.deliveries - history.failures > settings.consumer.crashes
    assert history.unfinished == frozenset()
    consumer.batcher._label.__self__._score = consumer.oracle
    consumer.label(ticket)
    assert consumer.spool.status(ticket).state == "committed"


def test_an_error_outside_a_try_ends_the_delivery_too(consumer, monkeypatch):
    ticket = queued(consumer.spool, 4)

    def full(batch):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(consumer.batcher, "_label", full)
    with pytest.raises(NotLabelled, match="No space left on device"):
        consumer.label(ticket)
    assert consumer.spool.history(ticket).unfinished == frozenset()


def test_a_forward_that_nobody_waits_for_is_cancelled(consumer, monkeypatch):
    cancelled = []

    def result(timeout_s):
        assert timeout_s == consumer.config.consumer.score_timeout_s
        raise TimeoutError("no replica")

    response = SimpleNamespace(result=result, cancel=lambda: cancelled.append(True))
    handle = SimpleNamespace(score=SimpleNamespace(remote=lambda rows, version: response))
    monkeypatch.setattr("rayfm.serving.nearline.consumer.serve.get_app_handle", lambda name: handle)
    with pytest.raises(TimeoutError, match="no replica"):
        consumer._ask_service(rows(2), V1)
    assert cancelled == [True]


@pytest.mark.parametrize("message", ["../../../etc/passwd", "", None, 7, ["x"]])
def test_a_message_that_is_not_ours_is_dropped(consumer, message):
    consumer.label(message)
    assert consumer.oracle.asked == []


def test_a_consumer_whose_batch_does_not_end_is_not_healthy(consumer, monkeypatch):
    monkeypatch.setattr(consumer.batcher, "_busy_since", time.monotonic() - 121)
    consumer.check_health()
    monkeypatch.setattr(consumer.batcher, "_busy_since", time.monotonic() - 123)
    with pytest.raises(RuntimeError, match="a batch has taken 123 s"):
        consumer.check_health()


def test_a_consumer_whose_threads_died_is_not_healthy(settings):
    consumer = NearLineConsumer(settings.dump(), "none", Oracle())
    consumer.check_health()
    consumer._adapter = SimpleNamespace(_worker_thread=SimpleNamespace(is_alive=lambda: False))
    with pytest.raises(RuntimeError, match="the thread that takes messages is dead"):
        consumer.check_health()
    consumer._adapter._worker_thread = SimpleNamespace(is_alive=lambda: True)
    consumer.check_health()
    consumer.batcher.stop()
    with pytest.raises(RuntimeError, match="the thread that labels"):
        consumer.check_health()
    consumer.stop()


def test_a_consumer_that_gets_nothing_while_messages_wait_is_not_healthy(consumer, monkeypatch):
    consumer._starved_since = time.monotonic()
    consumer.check_health()
    later = time.monotonic() + 62
    monkeypatch.setattr("rayfm.serving.nearline.consumer.time.monotonic", lambda: later)
    with pytest.raises(RuntimeError, match="messages wait, and none has come for 61 s"):
        consumer.check_health()
    consumer._starved_since = None
    consumer.check_health()


# Configs.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"redis": "amqp://host"}, "is no Redis; write redis://HOST:PORT/NUMBER"),
        ({"teacher": "../fm"}, "use letters, digits"),
        ({"model": "a/b"}, "use letters, digits"),
        ({"consumer": {"replicas": 3}}, "max_replicas (1) is less than replicas (3)"),
        ({"consumer": {"stall_s": 10}}, "stall_s (10) is too short for a forward of score_timeout_s (120)"),
        ({"period": "week"}, "period"),
        ({"consumers": {}}, "consumers"),
    ],
)
def test_a_wrong_config_names_the_key(tmp_path, changes, words):
    plain = {"run": "r", "teacher": "fm", "root": str(tmp_path), "model": "fm.teacher.0"} | changes
    with pytest.raises(ConfigError) as error:
        validate(NearLineConfig, plain, "near.yaml")
    assert words in str(error.value)


def test_a_config_file_is_read(tmp_path):
    path = tmp_path / "near.yaml"
    path.write_text("run: demo\nteacher: fm\nroot: runs/demo\nmodel: fm.teacher.0\nlimits: {rows: 5}\n")
    loaded = load_nearline(path)
    assert (loaded.queue, loaded.limits.rows) == ("rayfm-demo-fm-nearline", 5)


def test_what_plans_the_endpoints_leaves_ray_serve_alone():
    """It reads its environment when it is imported, and the production profile is set after the plan is made."""
    script = "import sys, rayfm.serving.endpoints; assert 'ray.serve' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_endpoints_take_posts_for_each_teacher(root, redis_server, monkeypatch):
    teachers = tuple(TeacherPlan(name=name, model=MODEL) for name in (TEACHER, "other"))
    metadata = f"sqlite://{root}/metadata.sqlite"
    options = {"redis": f"redis://{redis_server.address}/0", "limits": {"rows": 7}}
    plan = EndpointsPlan(run="r", root=str(root), students=(), teachers=teachers)
    assert plan.near_line() == {}
    endpoints = EndpointsConfig(metadata=metadata, near_line=options)
    plan = plan.model_copy(update={"endpoints": endpoints})
    found = plan.near_line()[TEACHER]
    assert found == config(root, run=found.run, metadata=metadata, **options)
    asked = []

    def handle(run: str, teacher: str) -> None:
        asked.append(application_name(run, teacher))
        raise LookupError

    monkeypatch.setattr("rayfm.serving.endpoints.teacher_handle", handle)
    with pytest.raises(LookupError):
        asyncio.run(ServedTeacher("r", TEACHER).version())
    assert asked == [application_name(found.run, TEACHER)], "consumers ask the service that the endpoints ask"
    assert plan.near_line()["other"].teacher == "other"
    token = "a-token-of-enough-length"
    replica = EndpointsReplica(plan.dump(), TokenCheck(token))
    try:
        client = TestClient(replica.__serve_build_asgi_app__(), headers={"authorization": f"Bearer {token}"})
        answer = client.post("/v1/teachers/other/label", content=as_arrow(rows(7)), headers=ARROW)
        assert (answer.status_code, answer.json()["teacher"]) == (202, "other")
        assert client.get(answer.headers["location"]).json()["state"] == "queued"
        assert client.post("/v1/teachers/fm/label", content=as_arrow(rows(8)), headers=ARROW).status_code == 413
        assert Spool(root, "other").queued()[0] == 1
    finally:
        replica._backend.close()


@pytest.mark.parametrize("package", ["redis", "celery", "tornado"])
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    for needs in (Doorbell, task_processor):
        with pytest.raises(ConfigError, match=f"needs the package '{package}'; run `pip install 'rayfm"):
            needs(config(tmp_path))


def test_an_intake_serves_one_run_and_each_teacher_once(tmp_path):
    one, other = config(tmp_path), config(tmp_path, run="other")
    for configs in ([one, one], [one, other], []):
        with pytest.raises(ConfigError, match="each teacher of one run once"):
            start_intake(configs, 1)
    with pytest.raises(ConfigError, match="needs a token"):
        start_intake([one], 1, host="0.0.0.0")
