"""Nothing gets a route on a Ray Serve that listens elsewhere than was asked for, least of all on every interface."""

from __future__ import annotations

import contextlib
import dataclasses
from types import SimpleNamespace

import pytest
import servers
from nearline_cases import MODEL, TEACHER, V1, publish_teacher
from nearline_cases import config as near_line

from rayfm.cli import serving_nearline
from rayfm.config import CapacityError
from rayfm.serving import proxies
from rayfm.serving.application import application_name, start_teacher
from rayfm.serving.endpoints import GRPC_SERVICER, EndpointsPlan, TeacherPlan, endpoints_name, start_endpoints
from rayfm.serving.http.config import EndpointsConfig
from rayfm.serving.nearline.application import consumer_name, intake_name, start_intake
from rayfm.serving.proxies import Door, all_or_nothing, differences
from rayfm.serving.teacher import TeacherServiceConfig

LOCAL = Door("127.0.0.1", 8000)
PUBLIC = Door("0.0.0.0", 8000, "EveryNode")
CLOSED = Door("127.0.0.1", 8000, "Disabled")
GRPC = dataclasses.replace(LOCAL, grpc_port=9000, servicers=(GRPC_SERVICER,))


@pytest.mark.parametrize(
    ("asked", "runs", "why"),
    [
        (LOCAL, PUBLIC, "its host is 0.0.0.0, not 127.0.0.1"),
        (LOCAL, Door("127.0.0.1", 8001), "its port is 8001, not 8000"),
        (LOCAL, CLOSED, "it takes no HTTP requests at all"),
        (dataclasses.replace(LOCAL, location="EveryNode"), LOCAL, "its proxy is on the head node alone"),
        (GRPC, LOCAL, "it has no gRPC, not 9000"),
        (GRPC, dataclasses.replace(GRPC, grpc_port=9001), "its gRPC port is 9001, not 9000"),
        (GRPC, dataclasses.replace(GRPC, servicers=("other.add",)), "its gRPC does not know rayfm's service"),
        (GRPC, dataclasses.replace(GRPC, reflection=True), "its gRPC reflection tells anybody what can be called"),
    ],
)
def test_what_runs_cannot_stand_for_what_was_asked(asked, runs, why):
    assert differences(asked, runs) == [why]


@pytest.mark.parametrize("runs", [LOCAL, dataclasses.replace(LOCAL, location="EveryNode"), GRPC])
def test_what_runs_does(runs):
    assert differences(LOCAL, runs) == []


class Serve:
    """Ray Serve as it runs on a cluster, in the place of the real one: started once, what is asked later is ignored."""

    def __init__(self, door: Door | None, *names: str, fails: str = "") -> None:
        self.door, self.names, self.tried, self.deployed, self.fails = door, set(names), [], [], fails

    def start(self, proxy_location, http_options=None, grpc_options=None, logging_config=None):
        self.door = self.door or Door(**(http_options or {"host": "127.0.0.1", "port": 8000}), location=proxy_location)

    def run(self, application, name, route_prefix):
        self.deployed.append((name, route_prefix))
        self.names.add(name)  # also one that failed
        if name == self.fails:
            raise RuntimeError(f"deploying {name} failed")

    def delete(self, name):
        self.names.remove(name)

    def status(self):
        return SimpleNamespace(applications={name: SimpleNamespace(status="RUNNING") for name in self.names})

    def install(self, patch) -> Serve:
        patch.setattr(proxies, "running_door", lambda: self.door)
        patch.setattr(proxies, "check_port", lambda host, port, option="": self.tried.append((host, port)))
        for name in ("start", "run", "status", "delete"):
            patch.setattr(f"ray.serve.{name}", getattr(self, name))
        patch.setattr("rayfm.serving.endpoints.cluster_resources", lambda largest: (8.0, 0.0))
        return self


def teacher(tmp_path) -> None:
    start_teacher("r", "fm", TeacherServiceConfig(root=str(tmp_path), model="fm.teacher.0"), http_port=8000)


def endpoints(tmp_path) -> None:
    start_endpoints(EndpointsPlan(run="r", root=str(tmp_path), students=(), teachers=()), None)


def intake(tmp_path) -> None:
    start_intake([near_line(tmp_path, run="r", redis="redis://127.0.0.1:1/0")], 8000)


STARTS = {teacher: "/rayfm-r-fm", endpoints: "/", intake: "/"}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("door", [PUBLIC, CLOSED, Door("127.0.0.1", 8001)], ids=str)
def test_nothing_is_deployed_where_serve_listens_elsewhere(start, door, tmp_path, monkeypatch):
    serve = Serve(door).install(monkeypatch)
    with pytest.raises(CapacityError, match=r"Ray Serve runs already .* on 127\.0\.0\.1:8000 \(HeadOnly\) was asked"):
        start(tmp_path)
    assert serve.deployed == []


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("door", [None, LOCAL], ids=str)
def test_what_listens_as_asked_is_used(start, door, tmp_path, monkeypatch):
    serve = Serve(door).install(monkeypatch)
    start(tmp_path)
    assert [route for _, route in serve.deployed] == [STARTS[start]]
    assert serve.tried == ([("127.0.0.1", 8000)] if door is None else []), "Serve's own port is in use, by itself"


