from __future__ import annotations

import asyncio
import socket
import time
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from example_store import every_feature_rows
from served_models import SCHEMA, TASKS, predictions, publish_model

from rayfm.config import CapacityError, DataError, SnapshotError
from rayfm.data.encode import Encoder
from rayfm.serving.application import application_name
from rayfm.serving.proxies import check_port
from rayfm.serving.teacher import TeacherService, load_version, score_table
from rayfm.snapshots import SnapshotStore

MODEL = "fm.teacher.0"


def score(service: TeacherService, table: pa.Table, version: str | None = None) -> tuple[str, pa.Table]:
    return asyncio.run(service.score(table, version))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def models(root):
    return {version: publish_model(root, MODEL, version, seed) for seed, version in enumerate(("v1", "v2", "v3"))}


@pytest.fixture
def service(root, models):
    return TeacherService({"root": str(root), "model": MODEL, "predict_rows": 64})


@pytest.fixture(scope="module")
def rows():
    return every_feature_rows(150, seed=3)


def test_predictions_are_the_models_own(root, models, rows):
    loaded = load_version(SnapshotStore(root), MODEL, "v1")
    assert (loaded.version, loaded.trained_through, loaded.tasks) == ("v1", "2024-01-01", TASKS)
    for at_once in (7, 64, 4096):
        found = score_table(loaded, rows, at_once)
        assert found.column_names == list(TASKS)
        assert {str(field.type) for field in found.schema} == {"float"}
        for task, values in predictions(models["v1"], rows).items():
            np.testing.assert_allclose(found[task].to_numpy(), values, rtol=1e-5, atol=1e-6)


def test_the_representation_is_the_models_own(root, models, rows):
    loaded = load_version(SnapshotStore(root), MODEL, "v1")
    plain = score_table(loaded, rows, 64)
    encoder = Encoder(SCHEMA, labels=False)
    none = np.zeros((len(rows), 0), np.float32)
    chunk = encoder.encode(rows, np.zeros(len(rows), np.int64), none, none.astype(bool))
    with torch.no_grad():
        own = models["v1"](encoder.batch(chunk, 0, len(rows))).representation
    for at_once in (7, 4096):
        found = score_table(loaded, rows, at_once, representation=True)
        assert found.column_names == [*TASKS, "representation"]
        assert found.schema.field("representation").type == pa.list_(pa.float32(), own.shape[1])
        vectors = found["representation"].combine_chunks().flatten().to_numpy().reshape(len(rows), -1)
        np.testing.assert_allclose(vectors, own.numpy(), rtol=1e-5, atol=1e-6)
        for task in TASKS:
            np.testing.assert_allclose(found[task].to_numpy(), plain[task].to_numpy(), rtol=1e-6, atol=1e-7)
    assert score_table(loaded, rows.slice(0, 0), representation=True)["representation"].to_pylist() == []


def test_a_service_gives_the_representation_only_when_asked(service, rows):
    version, found = asyncio.run(service.score(rows, "v2", True))
    assert (version, found.column_names[-1]) == ("v2", "representation")
    asked = request(stream(rows), "v2")
    asked.query_params["representation"] = "true"
    assert pa.ipc.open_stream(asyncio.run(service(asked)).body).read_all().equals(found)
    assert "representation" not in score(service, rows, "v2")[1].column_names


def test_a_table_without_rows_has_no_predictions(root, models, rows):
    found = score_table(load_version(SnapshotStore(root), MODEL, "v1"), rows.slice(0, 0))
    assert found.num_rows == 0
    assert found.column_names == list(TASKS)


def test_a_request_names_its_version(service, models, rows):
    clicks = {}
    for version, model in models.items():
        answered, found = score(service, rows, version)
        assert answered == version
        np.testing.assert_allclose(found["click"].to_numpy(), predictions(model, rows)["click"], rtol=1e-5, atol=1e-6)
        clicks[version] = found["click"].to_numpy()
    assert np.abs(clicks["v1"] - clicks["v2"]).max() > 0.01, "the versions must differ to tell them apart"


def test_what_serves_needs_neither_labels_nor_reserved_columns(service, models, rows):
    bare = rows.drop_columns(["click", "watch", "time", "user_id", "request_id", "logged/ranking/click"])
    assert score(service, bare, "v1")[1].equals(score(service, rows, "v1")[1])


def test_a_swap_changes_who_answers(service, rows):
    with pytest.raises(ValueError, match="no version is current; name one"):
        score(service, rows)
    service.reconfigure({})
    service.reconfigure({"version": "v1"})
    assert score(service, rows)[0] == "v1"
    service.reconfigure({"version": "v2"})
    assert score(service, rows)[0] == "v2"
    assert score(service, rows, "v1")[0] == "v1", "a job that still names the old version gets it"


