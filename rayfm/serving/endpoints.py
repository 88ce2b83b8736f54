"""The endpoints on Ray Serve: one application that scores students itself and asks the teachers' services."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import pyarrow as pa
import torch

from rayfm.client.wire import Scored
from rayfm.config import CapacityError, Config, ConfigError
from rayfm.data.cluster import cluster_resources
from rayfm.operations.logs import configure
from rayfm.serving.application import application_name, gang_config, start_teacher, teacher_handle
from rayfm.serving.backend import ScoringBackend, Teacher
from rayfm.serving.follow import item_follower, student_follower
from rayfm.serving.gang.errors import GangBroken
from rayfm.serving.http.app import create_app
from rayfm.serving.http.config import EndpointsConfig
from rayfm.serving.http.problems import Problem, unavailable
from rayfm.serving.http.token import TokenCheck, check_bind
from rayfm.serving.item_service import Retrievers
from rayfm.serving.nearline.application import consumer_name, make_intake, start_consumers
from rayfm.serving.nearline.config import NearLineConfig
from rayfm.serving.nearline.doorbell import check_installed
from rayfm.serving.nearline.router import build_router
from rayfm.serving.proxies import QUIET, Door, all_or_nothing, check_free, open_door
from rayfm.serving.replicas import Replicas, selector
from rayfm.serving.retrieval import retrieve_router
from rayfm.serving.student import Students
from rayfm.serving.teacher import TeacherServiceConfig

GRPC_SERVICER = "rayfm.client.proto.scoring_pb2_grpc.add_ScoringServicer_to_server"
TURN_S = 2e-4
"""Seconds that one thread of a replica keeps the interpreter while others wait. With Python's 5 ms, longer than most
requests take, the thread that scores waits between two of torch's calls until another has decoded its request."""


class TeacherPlan(Replicas):
    """A teacher to serve."""

    name: str
    model: str
    """Its key in the snapshot store."""
    threads: int = 1


class EndpointsPlan(Config):
    """What a run's endpoints serve."""

    run: str
    root: str
    """Folder that holds ``snapshots/``."""
    students: tuple[str, ...]
    """Keys in the snapshot store."""
    teachers: tuple[TeacherPlan, ...]
    store: str | None = None
    """Folder of the example store, whose items are retrieved where no catalogue is named."""
    endpoints: EndpointsConfig = EndpointsConfig()
    largest: tuple[float, float] = (0.0, 0.0)
    """CPUs and GPUs that the cluster can grow to."""

    def near_line(self) -> dict[str, NearLineConfig]:
        """Teacher -> how rows that are posted are labelled; empty where none are taken."""
        options = self.endpoints.near_line
        if options is None:
            return {}
        places = {"run": _teachers_of(self.run), "root": self.root, "metadata": self.endpoints.metadata}
        return {
            teacher.name: NearLineConfig(**dict(options), **places, teacher=teacher.name, model=teacher.model)
            for teacher in self.teachers
        }

    def service(self, teacher: TeacherPlan) -> TeacherServiceConfig:
        """What a teacher's replicas need."""
        return TeacherServiceConfig(
            root=self.root,
            model=teacher.model,
            threads=teacher.threads,
            poll_s=self.endpoints.poll_s,
            metadata=self.endpoints.metadata,
        )

    def needs(self) -> list[tuple[str, float, float]]:
        """(what, CPUs, GPUs) of all that serves."""
        config = self.endpoints
        found = [(f"endpoints ({config.replicas} x {config.cpus:g})", config.replicas * config.cpus, 0.0)]
        for teacher in self.teachers:
            what = f"teacher {teacher.name} ({teacher.terms()})"
            found.append((what, teacher.replicas * teacher.whole_cpus, teacher.replicas * teacher.whole_gpus))
        for name, near_line in self.near_line().items():
            consumer = near_line.consumer
            what = f"consumers of {name} ({consumer.replicas} x {consumer.cpus:g})"
            found.append((what, consumer.replicas * consumer.cpus, 0.0))
        return found


def endpoints_name(run: str) -> str:
    """Name of the Serve application of a run's endpoints, which gRPC callers give as metadata ``application``."""
    return f"rayfm-{run}"


