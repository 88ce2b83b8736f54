"""The door of near-line labelling: posts, tickets, refusals, and the configs that open it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time

import numpy as np
import pyarrow as pa
import pytest
from nearline_cases import (
    DAY2_US,
    MODEL,
    TEACHER,
    V1,
    as_arrow,
    as_json,
    config,
    queued,
    rows,
    until,
)
from starlette.testclient import TestClient

from rayfm.client.wire import PROBLEM, TIMEOUT_HEADER
from rayfm.config import CapacityError, ConfigError, validate
from rayfm.serving.application import application_name
from rayfm.serving.endpoints import EndpointsPlan, EndpointsReplica, ServedTeacher, TeacherPlan
from rayfm.serving.http.app import create_app
from rayfm.serving.http.config import EndpointsConfig, LimitsConfig
from rayfm.serving.http.token import TokenCheck
from rayfm.serving.nearline.application import start_intake
from rayfm.serving.nearline.config import NearLineConfig, load_nearline
from rayfm.serving.nearline.doorbell import Doorbell, task_processor
from rayfm.serving.nearline.intake import Intake
from rayfm.serving.nearline.labeller import take
from rayfm.serving.nearline.router import build_app, build_router
from rayfm.serving.nearline.rows import Versions, fitted
from rayfm.serving.nearline.spool import ROW, Spool
from rayfm.snapshots import SnapshotStore

ARROW = {"content-type": "application/vnd.apache.arrow.stream"}
JSON = {"content-type": "application/json"}


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
