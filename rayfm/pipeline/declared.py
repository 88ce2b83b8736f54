"""Applications of Ray Serve as a Serve config names them: what KubeRay's RayService, or ``serve deploy``, starts.

Each is a builder for ``import_path``, with the pipeline's config as its arguments. What it builds is what `rayfm serve`
starts; names, routes and ports stand in the Serve config, and have to be those of `rayfm serve`
(cluster/kubernetes/base/rayservice.yaml):

| application | builder |
| --- | --- |
| ``rayfm-RUN``, route ``/`` | ``rayfm.pipeline.declared:endpoints`` |
| ``rayfm-RUN-serve-TEACHER``, no route | ``rayfm.pipeline.declared:teacher`` |
| ``rayfm-RUN-serve-TEACHER-nearline``, no route | ``rayfm.pipeline.declared:consumers`` |
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from rayfm.config import Config, ConfigError, nearest, validate
from rayfm.pipeline.config import load_config
from rayfm.pipeline.endpoints import plan_endpoints
from rayfm.serving.http.token import read_token


class Arguments(Config):
    """What a builder is given, as ``args`` of an application."""

    config: str
    """Path of the pipeline's config, as the nodes of the cluster see it."""
    set_: tuple[str, ...] = Field((), alias="set")
    """As ``--set``: ``KEY=VALUE`` or ``@FILE``."""
    teacher: str | None = None
    """Name of the teacher, where the application is of one."""


def endpoints(arguments: dict[str, Any]) -> Any:
    """The endpoints: scores of students, and the door to the teachers' services.

    Raises:
        ConfigError: the config or the arguments are wrong; what is served, or the metadata store, is not named; there
            is no token.
    """
    from rayfm.serving.endpoints import bind_endpoints

    given = _given(arguments)
    if given.teacher is not None:
        raise ConfigError("the endpoints are of all teachers; leave 'teacher' out of args")
    plan, token = _plan(given)
    return bind_endpoints(plan, token)


def teacher(arguments: dict[str, Any]) -> Any:
    """The service of one teacher, which the endpoints ask.

    Raises:
        ConfigError: as `endpoints`, or there is no such teacher.
    """
    from rayfm.serving.application import bind_teacher

    given = _given(arguments)
    plan, _ = _plan(given)
    found = _of_teacher(given, {one.name: one for one in plan.teachers})
    return bind_teacher(plan.service(found), found)


def consumers(arguments: dict[str, Any]) -> Any:
    """Who labels the rows that are posted for one teacher.

    Raises:
        ConfigError: as `teacher`, or ``endpoints.near_line`` is not configured.
    """
    from rayfm.serving.nearline.application import bind_consumers

    given = _given(arguments)
    plan, _ = _plan(given)
    if plan.endpoints.near_line is None:
        raise ConfigError(f"{given.config}: no rows are posted without endpoints.near_line; leave the consumers out")
    return bind_consumers(_of_teacher(given, plan.near_line()))


def _given(arguments: dict[str, Any]) -> Arguments:
    return validate(Arguments, arguments, "args")


def _plan(given: Arguments) -> tuple[Any, str | None]:
    """What is served, and the token. The run need not stand: it may be the first that the cluster starts."""
    from rayfm.serving.endpoints import check_plan

    config = load_config(given.config, list(given.set_))
    named = config.endpoints
    for key in ("students", "teachers", "metadata"):
        if getattr(named, key) is None:
            raise ConfigError(f"{given.config}: a declared service names what it serves; write endpoints.{key}")
    plan = plan_endpoints(config, before_run=True)
    token = read_token(named)
    check_plan(plan, token, production=True)
    return plan, token


def _of_teacher(given: Arguments, known: dict[str, Any]) -> Any:
    if given.teacher not in known:
        raise ConfigError(f"args: teacher {given.teacher!r} is not served{nearest(str(given.teacher), list(known))}")
    return known[given.teacher]