def _teachers_of(run: str) -> str:
    """What names the teachers' applications: apart from those of a run that labels on the same cluster, which comes and
    goes with its own.
    """
    return f"{run}-serve"


class ServedTeacher(Teacher):
    """A teacher's service on Ray Serve.

    Args:
        run: whose endpoints ask it.
        teacher: its name.
    """

    def __init__(self, run: str, teacher: str) -> None:
        self.run, self.teacher = run, teacher
        self._handle: Any = None

    async def score(self, rows: pa.Table, version: str | None, representation: bool) -> Scored:
        scored: Scored = await self._call("score_request", rows, version, representation)
        return scored

    async def version(self) -> str | None:
        version: str | None = await self._call("current_version")
        return version

    async def _call(self, method: str, *args: Any) -> Any:
        from ray.exceptions import RayActorError, RayTaskError
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

        try:
            if self._handle is None:
                self._handle = teacher_handle(_teachers_of(self.run), self.teacher)
            response = getattr(self._handle, method).remote(*args)
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()
                raise
        except BackPressureError:
            raise Problem(429, f"teacher {self.teacher!r} is busy; try again", {"Retry-After": "1"}) from None
        except RayTaskError as error:
            cause = getattr(error, "cause", error)
            if isinstance(cause, GangBroken):
                raise unavailable(f"teacher {self.teacher!r} lost a process; try again") from None
            raise cause from None
        except (RayActorError, DeploymentUnavailableError, RayServeException):
            raise unavailable(f"teacher {self.teacher!r} does not answer; try again") from None


class EndpointsReplica:
    """One process of the endpoints' application: HTTP and gRPC.

    Args:
        plan: an `EndpointsPlan` as plain values.
        token: checks bearer tokens.
    """

    def __init__(self, plan: dict[str, Any], token: TokenCheck) -> None:
        configure()  # this process's log lines
        self.plan = EndpointsPlan.model_validate(plan)
        config = self.plan.endpoints
        torch.set_num_threads(config.threads)
        sys.setswitchinterval(TURN_S)
        self._token = token
        students = Students(self.plan.root, self.plan.students, config, student_follower(self.plan.root, config))
        follow_items = item_follower(self.plan.root, self.plan.store, config)
        self._items = Retrievers(tuple(config.retrieval), follow_items)
        self._retrieve = retrieve_router(self._items.by_model(), config.limits, students.queue)
        self._backend = ScoringBackend(
            students,
            {teacher.name: ServedTeacher(self.plan.run, teacher.name) for teacher in self.plan.teachers},
            config.limits,
            self._items,
        )
        self._grpc: Any = None
        if config.grpc_port is not None:
            from rayfm.serving.grpc.service import ScoringService

            self._grpc = ScoringService(self._backend, config.limits, token)

    def __serve_build_asgi_app__(self) -> Any:
        """Ray Serve asks for the app once the replica is made."""
        routers = [self._retrieve] if self._items.models else []
        near_line = self.plan.near_line()
        if near_line:
            routers.append(build_router({name: make_intake(config) for name, config in near_line.items()}))
        return create_app(self._backend, self.plan.endpoints.limits, self._token, routers)

    async def ScoreStudent(self, request: Any, grpc_context: Any) -> Any:
        """gRPC: a student's predictions."""
        return await self._grpc.score_student(request, grpc_context)

    async def ScoreTeacher(self, request: Any, grpc_context: Any) -> Any:
        """gRPC: a teacher's predictions."""
        return await self._grpc.score_teacher(request, grpc_context)