def test_a_swap_to_an_unknown_version_leaves_the_old_one(service, rows):
    service.reconfigure({"version": "v1"})
    with pytest.raises(SnapshotError, match=r"fm\.teacher\.0@v9 is not published"):
        service.reconfigure({"version": "v9"})
    assert score(service, rows)[0] == "v1"


def test_an_unknown_version_is_refused(service, rows):
    with pytest.raises(SnapshotError, match=r"fm\.teacher\.0@v9 is not published .* newest there: v1, v2, v3"):
        score(service, rows, "v9")
    with pytest.raises(SnapshotError, match="use letters"):
        score(service, rows, "../v1")


def test_two_versions_are_kept(service, rows):
    for version in ("v1", "v2", "v3"):
        score(service, rows, version)
    assert list(service._versions) == ["v2", "v3"]
    kept = service._versions["v2"]
    score(service, rows, "v2")
    assert service._versions["v2"] is kept, "loaded once"
    score(service, rows, "v1")
    assert list(service._versions) == ["v2", "v1"], "the one that was used longer ago goes"


def test_a_changed_byte_is_refused(tmp_path, rows):
    publish_model(tmp_path, MODEL, "v1", 1)
    publish_model(tmp_path, MODEL, "v2", 2)
    (file,) = (tmp_path / "snapshots" / MODEL / "v2").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    service = TeacherService({"root": str(tmp_path), "model": MODEL})
    service.reconfigure({"version": "v1"})
    with pytest.raises(SnapshotError, match="bytes differ from the manifest"):
        score(service, rows, "v2")
    assert score(service, rows)[0] == "v1"


def request(body: bytes, version: str | None = None):
    async def read() -> bytes:
        return body

    return SimpleNamespace(body=read, query_params={} if version is None else {"version": version})


def call(service: TeacherService, body: bytes, version: str | None = None):
    return asyncio.run(service(request(body, version)))


