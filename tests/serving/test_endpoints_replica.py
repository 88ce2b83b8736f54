"""One process of the endpoints as Ray Serve makes it, without Ray: students, retrieval, rollback."""

from __future__ import annotations

import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from served_models import as_examples, candidate_rows, predictions, publish_model, user_row
from starlette.testclient import TestClient

from rayfm.client import Client
from rayfm.config import ConfigError
from rayfm.export.config import CompileConfig
from rayfm.models import MODELS
from rayfm.serving.endpoints import EndpointsPlan, EndpointsReplica
from rayfm.serving.http.config import EndpointsConfig
from rayfm.serving.http.token import TokenCheck
from rayfm.serving.retrieval_config import RetrievalConfig
from rayfm.snapshots import Collector, SnapshotStore
from rayfm.snapshots.current import Pointer
from rayfm.snapshots.metadata import open_metadata

TOKEN = "a-token-of-some-length"
RANKER, TOWERS = "vm.none.1", "towers.none.1"
TWO_TOWER = MODELS["two_tower"].Config(item_features=("ad", "tags"), hidden=(8,), vector_dim=4, embedding_dim=8)
USER, CANDIDATES = user_row(), candidate_rows(5)
ADS = [f"ad{number}" for number in range(30)]


def until(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def plan(root, **changes) -> EndpointsPlan:
    settings = {
        "metadata": f"sqlite://{root}/metadata.sqlite",
        "poll_s": 0.05,
        "compile": CompileConfig(compile="torchscript"),
        "retrieval": {TOWERS: RetrievalConfig(catalogue=str(root / "items.parquet"))},
        **changes,
    }
    return EndpointsPlan(
        run="r", root=str(root), students=(RANKER, TOWERS), teachers=(), endpoints=EndpointsConfig(**settings)
    )


@pytest.fixture(scope="module")
def replica(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    pq.write_table(pa.table({"ad": ADS, "tags": pa.array([[1, 2]] * 30)}), root / "items.parquet")
    models = {RANKER: publish_model(root, RANKER, "v1", 1), TOWERS: publish_model(root, TOWERS, "v1", 2, TWO_TOWER)}
    replica = EndpointsReplica(plan(root).dump(), TokenCheck(TOKEN))
    headers = {"authorization": f"Bearer {TOKEN}"}
    client = TestClient(replica.__serve_build_asgi_app__(), headers=headers)
    until(lambda: client.get("/readyz").status_code == 200)
    yield root, client, models
    replica._backend.close()


def ask(client, model: str, call: str, **body):
    response = client.post(f"/v1/models/{model}:{call}", json={"user": USER.to_pylist()[0], **body})
    assert response.status_code == 200, response.text
    return response.json()


def test_what_is_served_is_said(replica):
    _, client, _ = replica
    found = client.get("/readyz").json()
    assert found["models"] == {RANKER: "v1", TOWERS: "v1"}
    assert (found["retrieval"], found["teachers"]) == ({TOWERS: "v1"}, {})
    assert "/v1/models/{model}:retrieve" in client.get("/openapi.json").json()["paths"]


def test_exported_students_predict_what_the_models_do(replica):
    _, client, models = replica
    for name in (RANKER, TOWERS):
        found = ask(client, name, "score", candidates=CANDIDATES.to_pydict())["predictions"]
        for task, values in predictions(models[name], as_examples(USER, CANDIDATES)).items():
            np.testing.assert_allclose(found[task], values, rtol=1e-5, atol=1e-6)


def test_the_items_retrieved_score_as_the_same_model_scores_them(replica):
    _, client, _ = replica
    found = ask(client, f"{TOWERS}", "retrieve", exclude=["ad3"])["predictions"]
    assert sorted(found["id"]) == sorted(set(ADS) - {"ad3"})
    assert found["score"] == sorted(found["score"], reverse=True)
    same = {"ad": found["id"], "tags": [[1, 2]] * 29}
    scored = ask(client, TOWERS, "score", candidates=same)["predictions"]["click"]
    np.testing.assert_allclose(found["score"], scored, rtol=1e-4, atol=1e-5)


def test_clients_retrieve_in_both_formats(replica):
    _, client, _ = replica
    expected = ask(client, TOWERS, "retrieve", exclude=[])["predictions"]["id"][:5]
    for arrow in (True, False):
        ours = Client("http://testserver", TOKEN, arrow=arrow)
        ours._http = client
        assert ours.retrieve(TOWERS, USER, k=5).predictions["id"].to_pylist() == expected
        assert ours.retrieve(TOWERS, USER, k=4, exclude=expected[:1]).predictions["id"].to_pylist() == expected[1:]


def test_retrieval_is_behind_the_token_too(replica):
    _, client, _ = replica
    refused = client.post(f"/v1/models/{TOWERS}:retrieve", json={}, headers={"authorization": "Bearer no"})
    assert refused.status_code == 401
    assert client.post(f"/v1/models/{RANKER}:retrieve", json={}).status_code == 404


def test_a_rollback_is_followed_by_models_and_items(replica):
    root, client, models = replica
    store = SnapshotStore(root)
    for name, config in ((RANKER, None), (TOWERS, TWO_TOWER)):
        publish_model(root, name, "v2", 5, *([] if config is None else [config]))

    def everywhere(version: str) -> bool:
        found = client.get("/readyz").json()
        return {*found["models"].values(), *found["retrieval"].values()} == {version}

    until(lambda: everywhere("v2"))
    metadata = open_metadata(f"sqlite://{root}/metadata.sqlite")
    for name in (RANKER, TOWERS):
        Pointer(Collector(store, metadata), name, "test").rollback("a test")
    until(lambda: everywhere("v1"))
    found = ask(client, RANKER, "score", candidates=CANDIDATES.to_pydict())
    assert found["version"] == "v1"
    expected = predictions(models[RANKER], as_examples(USER, CANDIDATES))["click"]
    np.testing.assert_allclose(found["predictions"]["click"], expected, rtol=1e-5, atol=1e-6)


def test_what_is_not_indexed_yet_is_unavailable(tmp_path):
    replica = EndpointsReplica(plan(tmp_path).dump(), TokenCheck(None))
    client = TestClient(replica.__serve_build_asgi_app__())
    for call in ("score", "retrieve"):
        body = {"user": {}, "candidates": {}} if call == "score" else {"user": {}, "exclude": []}
        response = client.post(f"/v1/models/{TOWERS}:{call}", json=body)
        assert (response.status_code, response.headers["retry-after"]) == (503, "5"), response.text
    assert client.get("/readyz").status_code == 503
    replica._backend.close()


def test_retrieval_follows_a_metadata_store(tmp_path):
    with pytest.raises(ConfigError, match=r"endpoints\.retrieval needs endpoints\.metadata"):
        EndpointsReplica(plan(tmp_path, metadata=None).dump(), TokenCheck(None))