def start_endpoints(plan: EndpointsPlan, token: str | None, production: bool = False) -> None:
    """Start the teachers' services and the endpoints on the Ray that runs; returns when their replicas do. Where it
    fails, what it had deployed is removed again.

    Args:
        plan: what to serve.
        token: the bearer token; None only on loopback, without gRPC.
        production: a proxy on every node; Ray was started after `rayfm.serving.production.enable_production`.

    Raises:
        ConfigError: others could reach the endpoints without a token; gRPC's code, or the packages that near-line
            labels need, cannot be loaded; a teacher cannot be a gang as it is configured.
        CapacityError: a port is in use, Ray Serve runs already and listens elsewhere, the run is served there already,
            or Ray has too few CPUs or GPUs.
    """
    config = plan.endpoints
    check_plan(plan, token, production)
    from ray import serve

    check_room(plan, *cluster_resources(plan.largest))

    door = Door(
        config.host,
        config.http_port,
        "EveryNode" if production else "HeadOnly",
        config.grpc_port,
        () if config.grpc_port is None else (GRPC_SERVICER,),
    )
    open_door(door, "--set endpoints.http_port=PORT")
    check_free(endpoints_name(plan.run), f"run {plan.run!r}")
    bound = bind_endpoints(plan, token)
    with all_or_nothing(_applications(plan)):
        serve.run(bound, name=endpoints_name(plan.run), route_prefix="/")
        # After what has a route: HAProxy does not report that it serves as long as nothing has one.
        for teacher in plan.teachers:
            start_teacher(_teachers_of(plan.run), teacher.name, plan.service(teacher), teacher)
        for near_line in plan.near_line().values():
            start_consumers(near_line)


def bind_endpoints(plan: EndpointsPlan, token: str | None) -> Any:
    """The Serve application of the endpoints, without what it asks: the teachers' services, near-line consumers.

    Args:
        plan: what to serve; checked already (`check_plan`).
        token: the bearer token.
    """
    from ray import serve

    config = plan.endpoints
    deployment: Any = serve.deployment(
        serve.ingress()(EndpointsReplica),
        name="Endpoints",
        # The replica's own queues refuse with Retry-After; Serve's is for what they do not see: health, pages.
        max_ongoing_requests=2 * config.limits.max_queue + 32,
        ray_actor_options={"num_cpus": config.cpus, **selector(config.nodes)},
        logging_config=QUIET,
        **config.options(),
    )
    return deployment.bind(plan.dump(), TokenCheck(token))


def check_plan(plan: EndpointsPlan, token: str | None, production: bool = False) -> None:
    """Refuse what cannot be served as it is planned, before anything is deployed.

    Raises:
        ConfigError: others could reach the endpoints without a token; gRPC's code, or the packages that near-line
            labels need, cannot be loaded; a teacher cannot be a gang as it is configured.
    """
    check_bind(plan.endpoints, token, production)
    for teacher in plan.teachers:
        if teacher.members > 1:
            gang_config(plan.service(teacher), teacher.gang())
    if plan.near_line():
        check_installed()
    if plan.endpoints.grpc_port is not None:
        _check_grpc()


def check_room(plan: EndpointsPlan, cpus: float, gpus: float = 0.0) -> None:
    """Refuse what Ray would wait for without end: replicas, and gangs whole, that never find a place.

    Raises:
        CapacityError: with the arithmetic.
    """
    for unit, have, place in (("CPUs", cpus, 1), ("GPUs", gpus, 2)):
        needs = [(str(need[0]), float(need[place])) for need in plan.needs()]
        total = sum(amount for _, amount in needs)
        if total > have + 1e-9:
            terms = " + ".join(f"{amount:g} {what}" for what, amount in needs if amount)
            raise CapacityError(
                f"the endpoints need {total:g} {unit} and Ray has {have:g}: {terms}; lower replicas, members or their "
                "shares, name fewer teachers (endpoints.teachers), or give Ray more (--set ray.cpus=N, ray.address)"
            )


def stop_endpoints(plan: EndpointsPlan) -> None:
    """Remove the applications that `start_endpoints` started; Ray Serve itself stays."""
    from ray import serve

    for name in _applications(plan):
        serve.delete(name)


def _applications(plan: EndpointsPlan) -> list[str]:
    """Names of a plan's applications, those that take requests first: nobody is to be answered by what has gone."""
    consumers = [consumer_name(config) for config in plan.near_line().values()]
    teachers = [application_name(_teachers_of(plan.run), teacher.name) for teacher in plan.teachers]
    return [endpoints_name(plan.run), *consumers, *teachers]


def _check_grpc() -> None:
    try:
        import rayfm.client.proto.scoring_pb2_grpc  # noqa: F401
    except Exception as error:
        raise ConfigError(f"endpoints.grpc_port: {error}; pip install 'rayfm[client]'") from None
