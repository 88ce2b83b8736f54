"""Starting and finding teacher services on Ray Serve."""

from __future__ import annotations

import threading
from typing import Any

from pydantic import ValidationError

from rayfm.config import ConfigError
from rayfm.serving.gang.config import GangConfig
from rayfm.serving.proxies import QUIET, Door, open_door
from rayfm.serving.teacher import TeacherService, TeacherServiceConfig

LOOPBACK = "127.0.0.1"

GANG_HEALTH_S = 2.0
"""Seconds between looks whether all members of a gang are alive."""

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
    replicas: int = 1,
    cpus: float = 0.25,
    gpus: float = 0.0,
    http_port: int | None = None,
    members: int = 1,
    member_cpus: float = 0.25,
    member_gpus: float = 0.0,
    row_wise_from: int = 1_000_000,
) -> Any:
    """Deploy a teacher service and return its handle.

    Args:
        run, teacher: name the application.
        config: what a replica needs.
        replicas, cpus, gpus: size of the deployment.
        http_port: also answer ``POST /<application>`` with Arrow IPC on this port of the loopback interface; by
            default no port is opened and requests go through handles.
        members: above 1, each replica is a gang of so many processes over which the teacher's tables are sharded.
        member_cpus, member_gpus: of each of them; ``cpus`` and ``gpus`` are then of the replica that asks them.
        row_wise_from: rows from which on a gang cuts a table over its members.

    Raises:
        CapacityError: the port is in use, or Ray Serve runs already and listens elsewhere.
        ConfigError: a gang that cannot be.
    """
    gang = None
    if members > 1:
        each = {"members": members, "cpus_per_member": member_cpus, "gpus_per_member": member_gpus}
        gang = gang_config(config, {**each, "row_wise_from": row_wise_from}, http_port)
    from ray import serve

    name = application_name(run, teacher)
    with _DEPLOYING:
        open_door(None if http_port is None else Door(LOOPBACK, http_port))
        service: Any = TeacherService
        options: dict[str, Any] = {}
        if gang is not None:
            from rayfm.serving.gang.service import GangTeacherService

            service = GangTeacherService
            member = {"CPU": member_cpus, **({"GPU": member_gpus} if member_gpus else {})}
            own = {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
            options["placement_group_bundles"] = [own] + [member] * members
            options |= {"placement_group_strategy": "PACK", "health_check_period_s": GANG_HEALTH_S}
        deployment: Any = serve.deployment(
            service,
            name="TeacherService",
            num_replicas=replicas,
            max_ongoing_requests=16,
            ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
            logging_config=QUIET,
            **options,
        )
        application = deployment.bind((gang or config).dump())
        return serve.run(application, name=name, route_prefix=None if http_port is None else f"/{name}")


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
