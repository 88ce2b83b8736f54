"""`rayfm serve`: the endpoints of a run's teachers and students."""

from __future__ import annotations

import dataclasses
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rayfm.config import CapacityError, ConfigError, nearest
from rayfm.pipeline.config import PipelineConfig
from rayfm.pipeline.plan import teacher_key
from rayfm.pipeline.session import joined_address, ray_session
from rayfm.pipeline.tickets import metadata_path
from rayfm.serving.http.config import EndpointsConfig
from rayfm.serving.http.token import check_bind, read_token
from rayfm.serving.production import enable_production, limit_messages


@dataclasses.dataclass(frozen=True)
class Serving:
    """Endpoints that run.

    Attributes:
        url: of the HTTP side.
        grpc: host and port of the gRPC side; None where it is off.
        application: what gRPC callers give as metadata ``application``.
        ready: what ``/readyz`` said last: versions by model and teacher.
    """

    url: str
    grpc: str | None
    application: str
    ready: dict[str, Any]


def student_keys(config: PipelineConfig) -> list[str]:
    """Keys of all students that a run publishes."""
    return [
        f"{name}.{variant}.{seed}"
        for name, student in config.students.items()
        for variant in student.variants
        for seed in config.seeds
    ]


def _chosen(wanted: tuple[str, ...] | None, known: dict[str, str], published: set[str], key: str) -> tuple[str, ...]:
    """The names that are wanted; where none are named, those of ``known`` (name -> key) that are published."""
    for name in wanted or ():
        if name not in known:
            raise ConfigError(f"{key}: {name!r} is not of this run{nearest(name, list(known))}")
    return tuple(name for name, model in known.items() if model in published) if wanted is None else wanted


def plan_endpoints(config: PipelineConfig, before_run: bool = False) -> Any:
    """What to serve: an `EndpointsPlan`.

    Args:
        config: the pipeline's.
        before_run: whether the run need not stand yet.

    Raises:
        ConfigError: a student or teacher is not the run's, there is no run, or it has published nothing.
    """
    from rayfm.serving.endpoints import EndpointsPlan, TeacherPlan
    from rayfm.snapshots.load import SnapshotStore

    root = Path(config.runs).absolute() / config.name
    if not before_run and not root.is_dir():
        raise ConfigError(f"{root}: there is no such run; `rayfm run` makes it")
    endpoints, serving = config.endpoints, config.serving
    published = set(SnapshotStore(root).models())
    keys = {key: key for key in student_keys(config)}
    students = _chosen(endpoints.students, keys, published, "endpoints.students")
    _chosen(tuple(endpoints.retrieval), keys, published, "endpoints.retrieval")
    known = {name: teacher_key(config, name) for name in config.teachers}
    teachers = _chosen(endpoints.teachers, known, published, "endpoints.teachers")
    if not students and not teachers and not endpoints.retrieval:
        raise ConfigError(
            f"{root}: nothing is published yet; wait, or name in endpoints.students and endpoints.teachers what to "
            "serve as soon as it is"
        )
    if endpoints.metadata is None:
        endpoints = endpoints.model_copy(update={"metadata": f"sqlite://{quote(str(metadata_path(root)))}"})
    nodes = config.ray.nodes.serving
    placed = serving.placed(nodes)
    endpoints = endpoints.model_copy(update={"nodes": endpoints.nodes or nodes})
    if endpoints.near_line is not None:
        consumer = endpoints.near_line.consumer
        consumer = consumer.model_copy(update={"nodes": consumer.nodes or nodes})
        endpoints = endpoints.model_copy(
            update={"near_line": endpoints.near_line.model_copy(update={"consumer": consumer})}
        )
    return EndpointsPlan(
        run=config.name,
        root=str(root),
        students=students,
        teachers=tuple(
            TeacherPlan(name=name, model=known[name], threads=serving.threads, **placed.dump()) for name in teachers
        ),
        store=str(Path(config.storage).absolute()),
        endpoints=endpoints,
        largest=config.ray.largest,
    )


def serve(
    config: PipelineConfig,
    until: Callable[[Serving], None],
    production: bool = False,
    ready_s: float = 120.0,
) -> None:
    """Start the endpoints, call ``until`` once they answer, and stop them when it returns.

    Args:
        config: the pipeline's.
        until: told what runs; returns when it is to end.
        production: behind Ray Serve's HAProxy.
        ready_s: seconds to wait for the first answer of ``/readyz``; models without a version do not hold it up.

    Raises:
        ConfigError: there is no run, no such model, or no token where one is needed.
        CapacityError: a port is in use, or the endpoints do not answer.
    """
    endpoints = config.endpoints
    token = read_token(endpoints)
    check_bind(endpoints, token, production)
    plan = plan_endpoints(config)
    if endpoints.grpc_port is not None:
        limit_messages(endpoints.limits.max_body_bytes)
    if production:
        enable_production(joined_address(config.ray))
    with ray_session(config.ray):
        from rayfm.serving.endpoints import endpoints_name, start_endpoints, stop_endpoints

        start_endpoints(plan, token, production)
        try:
            url = f"http://{_shown(endpoints)}:{endpoints.http_port}"
            grpc = None if endpoints.grpc_port is None else f"{_shown(endpoints)}:{endpoints.grpc_port}"
            found = _wait_ready(f"http://{_near(endpoints)}:{endpoints.http_port}", token, ready_s)
            until(Serving(url, grpc, endpoints_name(config.name), found))
        finally:
            stop_endpoints(plan)


def _near(config: EndpointsConfig) -> str:
    """The host as this machine reaches it."""
    near = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}
    return near.get(config.host, config.host)


def _shown(config: EndpointsConfig) -> str:
    return "HOST" if config.host in ("0.0.0.0", "::") else _near(config)


SETTLED_S = 10.0
"""Seconds after which a readiness that does not change is taken for what it is: models without any version yet."""


def _wait_ready(url: str, token: str | None, seconds: float) -> dict[str, Any]:
    """What ``/readyz`` says, once all are ready, or nothing has changed for a while."""
    request = urllib.request.Request(f"{url}/readyz", headers={"Authorization": f"Bearer {token}"} if token else {})
    end = time.monotonic() + seconds
    said: dict[str, Any] | None = None
    since = time.monotonic()
    while time.monotonic() < end:
        before, said = said, _readiness(request)
        if said is None or said != before:
            since = time.monotonic()
        if said is not None and (said["ready"] or time.monotonic() - since >= SETTLED_S):
            return said
        time.sleep(0.5)
    raise CapacityError(f"{url} does not answer after {seconds:g} s; see Ray's log (ray logs), or `rayfm doctor`")


def _readiness(request: urllib.request.Request) -> dict[str, Any] | None:
    """The reply, whether ready (200) or not (503); None for no reply or another's."""
    try:
        try:
            with urllib.request.urlopen(request, timeout=5) as response:
                said = json.load(response)
        except urllib.error.HTTPError as error:
            said = json.load(error)
    except (OSError, ValueError):
        return None
    return said if isinstance(said, dict) and isinstance(said.get("ready"), bool) else None