def test_a_teacher_without_a_port_has_no_route_whatever_serve_listens_on(tmp_path, monkeypatch):
    serve = Serve(PUBLIC).install(monkeypatch)
    start_teacher("r", "fm", TeacherServiceConfig(root=str(tmp_path), model="fm.teacher.0"))
    assert serve.deployed == [(application_name("r", "fm"), None)]


def test_grpc_that_others_opened_is_held_to_what_was_asked(tmp_path, monkeypatch):
    serve = Serve(LOCAL).install(monkeypatch)
    plan = EndpointsPlan(
        run="r", root=str(tmp_path), students=(), teachers=(), endpoints=EndpointsConfig(grpc_port=9000)
    )
    with pytest.raises(CapacityError, match="it has no gRPC, not 9000"):
        start_endpoints(plan, "a-token-of-some-length")
    assert serve.deployed == []


@pytest.mark.parametrize(("start", "name"), [(endpoints, endpoints_name("r")), (intake, intake_name("r"))])
def test_what_runs_already_is_not_replaced(start, name, tmp_path, monkeypatch):
    serve = Serve(LOCAL, name).install(monkeypatch)
    with pytest.raises(CapacityError, match=rf"runs already on this cluster, as the Serve application {name};"):
        start(tmp_path)
    assert serve.deployed == []


def served(tmp_path) -> None:
    teachers = tuple(TeacherPlan(name=name, model=MODEL, cpus=0.1) for name in ("one", "two"))
    start_endpoints(EndpointsPlan(run="r", root=str(tmp_path), students=(), teachers=teachers), None)


def labelled(tmp_path) -> None:
    publish_teacher(tmp_path, V1)
    serving_nearline.serve_until_stopped(near_line(tmp_path, run="r"), 8000, "127.0.0.1")


@pytest.fixture
def no_ray(monkeypatch):
    monkeypatch.setattr(serving_nearline, "ray_session", lambda config: contextlib.nullcontext())
    monkeypatch.setattr(serving_nearline.signal, "signal", lambda *handler: None)


@pytest.mark.parametrize(
    ("start", "fails"),
    [
        (served, endpoints_name("r")),
        (served, application_name("r-serve", "two")),
        (labelled, intake_name("r")),
        (labelled, application_name("r", TEACHER)),
        (labelled, f"{application_name('r', TEACHER)}-nearline"),
    ],
)
def test_a_start_that_fails_leaves_nothing_of_its_own(start, fails, tmp_path, monkeypatch, no_ray):
    ran_before = {endpoints_name("other"), application_name("r-serve", "one")}
    serve = Serve(LOCAL, *ran_before, fails=fails).install(monkeypatch)
    with pytest.raises(RuntimeError, match=f"deploying {fails} failed"):
        start(tmp_path)
    assert serve.deployed[-1][0] == fails
    assert serve.names == ran_before


def test_a_start_of_what_runs_already_leaves_it(tmp_path, monkeypatch, no_ray):
    config = near_line(tmp_path, run="r")
    running = {intake_name("r"), application_name("r", TEACHER), consumer_name(config)}
    running |= {endpoints_name("r"), application_name("r-serve", "one"), application_name("r-serve", "two")}
    serve = Serve(LOCAL, *running).install(monkeypatch)
    for start in (served, labelled):
        with pytest.raises(CapacityError, match="runs already on this cluster, as the Serve application"):
            start(tmp_path)
    assert (serve.names, serve.deployed) == (running, [])


def test_what_cannot_be_removed_hides_no_reason(monkeypatch, caplog):
    serve = Serve(LOCAL).install(monkeypatch)

    def delete(name):
        if name == "a":
            raise TimeoutError("60 s")
        serve.delete(name)

    monkeypatch.setattr("ray.serve.delete", delete)

    def start():
        with all_or_nothing(["a", "b"]):
            serve.names |= {"a", "b"}
            raise ValueError("the reason")

    with pytest.raises(ValueError, match="the reason"):
        start()
    assert serve.names == {"a"}
    assert "a could not be removed again: 60 s" in caplog.text


@pytest.mark.ray
def test_the_real_serve_says_where_it_listens_and_what_runs(ray_session, tmp_path):
    from ray import serve

    serve.start(proxy_location="Disabled")
    port = servers.free_port()
    config = TeacherServiceConfig(root=str(tmp_path), model="fm.teacher.0")
    with pytest.raises(CapacityError, match=r"listens nowhere; .* it takes no HTTP requests at all"):
        start_teacher("door", "fm", config, http_port=port)
    assert application_name("door", "fm") not in serve.status().applications

    @serve.deployment(ray_actor_options={"num_cpus": 0.1}, logging_config=proxies.QUIET)
    class Service:
        pass

    def start() -> None:
        with all_or_nothing(["door-before", "door-after"]):
            serve.run(Service.bind(), name="door-after", route_prefix=None)
            assert proxies.applications() >= {"door-before", "door-after"}
            raise ValueError("the reason")

    serve.run(Service.bind(), name="door-before", route_prefix=None)
    try:
        with pytest.raises(ValueError, match="the reason"):
            start()
        assert "door-after" not in serve.status().applications
        with pytest.raises(CapacityError, match="runs already on this cluster, as the Serve application door-before"):
            proxies.check_free("door-before", "it")
    finally:
        serve.delete("door-before")
