"""Nothing gets a route on a Ray Serve that listens elsewhere than was asked for, least of all on every interface."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import servers
from nearline_cases import config as near_line

from rayfm.config import CapacityError
from rayfm.serving import proxies
from rayfm.serving.application import application_name, start_teacher
from rayfm.serving.endpoints import GRPC_SERVICER, EndpointsPlan, endpoints_name, start_endpoints
from rayfm.serving.http.config import EndpointsConfig
from rayfm.serving.nearline.application import intake_name, start_intake
from rayfm.serving.proxies import Door, differences, open_door
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

    def __init__(self, door: Door | None, *names: str) -> None:
        self.door, self.names, self.tried, self.deployed = door, set(names), [], []

    def start(self, proxy_location, http_options=None, grpc_options=None, logging_config=None):
        self.door = self.door or Door(**(http_options or {"host": "127.0.0.1", "port": 8000}), location=proxy_location)

    def run(self, application, name, route_prefix):
        self.deployed.append((name, route_prefix))

    def status(self):
        return SimpleNamespace(applications={name: SimpleNamespace(status="RUNNING") for name in self.names})

    def install(self, patch) -> Serve:
        patch.setattr(proxies, "running_door", lambda: self.door)
        patch.setattr(proxies, "check_port", lambda host, port, option="": self.tried.append((host, port)))
        for name in ("start", "run", "status"):
            patch.setattr(f"ray.serve.{name}", getattr(self, name))
        patch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0})
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


@pytest.mark.ray
def test_the_real_serve_says_where_it_listens(ray_session, tmp_path):
    from ray import serve

    serve.start(proxy_location="Disabled")
    port = servers.free_port()
    config = TeacherServiceConfig(root=str(tmp_path), model="fm.teacher.0")
    with pytest.raises(CapacityError, match=r"listens nowhere; .* it takes no HTTP requests at all"):
        start_teacher("door", "fm", config, http_port=port)
    assert application_name("door", "fm") not in serve.status().applications
    open_door(None)
