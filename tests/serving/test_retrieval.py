"""Two-tower retrieval: brute force agrees, approximations are measured, and no swap mixes two versions."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from example_store import DAY_US, every_feature_rows, every_feature_schema, write_store
from fastapi import FastAPI
from fastapi.testclient import TestClient

from rayfm.client.wire import ARROW, VERSION_HEADER, write_streams
from rayfm.config import ConfigError, DataError
from rayfm.data.encode import Encoder
from rayfm.export.calibrator import Calibrator
from rayfm.export.config import CompileConfig
from rayfm.export.served import ServedModel
from rayfm.export.student import export_student
from rayfm.models import build_model
from rayfm.models.base import MODELS
from rayfm.schema import Schema
from rayfm.serving.catalogue import latest_items, read_catalogue
from rayfm.serving.exported import load_exported
from rayfm.serving.http.app import create_app
from rayfm.serving.http.config import LimitsConfig
from rayfm.serving.http.queue import Queue
from rayfm.serving.item_index import IndexConfig, build_index
from rayfm.serving.retrieval import (
    ItemIndex,
    RetrievalConfig,
    Retrieved,
    Retriever,
    build_items,
    load_index,
    retrieve_router,
)
from rayfm.serving.teacher import LoadedVersion
from rayfm.snapshots.load import SnapshotStore
from rayfm.snapshots.publish import publish

SCHEMA = Schema.model_validate(
    # Large enough that no two items are one row: equal vectors would come back in any order.
    {**every_feature_schema().dump(), "tables": {**every_feature_schema().dump()["tables"], "ad": {"rows": 50_000}}}
)
ITEM_FEATURES = ("ad", "topics")
COLUMNS = ["ad", "topics", "topics__weights"]
USER = pa.table(
    {"user": [7], "age": [31.0], "tags": [[1, 2]], "history": [["ad1", "ad2"]], "traffic": ["feed"]},
)


def loaded(seed: int = 0, tasks: tuple[str, ...] = ("click", "watch"), exported: bool = False, **changes: object):
    config = MODELS["two_tower"].Config.model_validate(
        {
            "type": "two_tower",
            "embedding_dim": 8,
            "item_features": list(ITEM_FEATURES),
            "hidden": [16],
            "vector_dim": 8,
            "temperature": 0.5,
            **changes,
        }
    )
    model = build_model(config, SCHEMA, tasks, seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator))
    calibrator = Calibrator(SCHEMA, tasks)
    calibrator.set("click", 0.6, -0.3)
    served = ServedModel(model, calibrator)
    encoder = Encoder(SCHEMA, None, labels=False)
    if exported:
        tensors = dict(served.tensors())
        student = export_student(config, SCHEMA, tasks, tensors, CompileConfig(compile="torchscript"))
        return LoadedVersion(f"2024-01-0{seed + 1}-v", "2024-01-01", student, encoder, tasks)
    return LoadedVersion(f"2024-01-0{seed + 1}-v", "2024-01-01", served, encoder, tasks)


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("catalogue") / "items.parquet"
    rows = every_feature_rows(300, seed=5)
    rows = rows.set_column(rows.column_names.index("ad"), "ad", pa.array([f"item{i}" for i in range(300)]))
    pq.write_table(rows.select(COLUMNS), path)
    return path


def config(path: Path, **changes: object) -> RetrievalConfig:
    return RetrievalConfig.model_validate({"catalogue": str(path), **changes})


def brute_force(version: LoadedVersion, catalogue: Path, logits: bool = False) -> dict[str, dict[str, float]]:
    """Task -> item -> what the whole model predicts of the user with each item; or its calibrated logits."""
    items = pq.read_table(catalogue)
    rows = items.num_rows
    shared = {name: pa.concat_arrays([USER[name].combine_chunks()] * rows) for name in USER.column_names}
    types = SCHEMA.arrow_schema()
    table = pa.table({"example_id": np.arange(rows), **shared, **{name: items[name] for name in COLUMNS}})
    table = pa.table({name: table[name].cast(types.field(name).type) for name in table.column_names})
    none = np.zeros((rows, 0), np.float32)
    chunk = version.encoder.encode(table, np.zeros(rows, np.int64), none, none.astype(bool))
    with torch.inference_mode():
        predictions = (version.model.logits if logits else version.model)(version.encoder.batch(chunk, 0, rows))
    ids = items["ad"].to_pylist()
    return {task: dict(zip(ids, values.tolist(), strict=True)) for task, values in predictions.items()}


def best(scores: dict[str, float], k: int) -> list[str]:
    return sorted(scores, key=lambda item: -scores[item])[:k]


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("changes", [{}, {"normalize": True, "temperature": 0.1}])
def test_the_best_items_are_those_of_brute_force(catalogue: Path, exported: bool, changes: dict[str, object]) -> None:
    version = loaded(exported=exported, **changes)
    index = build_items(version, config(catalogue))
    expected = brute_force(version, catalogue)
    for task in ("click", "watch"):
        found = index.retrieve(USER, 20, task=task)
        assert found.ids.to_pylist() == best(expected[task], 20)
        assert found.scores.tolist() == pytest.approx([expected[task][i] for i in found.ids.to_pylist()], abs=1e-5)
        assert found.version == version.version
    assert index.retrieve(USER, 20).ids.equals(index.retrieve(USER, 20, task="click").ids)
    assert index.index.report.kind == "exact"


def test_one_task_alone_is_the_plain_inner_product(catalogue: Path) -> None:
    version = loaded(tasks=("click",))
    assert version.model.model.heads.scale_TE is None
    index = build_items(version, config(catalogue))
    expected = brute_force(version, catalogue)["click"]
    found = index.retrieve(USER, 300)
    assert found.ids.to_pylist() == best(expected, 300)
    assert found.scores.tolist() == pytest.approx([expected[i] for i in found.ids.to_pylist()], abs=1e-5)


def test_several_tasks_are_weighed(catalogue: Path) -> None:
    version = loaded()
    index = build_items(version, config(catalogue, weights={"click": 2.0, "watch": -0.5}))
    expected = brute_force(version, catalogue, logits=True)
    together = {item: 2.0 * z - 0.5 * expected["watch"][item] for item, z in expected["click"].items()}
    found = index.retrieve(USER, 10)
    assert found.ids.to_pylist() == best(together, 10)
    assert found.scores.tolist() == pytest.approx([together[i] for i in found.ids.to_pylist()], abs=1e-5)
    assert found.ids.to_pylist() != index.retrieve(USER, 10, task="click").ids.to_pylist()


def test_items_can_be_left_out(catalogue: Path) -> None:
    index = build_items(loaded(), config(catalogue))
    whole = index.retrieve(USER, 300).ids.to_pylist()
    out = [whole[0], whole[3], whole[3], "no item"]
    assert index.retrieve(USER, 5, pa.array(out)).ids.to_pylist() == [whole[i] for i in (1, 2, 4, 5, 6)]
    assert index.retrieve(USER, 5, pa.array([], pa.string())).ids.to_pylist() == whole[:5]
    assert len(index.retrieve(USER, 300, pa.array(whole)).ids) == 0
    assert index.retrieve(USER, 1000).ids.to_pylist() == whole
    with pytest.raises(DataError, match=r"'exclude' holds .*, and items are named by string"):
        index.retrieve(USER, 5, pa.array([[1]]))


@pytest.mark.parametrize(
    ("user", "k", "task", "message"),
    [
        (USER, 0, None, "k is 0: ask for 1 to 1000"),
        (USER, 1001, None, "ask for 1 to 1000"),
        (USER, 5, "clicks", "task 'clicks' is not one of the model's; did you mean 'click'"),
        (USER.append_column("ad", [["ad1"]]), 5, None, "column 'ad' is the items'"),
        (pa.concat_tables([USER, USER]), 5, None, "has 2 rows; send one user"),
        (USER.drop_columns(["age"]), 5, None, "lacks column 'age'"),
        (USER.append_column("colour", [["red"]]), 5, None, "unknown column 'colour'"),
        (USER.set_column(1, "age", [[float("inf")]]), 5, None, "'age' holds a number that is not finite"),
    ],
)
def test_bad_requests_say_what_is_wrong(catalogue: Path, user: pa.Table, k: int, task: str, message: str) -> None:
    index = build_items(loaded(), config(catalogue))
    with pytest.raises(DataError, match=message):
        index.retrieve(user, k, task=task)


def test_a_user_without_a_finite_vector_is_refused(catalogue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index finds nothing for it, as for an empty catalogue."""
    index = build_items(loaded(), config(catalogue))
    monkeypatch.setattr(index, "_user_vector", lambda user: torch.full((8,), float("nan")))
    with pytest.raises(DataError, match="the user's vector is not finite"):
        index.retrieve(USER, 5)


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ({"top": "mlp", "temperature": 1.0}, {}, "top 'mlp' has no inner product to retrieve by"),
        ({"item_features": ["ad", "user"]}, {}, "retrieval.item: say which feature.*are user, ad"),
        ({}, {"item": "user"}, "retrieval.item: 'user' is no sparse feature of the item tower"),
        ({}, {"weights": {"click": 1.0, "buy": 1.0}}, "retrieval.weights: 'buy' is not a task"),
        ({}, {"catalogue": None}, "retrieval.catalogue: name a Parquet file"),
    ],
)
def test_bad_configs_say_what_to_change(
    catalogue: Path, model: dict[str, object], changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_items(loaded(**model), config(catalogue, **changes))


def test_other_models_have_no_item_vectors(catalogue: Path) -> None:
    fm = MODELS["fm"].Config.model_validate({"type": "fm", "embedding_dim": 8})
    served = ServedModel(build_model(fm, SCHEMA, ("click",), seed=0))
    with pytest.raises(ConfigError, match="a fm has no item vectors"):
        build_items(LoadedVersion("v", None, served, Encoder(SCHEMA, labels=False), ("click",)), config(catalogue))


def test_bad_catalogues_are_named(catalogue: Path, tmp_path: Path) -> None:
    items = pq.read_table(catalogue)

    def refused(table: pa.Table, message: str) -> None:
        pq.write_table(table, tmp_path / "bad.parquet")
        with pytest.raises(DataError, match=message):
            build_items(loaded(), config(tmp_path / "bad.parquet"))

    refused(items.drop_columns(["topics"]), r"bad\.parquet: column 'topics' is missing, and the item tower reads it")
    refused(pa.concat_tables([items, items.slice(4, 1)]), r"bad\.parquet: item 'item4' stands twice")
    refused(items.slice(0, 0), "has no item")
    refused(items.set_column(0, "ad", pa.nulls(300, pa.string())), "column 'ad' is null in 300 rows")
    wrong = items.set_column(2, "topics__weights", pa.array([[9.0]] * 300))
    refused(wrong, r"bad\.parquet: column 'topics__weights'")
    with pytest.raises(DataError, match=r"no\.parquet: cannot be read"):
        build_items(loaded(), config(tmp_path / "no.parquet"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no Parquet file"):
        build_items(loaded(), config(tmp_path / "empty"))


def test_an_item_without_a_finite_vector_is_named(catalogue: Path) -> None:
    version = loaded()
    with torch.no_grad():
        for name, parameter in version.model.named_parameters():
            if "embedding_bags.topic" in name:
                parameter.fill_(float("nan"))
    with pytest.raises(DataError, match=r"item 'item.*' has a vector that is not finite"):
        build_items(version, config(catalogue))


def test_a_folder_of_files_is_one_catalogue(catalogue: Path, tmp_path: Path) -> None:
    items = pq.read_table(catalogue)
    for part in range(3):
        pq.write_table(items.slice(100 * part, 100), tmp_path / f"{part}.parquet")
    assert read_catalogue(tmp_path, "ad", COLUMNS).equals(items.select(COLUMNS))


def test_the_latest_items_are_as_their_newest_example_has_them(tmp_path: Path) -> None:
    periods = ["2024-01-01", "2024-01-02", "2024-01-03"]
    store = write_store(tmp_path, periods, impressions=120, considerations=80)
    for last in (1, 2):
        found = latest_items(store, "ad", COLUMNS, last)
        newest: dict[str, tuple[int, object]] = {}
        for position, kind in itertools.product(range(3 - last, 3), ("impression", "consideration")):
            seed = 2 * position + (kind == "consideration") + 1
            rows = 120 if kind == "impression" else 80
            table = every_feature_rows(rows, seed, kind, position * DAY_US)
            for when, ad, topics in zip(
                table["time"].to_pylist(), table["ad"].to_pylist(), table["topics"].to_pylist(), strict=True
            ):
                if ad not in newest or when > newest[ad][0]:
                    newest[ad] = (when, topics)
        assert dict(zip(found["ad"].to_pylist(), found["topics"].to_pylist(), strict=True)) == {
            ad: topics for ad, (_, topics) in newest.items()
        }
    index = build_items(loaded(), RetrievalConfig(periods=1), store)
    assert sorted(index.ids.to_pylist()) == sorted(latest_items(store, "ad", COLUMNS, 1)["ad"].to_pylist())
    with pytest.raises(DataError, match="no period is prepared"):
        latest_items(type(store)(tmp_path / "none"), "ad", COLUMNS, 1)


def vectors(items: int = 4000, width: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((items, width)).astype(np.float32)


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_an_approximate_index_is_measured(kind: str) -> None:
    items, queries = vectors(), vectors(64, seed=1)
    found = build_index(items, queries, IndexConfig(kind=kind, approximate_from=1000, min_recall=0.6, recall_at=10))
    products = queries @ items.T
    expected = np.argsort(-products, axis=1, kind="stable")[:, :10]
    _, rows = found.search(queries, 10)
    share = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(expected.tolist(), rows.tolist(), strict=True)])
    assert found.report.kind == kind
    assert found.report.recall == pytest.approx(share)
    assert share >= 0.6
    assert not found.report.fell_back


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_an_index_that_finds_too_little_gives_way_to_the_exact_one(kind: str) -> None:
    items, queries = vectors(), vectors(64, seed=1)
    poor = IndexConfig(kind=kind, approximate_from=1000, probes=1, links=2, breadth=1, min_recall=0.9, recall_at=100)
    found = build_index(items, queries, poor)
    assert found.report.fell_back
    assert found.report.kind == "exact"
    assert 0 < found.report.recall < 0.9
    _, rows = found.search(queries, 50)
    assert np.array_equal(rows, np.argsort(-(queries @ items.T), axis=1, kind="stable")[:, :50])


def test_a_small_catalogue_is_searched_exactly() -> None:
    found = build_index(vectors(100), vectors(5, seed=1), IndexConfig(kind="hnsw"))
    assert (found.report.kind, found.report.recall, found.report.fell_back) == ("exact", 1.0, False)


def test_faiss_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match=r"pip install 'rayfm\[retrieval\]'"):
        build_index(vectors(10), vectors(1), IndexConfig())


def test_swaps_never_mix_two_versions(catalogue: Path) -> None:
    """Each reply holds exactly what brute force by the version that it names gives, while versions change under it."""
    indices = [build_items(loaded(seed), config(catalogue)) for seed in (0, 1)]
    expected = {index.version: brute_force(index.loaded, catalogue)["click"] for index in indices}
    holder: list[ItemIndex] = [indices[0]]
    retriever = Retriever(lambda: holder[0])
    done = threading.Event()
    replies: list[list[Retrieved]] = [[] for _ in range(4)]

    def ask(mine: list[Retrieved]) -> None:
        while not done.is_set():
            mine.append(retriever.retrieve(USER, 10))

    threads = [threading.Thread(target=ask, args=(mine,)) for mine in replies]
    for thread in threads:
        thread.start()
    for swap in range(100):
        holder[0] = indices[swap % 2]
        done.wait(0.005)
    done.set()
    for thread in threads:
        thread.join()
    found = [reply for mine in replies for reply in mine]
    assert {reply.version for reply in found} == set(expected)
    for reply in found:
        own = expected[reply.version]
        assert reply.ids.to_pylist() == best(own, 10)
        assert reply.scores.tolist() == pytest.approx([own[item] for item in reply.ids.to_pylist()], abs=1e-5)


def test_an_index_is_built_from_a_published_version(catalogue: Path, tmp_path: Path) -> None:
    version = loaded()
    publish(
        tmp_path,
        "towers.none.1",
        "2024-01-01-aa",
        dict(version.model.tensors()),
        config=version.model.model.config.dump(),
        example_schema=SCHEMA.dump(),
        tasks=version.tasks,
        trained_through="2024-01-01",
    )
    store = SnapshotStore(tmp_path)
    plain = load_index(store, "towers.none.1", "2024-01-01-aa", config(catalogue))

    def load(*where: object) -> LoadedVersion:
        return load_exported(*where, CompileConfig(compile="torchscript"))

    compiled = load_index(store, "towers.none.1", "2024-01-01-aa", config(catalogue), load=load)
    assert compiled.loaded.model.form == "torchscript"
    one, other = plain.retrieve(USER, 50), compiled.retrieve(USER, 50)
    assert one.version == other.version == "2024-01-01-aa"
    assert one.ids.equals(other.ids)
    assert one.scores.tolist() == pytest.approx(other.scores.tolist(), abs=1e-6)


@pytest.fixture
def client(catalogue: Path) -> TestClient:
    class Nothing:
        def status(self):
            return True, {}

    limits = LimitsConfig()
    index = build_items(loaded(), config(catalogue))
    retrievers = {"towers": Retriever(lambda: index)}
    app: FastAPI = create_app(Nothing(), limits, None, [retrieve_router(retrievers, limits, Queue(4))])
    return TestClient(app)


def test_the_endpoint_answers_json_and_arrow(client: TestClient, catalogue: Path) -> None:
    expected = best(brute_force(loaded(), catalogue)["click"], 6)
    user = {name: USER[name][0].as_py() for name in USER.column_names}
    reply = client.post("/v1/models/towers:retrieve?k=4", json={"user": user, "exclude": expected[:1]})
    assert reply.status_code == 200, reply.text
    assert reply.json()["predictions"]["id"] == expected[1:5]
    assert reply.json()["version"] == reply.headers[VERSION_HEADER] == "2024-01-01-v"
    body = write_streams([USER, pa.table({"exclude": pa.array(expected[:2])})])
    reply = client.post("/v1/models/towers:retrieve?k=4&task=click", content=body, headers={"content-type": ARROW})
    table = pa.ipc.open_stream(reply.content).read_all()
    assert table["id"].to_pylist() == expected[2:6]
    assert table["score"].type == pa.float32()


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("towers:retrieve?k=0", {"user": {}, "exclude": []}, 400, "k"),
        ("towers:retrieve?k=5&task=buy", {"user": {}, "exclude": []}, 400, "task 'buy'"),
        ("tower:retrieve", {"user": {}, "exclude": []}, 404, "no retrieval by 'tower'; did you mean 'towers'"),
        ("towers:retrieve", {"user": {}}, 400, "lacks 'exclude'"),
        ("towers:retrieve", {"user": {}, "exclude": 3}, 400, "is no list"),
        ("towers:retrieve", {"user": {}, "exclude": []}, 400, "lacks column"),
        ("towers:retrieve", {"user": [], "exclude": []}, 400, "is no object"),
    ],
)
def test_the_endpoint_refuses(client: TestClient, path: str, body: object, status: int, message: str) -> None:
    reply = client.post(f"/v1/models/{path}", json=body)
    assert reply.status_code == status
    assert message in reply.json()["detail"]


def test_arrow_requests_need_the_exclude_column(client: TestClient) -> None:
    body = write_streams([USER, pa.table({"out": pa.array(["a"])})])
    reply = client.post("/v1/models/towers:retrieve", content=body, headers={"content-type": ARROW})
    assert reply.status_code == 400
    assert "one column, 'exclude'" in reply.json()["detail"]
