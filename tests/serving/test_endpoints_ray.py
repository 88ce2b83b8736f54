"""The endpoints on Ray Serve: one run of HTTP with JSON and Arrow, gRPC, a swap under load, and refusals."""

from __future__ import annotations

import socket
import threading
import time

import httpx
import numpy as np
import pyarrow as pa
import pytest
from example_store import every_feature_rows
from served_models import as_examples, candidate_rows, predictions, publish_model, user_row

from rayfm.client import Client, GrpcClient, InvalidRequest, NotFound, Unauthorized
from rayfm.export.config import CompileConfig
from rayfm.serving.endpoints import EndpointsPlan, TeacherPlan, endpoints_name, start_endpoints, stop_endpoints
from rayfm.serving.http.config import EndpointsConfig

TOKEN = "a-token-of-some-length"
STUDENTS, TEACHER = ("vm.none.1", "vm.direct.1"), "fm.teacher.0"
USER, CANDIDATES = user_row(), candidate_rows(40)
ROWS = every_feature_rows(20, seed=2)
WRONG = ROWS.set_column(ROWS.column_names.index("user"), "user", pa.array([1, 2, -3, *[4] * 17]))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.fixture
def served(fresh_ray, tmp_path):
    models = {name: publish_model(tmp_path, name, "v1", seed) for seed, name in enumerate((*STUDENTS, TEACHER))}
    plan = EndpointsPlan(
        run="served",
        root=str(tmp_path),
        students=STUDENTS,
        teachers=(
            TeacherPlan(name="fm", model=TEACHER),
            TeacherPlan(name="gang", model=TEACHER, cpus=0.1, members=2, member_cpus=0.1, row_wise_from=60),
        ),
        endpoints=EndpointsConfig(
            http_port=free_port(),
            grpc_port=free_port(),
            cpus=0.25,
            poll_s=0.2,
            metadata=f"sqlite://{tmp_path}/metadata.sqlite",
            compile=CompileConfig(compile="torchscript"),
        ),
    )
    start_endpoints(plan, TOKEN)
    yield tmp_path, plan.endpoints, models
    stop_endpoints(plan)


@pytest.mark.ray
def test_endpoints_on_ray_serve(served):
    root, config, models = served
    url = f"http://127.0.0.1:{config.http_port}"
    expected = {name: predictions(models[name], as_examples(USER, CANDIDATES))["click"] for name in STUDENTS}
    taught = predictions(models[TEACHER], ROWS)["click"]

    with Client(url, TOKEN) as arrow, Client(url, TOKEN, arrow=False) as json:
        until(lambda: arrow.ready()["ready"])
        teachers = dict.fromkeys(("fm", "gang"), "v1")
        assert arrow.ready() == {"ready": True, "models": dict.fromkeys(STUDENTS, "v1"), "teachers": teachers}
        grpc = GrpcClient(f"127.0.0.1:{config.grpc_port}", TOKEN, application=endpoints_name("served"))
        for client in (arrow, json, grpc):
            for name in STUDENTS:
                scored = client.score(name, USER, CANDIDATES)
                assert scored.version == "v1"
                np.testing.assert_allclose(scored.predictions["click"].to_numpy(), expected[name], rtol=1e-5, atol=1e-6)
            for name in teachers:
                scored = client.score_teacher(name, ROWS.drop_columns(["click", "watch"]))
                assert scored.version == "v1"
                np.testing.assert_allclose(scored.predictions["click"].to_numpy(), taught, rtol=1e-5, atol=1e-6)
        for name in teachers:
            scored = arrow.score_teacher(name, ROWS, "v1", representation=True)
            assert "representation" in scored.predictions.column_names

        for client in (arrow, grpc):
            with pytest.raises(InvalidRequest, match="lacks column 'tags'"):
                client.score(STUDENTS[0], USER, CANDIDATES.drop_columns(["tags"]))
            for name in teachers:
                with pytest.raises(InvalidRequest, match="row 2: column 'user' holds a negative id"):
                    client.score_teacher(name, WRONG)
            with pytest.raises(NotFound, match="no student"):
                client.score("vm.other.1", USER, CANDIDATES)
            for name in teachers:
                with pytest.raises(NotFound, match="has no version 'v9'"):
                    client.score_teacher(name, ROWS, version="v9")
        with Client(url) as nobody, pytest.raises(Unauthorized):
            nobody.score(STUDENTS[0], USER, CANDIDATES)
        stranger = GrpcClient(f"127.0.0.1:{config.grpc_port}", "wrong", application=endpoints_name("served"))
        with stranger, pytest.raises(Unauthorized):
            stranger.score(STUDENTS[0], USER, CANDIDATES)
        assert httpx.get(f"{url}/openapi.json").status_code == 401
        pages = httpx.get(f"{url}/openapi.json", headers={"authorization": f"Bearer {TOKEN}"}).json()["paths"]
        assert "/v1/models/{model}:score" in pages

        _swap_under_load(root, arrow, expected[STUDENTS[0]], taught)
        grpc.close()


def _swap_under_load(root, client, first, taught) -> None:
    """New versions of a student and of the teacher while all answer: no failed request, and replies of one version."""
    stop, errors, students, teachers, gang = threading.Event(), [], [], [], []

    def ask() -> None:
        while not stop.is_set():
            try:
                students.append(client.score(STUDENTS[0], USER, CANDIDATES))
                teachers.append(client.score_teacher("fm", ROWS).version)
                gang.append(client.score_teacher("gang", ROWS))
            except Exception as error:
                errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: len(teachers) > 2)
    after = publish_model(root, STUDENTS[0], "v2", 7)
    taught = {"v1": taught, "v2": predictions(publish_model(root, TEACHER, "v2", 8), ROWS)["click"]}
    until(lambda: errors or ("v2" in teachers and students[-1].version == gang[-1].version == "v2"))
    stop.set()
    thread.join()
    assert not errors
    assert set(teachers) == {scored.version for scored in gang} == {"v1", "v2"}
    for scored in gang:
        found = scored.predictions["click"].to_numpy()
        np.testing.assert_allclose(found, taught[scored.version], rtol=1e-5, atol=1e-6)
    expected = {"v1": first, "v2": predictions(after, as_examples(USER, CANDIDATES))["click"]}
    assert np.abs(expected["v1"] - expected["v2"]).max() > 0.01
    for scored in students:
        found = scored.predictions["click"].to_numpy()
        np.testing.assert_allclose(found, expected[scored.version], rtol=1e-5, atol=1e-6)