def stream(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def test_http_takes_and_gives_arrow(service, models, rows):
    response = call(service, stream(rows), "v2")
    assert response.status_code == 200
    assert response.headers["x-rayfm-version"] == "v2"
    assert response.media_type == "application/vnd.apache.arrow.stream"
    found = pa.ipc.open_stream(response.body).read_all()
    assert found.equals(score(service, rows, "v2")[1])
    service.reconfigure({"version": "v3"})
    assert call(service, stream(rows)).headers["x-rayfm-version"] == "v3"


def test_http_says_what_is_wrong_with_a_request(service, rows):
    good = stream(rows)
    bad_traffic = rows.set_column(rows.column_names.index("traffic"), "traffic", pa.array(["moon"] * len(rows)))
    text_age = rows.set_column(rows.column_names.index("age"), "age", pa.array(["old"] * len(rows)))
    text_user = rows.set_column(rows.column_names.index("tags"), "tags", pa.array(["old"] * len(rows)))
    users = [1, 2, 3, 2**63, *range(len(rows) - 4)]
    huge = rows.set_column(rows.column_names.index("user"), "user", pa.array(users, pa.uint64()))
    for what, body, version, said in (
        ("empty", b"", "v1", ""),
        ("no Arrow", b"not arrow at all", "v1", ""),
        ("cut off", good[: len(good) // 2], "v1", ""),
        ("cut off in the schema", good[:100], "v1", ""),
        ("no version", good, None, "name one"),
        ("a missing column", stream(rows.drop_columns(["history"])), "v1", "'history'"),
        ("an unknown traffic", stream(bad_traffic), "v1", "'moon'"),
        ("text for a number", stream(text_age), "v1", "'age'"),
        ("text for a list", stream(text_user), "v1", "'tags'"),
        ("an id beyond int64", stream(huge), "v1", "row 3: column 'user'"),
        ("a column twice", stream(rows.append_column("age", rows["age"])), "v1", "'age' stands twice"),
    ):
        response = call(service, body, version)
        assert response.status_code == 400, what
        assert said in response.body.decode(), what
        assert len(response.body) > 0, what


def test_http_takes_the_types_that_clients_have(service, rows):
    plain = pa.Table.from_pylist(rows.select(["user", "age", "history", "tags", "traffic", "ad"]).to_pylist())
    others = rows.select(["example_id", "topics", "topics__weights"])
    for field in others.schema:
        plain = plain.append_column(field, others[field.name])
    plain = plain.set_column(plain.column_names.index("ad"), "ad", plain["ad"].dictionary_encode())
    assert plain.schema.field("age").type == pa.float64()
    response = call(service, stream(plain), "v1")
    assert response.status_code == 200, response.body
    assert pa.ipc.open_stream(response.body).read_all().equals(score(service, rows, "v1")[1])


def test_a_version_that_cannot_answer_names_no_file(tmp_path, rows, caplog):
    publish_model(tmp_path, MODEL, "v1", 7)
    service = TeacherService({"root": str(tmp_path), "model": MODEL})
    (file,) = (tmp_path / "snapshots" / MODEL / "v1").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    for version in ("v9", "../../etc", "v1"):
        response = call(service, stream(rows), version)
        assert response.status_code == 404, version
        assert "that can be used" in response.body.decode()
        assert str(tmp_path) not in response.body.decode()
    assert str(file) in caplog.text, "the log says what is wrong"


def test_no_version_yet_is_no_fault_of_the_callers(tmp_path, rows):
    service = TeacherService({"root": str(tmp_path), "model": MODEL, "poll_s": 60})
    response = call(service, stream(rows), None)
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    assert str(tmp_path) not in response.body.decode()
    service._follower.close()


def test_a_fault_of_the_services_keeps_its_words(service, rows, monkeypatch, caplog):
    def broken(*args):
        raise ValueError("/srv/secret: bad")

    monkeypatch.setattr("rayfm.serving.teacher.score_chunk", broken)
    response = call(service, stream(rows), "v1")
    assert response.status_code == 500
    assert "/srv/secret" not in response.body.decode()
    assert "/srv/secret: bad" in caplog.text


def test_a_bad_request_does_not_harm_the_next(service, rows):
    assert call(service, b"x", "v1").status_code == 400
    assert call(service, stream(rows), "v1").status_code == 200


def test_requests_side_by_side_get_their_own_answers(service, models, rows):
    async def both():
        tables = [rows.slice(start, 30) for start in range(0, 150, 30)]
        return await asyncio.gather(*(service.score(table, f"v{1 + i % 2}") for i, table in enumerate(tables)))

    for i, (version, found) in enumerate(asyncio.run(both())):
        assert version == f"v{1 + i % 2}"
        values = predictions(models[version], rows.slice(30 * i, 30))["click"]
        np.testing.assert_allclose(found["click"].to_numpy(), values, rtol=1e-5, atol=1e-6)


def test_the_service_config_is_strict(root):
    with pytest.raises(ValueError, match="modle"):
        TeacherService({"root": str(root), "modle": MODEL})


def test_a_table_that_lacks_a_column_names_it(root, models, rows):
    with pytest.raises(DataError, match="lack column 'age'"):
        score_table(load_version(SnapshotStore(root), MODEL, "v1"), rows.drop_columns(["age"]))


def test_a_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(CapacityError, match=rf"port {port} on 127\.0\.0\.1 cannot be used .* serving\.http_port="):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)


def test_a_port_that_the_user_may_not_have():
    with pytest.raises(CapacityError, match="203"):
        check_port("203.0.113.1", 8000)  # an address of no machine


def test_applications_are_named_by_run_and_teacher():
    assert application_name("demo", "fm") == "rayfm-demo-fm"


def test_rows_from_outside_are_conformed_first(service, rows):
    service.reconfigure({"version": "v1"})
    bare = rows.drop_columns(["example_id", "click", "watch"])
    scored = asyncio.run(service.score_request(bare))
    assert scored.version == "v1"
    assert scored.predictions.equals(score(service, rows, "v1")[1])
    for column, said in ((pa.array([-1] * len(rows)), "negative id"), (pa.array(["x"] * len(rows)), "is string")):
        with pytest.raises(DataError, match=said):
            asyncio.run(service.score_request(rows.set_column(rows.column_names.index("user"), "user", column)))
    with pytest.raises(DataError, match="unknown column 'usr'; did you mean 'user'"):
        asyncio.run(service.score_request(rows.append_column("usr", rows["user"])))


def test_a_service_may_follow_the_newest_version(tmp_path, rows):
    publish_model(tmp_path, MODEL, "v1", 1)
    service = TeacherService({"root": str(tmp_path), "model": MODEL, "poll_s": 0.02})
    assert score(service, rows)[0] == "v1"
    publish_model(tmp_path, MODEL, "v2", 2)
    end = time.monotonic() + 20
    while score(service, rows)[0] != "v2":
        assert time.monotonic() < end
    assert score(service, rows, "v1")[0] == "v1", "an older version can still be named"
    service._follower.close()
