"""Whatever is sent, the answer is one that the OpenAPI document knows, and none is a 5xx."""

from __future__ import annotations

import gc
import json

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import schemathesis

# It imports this only when it is asked for a document, and pytest parses the file then. Where another thread parses too
# (a logged traceback's lines are), Python 3.11.7 may take the two for one (gh-106905): SystemError.
import schemathesis.specs.openapi.schemas
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from served_models import CANDIDATE_COLUMNS, USER_COLUMNS, LocalTeacher, candidate_rows, publish_model, user_row
from starlette.testclient import TestClient

from rayfm.client.wire import ARROW, JSON, PROBLEM, TIMEOUT_HEADER, VERSION_HEADER, write_streams
from rayfm.export.config import CompileConfig
from rayfm.models import MODELS
from rayfm.serving.backend import ScoringBackend
from rayfm.serving.http.app import create_app
from rayfm.serving.http.config import EndpointsConfig, LimitsConfig
from rayfm.serving.retrieval import Retriever, load_index, retrieve_router
from rayfm.serving.retrieval_config import RetrievalConfig
from rayfm.serving.student import Students
from rayfm.snapshots import SnapshotStore

STUDENT, TEACHER, TOWERS = "vm.direct.1", "fm.teacher.0", "towers.none.1"
TWO_TOWER = MODELS["two_tower"].Config(item_features=("ad", "tags"), hidden=(8,), vector_dim=4, embedding_dim=8)
LIMITS = LimitsConfig(max_body_mb=1.0, max_candidates=50, max_rows=50, max_list_values=1000)
BODY = write_streams([user_row(), candidate_rows(5)])
FUZZ = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    for seed, name in enumerate((STUDENT, TEACHER)):
        publish_model(root, name, "v1", seed)
    students = Students(str(root), (STUDENT,), EndpointsConfig(limits=LIMITS, compile=CompileConfig(compile="eager")))
    backend = ScoringBackend(students, {"fm": LocalTeacher(root, TEACHER)}, LIMITS)
    publish_model(root, TOWERS, "v1", 2, TWO_TOWER)
    pq.write_table(pa.table({"ad": ["a", "b", "c"], "tags": pa.array([[1, 2]] * 3)}), root / "items.parquet")
    items = load_index(SnapshotStore(root), TOWERS, "v1", RetrievalConfig(catalogue=str(root / "items.parquet")))
    retrieve = retrieve_router({TOWERS: Retriever(lambda: items)}, LIMITS, students.queue)
    yield create_app(backend, LIMITS, routers=[retrieve])
    backend.close()


@pytest.fixture(scope="module")
def client(app):
    with TestClient(app) as client:
        yield client


@schemathesis.serializer(ARROW)
def arrow_bytes(context, value) -> bytes:
    """The document says of Arrow no more than that it is binary."""
    return value if isinstance(value, bytes) else str(value).encode()


def test_requests_made_from_the_openapi_document(app):
    document = schemathesis.openapi.from_asgi("/openapi.json", app)
    operations = [found.ok() for found in document.get_all_operations()]
    assert len(operations) == 5
    seen = set()
    for operation in operations:

        @FUZZ
        @given(st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in GenerationMode)), st.booleans())
        def call(case, served):
            if served:  # past the name: hardly one of those made up is served
                case.path_parameters = {
                    "model": TOWERS if "retrieve" in case.operation.path else STUDENT,
                    "teacher": "fm",
                }
            response = case.call()
            seen.add(response.status_code)
            if response.status_code == 504:
                assert TIMEOUT_HEADER in case.headers, response.text
                return
            assert response.status_code < 500, response.text
            case.validate_response(response)

        call()
    assert {200, 400, 404} <= seen


def check(response) -> None:
    assert response.status_code < 500, response.text
    if response.status_code == 200:
        assert response.headers[VERSION_HEADER] == "v1"
    else:
        assert response.headers["content-type"] == PROBLEM
        assert response.json()["detail"]


