from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from small_pipeline import small_pipeline

from rayfm.config import CapacityError, ConfigError
from rayfm.pipeline import endpoints
from rayfm.pipeline.endpoints import plan_endpoints, serve, student_keys
from rayfm.snapshots.metadata import open_metadata
from rayfm.snapshots.publish import publish


def run_of(folder, *published, **changes):
    config = small_pipeline(folder, **changes)
    config.run_dir.mkdir(parents=True)
    for name in published:
        publish(config.run_dir, name, "v1", {"weight": torch.zeros(1)})
    return config


def test_a_run_serves_all_its_models(tmp_path):
    names = ("vm.none.1", "vm.none.2", "vm.direct.1", "vm.direct.2")
    config = run_of(tmp_path, *names, "fm.teacher.0", seeds=[1, 2], serving={"cpus": 0.5, "threads": 3})
    plan = plan_endpoints(config)
    assert plan.students == names
    assert [(t.name, t.model, t.cpus, t.threads) for t in plan.teachers] == [("fm", "fm.teacher.0", 0.5, 3)]
    assert plan.root == str(tmp_path / "runs" / "small")
    assert student_keys(config) == list(plan.students)
    assert plan.endpoints.metadata == f"sqlite://{tmp_path}/runs/small/metadata.sqlite"
    open_metadata(plan.endpoints.metadata)


def test_a_teacher_of_several_members_is_served_by_gangs(tmp_path):
    gang = {"members": 3, "member_cpus": 0.5, "member_gpus": 1, "row_wise_from": 7}
    plan = plan_endpoints(run_of(tmp_path, "fm.teacher.0", serving={"replicas": 2, "cpus": 0.1, **gang}))
    (teacher,) = plan.teachers
    assert {name: getattr(teacher, name) for name in gang} == gang
    assert plan.needs()[1] == ("teacher fm (2 x (0.1 + 3 x 0.5))", pytest.approx(3.2), 6.0)


def test_all_that_serves_runs_on_the_serving_nodes_unless_it_names_others(tmp_path):
    serving, inference = {"role": "serving"}, {"role": "inference"}
    near_line = {"consumer": {"nodes": inference}}
    config = run_of(tmp_path, "vm.none.1", "fm.teacher.0", ray={"nodes": {"serving": serving}})
    plan = plan_endpoints(config)
    assert (plan.endpoints.nodes, plan.teachers[0].nodes) == (serving, serving)
    changed = small_pipeline(
        tmp_path,
        ray={"nodes": {"serving": serving}},
        serving={"nodes": inference},
        endpoints={"near_line": near_line},
    )
    plan = plan_endpoints(changed)
    assert (plan.endpoints.nodes, plan.teachers[0].nodes) == (serving, inference)
    assert plan.near_line()["fm"].consumer.nodes == inference


def test_or_those_that_are_named(tmp_path):
    store = "zookeeper://zk:2181"
    config = run_of(tmp_path, endpoints={"students": ["vm.direct.1"], "teachers": [], "metadata": store})
    plan = plan_endpoints(config)
    assert (plan.students, plan.teachers, plan.endpoints.metadata) == (("vm.direct.1",), (), store)


def test_what_is_not_published_is_served_where_it_is_named(tmp_path):
    plan = plan_endpoints(run_of(tmp_path, "vm.none.1"))
    assert (plan.students, plan.teachers) == (("vm.none.1",), ())
    named = small_pipeline(tmp_path, endpoints={"students": ["vm.direct.1"], "teachers": ["fm"]})
    plan = plan_endpoints(named)
    assert (plan.students, [teacher.name for teacher in plan.teachers]) == (("vm.direct.1",), ["fm"])


def test_a_run_that_published_nothing_has_nothing_to_serve(tmp_path):
    with pytest.raises(ConfigError, match="nothing is published yet; wait, or name in"):
        plan_endpoints(run_of(tmp_path))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"students": ["vm.dircet.1"]},
            r"endpoints\.students: 'vm\.dircet\.1' is not of this run; did you mean 'vm\.dir",
        ),
        ({"retrieval": {"vm.none.2": {}}}, r"endpoints\.retrieval: 'vm\.none\.2' is not of this run; did you mean"),
        ({"teachers": ["fn"]}, r"endpoints\.teachers: 'fn' is not of this run; known: fm"),
    ],
)
def test_a_model_that_the_run_does_not_have_is_named(tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        plan_endpoints(run_of(tmp_path, endpoints=changes))


def test_what_cannot_be_served_is_said_before_ray_starts(tmp_path, monkeypatch):
    monkeypatch.delenv("RAYFM_TOKEN", raising=False)

    def never(*arguments):
        raise AssertionError

    monkeypatch.setattr(endpoints, "ray_session", never)
    with pytest.raises(ConfigError, match=r"there is no such run; `rayfm run` makes it"):
        serve(small_pipeline(tmp_path), never)
    for changes, production, said in (
        ({"host": "0.0.0.0"}, False, "needs a token"),
        ({"grpc_port": 9000}, False, "needs a token"),
        ({}, True, "needs a token"),
    ):
        with pytest.raises(ConfigError, match=said):
            serve(small_pipeline(tmp_path, endpoints=changes), never, production)


class Answers(BaseHTTPRequestHandler):
    """``/readyz`` as it is told."""

    said: list[tuple[int, dict]] = []

    def do_GET(self):
        status, body = self.said.pop(0) if len(self.said) > 1 else self.said[0]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *arguments):
        pass


@pytest.fixture
def service():
    server = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_the_first_answer_is_waited_for(service, monkeypatch):
    monkeypatch.setattr(endpoints, "SETTLED_S", 0.6)
    not_yet, ready = {"ready": False, "models": {"a": None}}, {"ready": True, "models": {"a": "v1"}}
    Answers.said = [(500, {}), (503, not_yet), (200, ready)]
    assert endpoints._wait_ready(service, "token", 20) == ready
    Answers.said = [(503, not_yet)]
    assert endpoints._wait_ready(service, None, 20) == not_yet, "a model without a version does not hold all up"
    Answers.said = [(401, {"detail": "no"})]
    with pytest.raises(CapacityError, match="does not answer after 1 s"):
        endpoints._wait_ready(service, None, 1)
