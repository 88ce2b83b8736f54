"""Starting and finding teacher services on Ray Serve."""

from __future__ import annotations

import threading
from typing import Any

from pydantic import ValidationError

from rayfm.config import ConfigError
from rayfm.serving.gang.config import GangConfig
from rayfm.serving.proxies import QUIET, Door, open_door
from rayfm.serving.replicas import Replicas
from rayfm.serving.teacher import TeacherService, TeacherServiceConfig

LOOPBACK = "127.0.0.1"

GANG_HEALTH_S = 2.0
"""Seconds between looks whether all members of a gang are alive."""

MAX_ONGOING = 16
"""Requests that a teacher's replica takes at once; it scores one after the other."""

_DEPLOYING = threading.Lock()
"""Ray Serve is not safe between threads: two that find no controller both make one, and pickling a deployment
registers and unregisters modules of the whole process."""


def application_name(run: str, teacher: str) -> str:
    """Name of the Serve application of a run's teacher."""
    return f"rayfm-{run}-{teacher}"


def start_teacher(
    run: str,
    teacher: str,
    config: TeacherServiceConfig,
    replicas: Replicas | None = None,
    http_port: int | None = None,
) -> Any:
    """Deploy a teacher service and return its handle.

    Args:
        run, teacher: name the application.
        config: what a replica needs.
        replicas: how many, of what size, and where; by default one.
        http_port: also answer ``POST /<application>`` with Arrow IPC on this port of the loopback interface; by
            default no port is opened and requests go through handles.

    Raises:
        CapacityError: the port is in use, or Ray Serve runs already and listens elsewhere.
        ConfigError: a gang that cannot be.
    """
    if replicas is not None and replicas.members > 1:
        gang_config(config, replicas.gang(), http_port)
    from ray import serve

    name = application_name(run, teacher)
    with _DEPLOYING:
        open_door(None if http_port is None else Door(LOOPBACK, http_port))
        return serve.run(
            bind_teacher(config, replicas, http_port), name=name, route_prefix=None if http_port is None else f"/{name}"
        )


def bind_teacher(config: TeacherServiceConfig, replicas: Replicas | None = None, http_port: int | None = None) -> Any:
    """The Serve application of a teacher service; arguments and errors as of `start_teacher`."""
    replicas = replicas or Replicas()
    gang = gang_config(config, replicas.gang(), http_port) if replicas.members > 1 else None
    from ray import serve

    service: Any = TeacherService
    options: dict[str, Any] = {**replicas.options(), **replicas.placement()}
    if gang is not None:
        from rayfm.serving.gang.service import GangTeacherService

        service = GangTeacherService
        options["health_check_period_s"] = GANG_HEALTH_S
    deployment: Any = serve.deployment(
        service, name="TeacherService", max_ongoing_requests=MAX_ONGOING, logging_config=QUIET, **options
    )
    return deployment.bind((gang or config).dump())


def gang_config(config: TeacherServiceConfig, gang: dict[str, Any], http_port: int | None = None) -> GangConfig:
    """A teacher service's config with that of its gangs.

    Raises:
        ConfigError: no gang can be so.
    """
    if http_port is not None:
        raise ConfigError("serving.http_port goes with serving.members: 1; ask a gang through `rayfm serve`")
    try:
        return GangConfig(**config.dump(), **gang)
    except ValidationError as error:
        said = "; ".join(
            f"{'.'.join(map(str, item['loc']))} {item['msg']}".strip() for item in error.errors(include_url=False)
        )
        raise ConfigError(f"a gang of {gang['members']} for {config.model}: {said}") from None


def teacher_handle(run: str, teacher: str) -> Any:
    """The handle of a running teacher service."""
    from ray import serve

    return serve.get_app_handle(application_name(run, teacher))


def stop_teacher(run: str, teacher: str) -> None:
    """Remove a teacher's application; Serve itself stays for the others."""
    from ray import serve

    serve.delete(application_name(run, teacher))