@FUZZ
@given(st.data())
def test_damaged_arrow(client, data):
    body = bytearray(BODY)
    for _ in range(data.draw(st.integers(1, 6))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    start, stop = sorted((data.draw(st.integers(0, len(body))), data.draw(st.integers(len(body) // 2, len(body)))))
    whole = data.draw(st.booleans())
    sent = bytes(body if whole else body[start:stop])
    check(client.post(f"/v1/models/{STUDENT}:score", content=sent, headers={"content-type": ARROW}))


IDS = st.one_of(
    st.none(),
    st.integers(),
    st.integers(-(2**65), 2**65),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
    st.booleans(),
    st.sampled_from([2**63, 2**63 - 1, -(2**63) - 1, 10**30, 1e308]),
)
VALUES = st.one_of(IDS, st.lists(IDS, max_size=4))


@FUZZ
@given(
    st.dictionaries(st.one_of(st.sampled_from(USER_COLUMNS), st.text(max_size=5)), VALUES, max_size=8),
    st.dictionaries(st.one_of(st.sampled_from(CANDIDATE_COLUMNS), st.text(max_size=5)), st.lists(VALUES, max_size=3)),
)
def test_odd_values(client, user, candidates):
    body = json.dumps({"user": user, "candidates": candidates})
    check(client.post(f"/v1/models/{STUDENT}:score", content=body, headers={"content-type": JSON}))


@FUZZ
@given(st.one_of(st.just(None), st.sampled_from(USER_COLUMNS)), VALUES, st.lists(VALUES, max_size=4))
def test_odd_retrievals(client, name, value, exclude):
    user = dict(GOOD["user"]) | ({} if name is None else {name: value})
    check(client.post(f"/v1/models/{TOWERS}:retrieve?k=2", json={"user": user, "exclude": exclude}))


GOOD = {"user": user_row().to_pylist()[0], "candidates": candidate_rows(3).to_pydict()}


@FUZZ
@given(st.sampled_from([*USER_COLUMNS, *CANDIDATE_COLUMNS]), VALUES)
def test_one_odd_value_in_a_good_request(client, name, value):
    """Past the names, where the values themselves are looked at."""
    body = {"user": dict(GOOD["user"]), "candidates": dict(GOOD["candidates"])}
    if name in USER_COLUMNS:
        body["user"][name] = value
    else:
        body["candidates"][name] = [value, *body["candidates"][name][1:]]
    check(client.post(f"/v1/models/{STUDENT}:score", json=body))


@FUZZ
@given(st.sampled_from([pa.int8(), pa.uint64(), pa.float16(), pa.float64(), pa.bool_(), pa.large_string(), pa.null()]))
def test_odd_types(client, type_):
    values = {pa.large_string(): ["a"] * 5, pa.bool_(): [True] * 5, pa.null(): [None] * 5}.get(type_, [7] * 5)
    for name, column in (("ad", pa.array(values, type_)), ("tags", pa.array([[v] for v in values], pa.list_(type_)))):
        table = candidate_rows(5)
        table = table.set_column(table.column_names.index(name), name, column)
        content = write_streams([user_row(), table])
        check(client.post(f"/v1/models/{STUDENT}:score", content=content, headers={"content-type": ARROW}))


def test_memory_does_not_grow_with_bad_requests(client):
    process = psutil.Process()
    bodies = [BODY[: len(BODY) // 2], BODY[:-8] + b"\xff" * 8, b"\x00" * 100_000, write_streams([user_row()] * 2)]

    def send(times: int) -> int:
        for _ in range(times):
            for body in bodies:
                check(client.post(f"/v1/models/{STUDENT}:score", content=body, headers={"content-type": ARROW}))
        gc.collect()
        pa.default_memory_pool().release_unused()
        return process.memory_info().rss

    before = send(50)
    held = pa.total_allocated_bytes()
    assert send(100) - before < 16 * 2**20
    assert pa.total_allocated_bytes() <= held + 2**16
