"""Submitting a job: its package, its environment, its command."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import secrets
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayfm.config import ConfigError, nearest, read_yaml
from rayfm.quiet import QUIET_ENVIRONMENT, WORKER_ENVIRONMENT
from rayfm.submission.package import Package
from rayfm.submission.server import Server, asking

STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
"""Seconds between SIGTERM and SIGKILL when a job is stopped. Ray reads it in the job's environment; its own are 3."""

STOP_WAIT_S = 600
"""A run that follows ends at a place where it can be gone on with, endpoints finish their requests."""

RUNTIME_KEYS = (
    "env_vars", "pip", "uv", "conda", "py_modules", "py_executable", "image_uri", "container", "config", "nsight",
)  # fmt: skip
"""Of Ray's runtime environment, what a file may say. The rest is what submitting is about, or rayfm's own."""


@dataclasses.dataclass(frozen=True)
class Submission:
    """A job that was submitted.

    Attributes:
        id: in Ray's job server.
        bytes: size of the package that it runs in.
    """

    id: str
    bytes: int


def submit(
    server: Server,
    entrypoint: list[str],
    package: Package,
    name: str,
    runtime_env: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Submission:
    """Send a package and start a command in it.

    Args:
        server: where.
        entrypoint: the command, one argument each.
        package: the working directory.
        name: what the id begins with.
        runtime_env: as `runtime_environment` makes it.
        metadata: shown beside the job.

    Raises:
        ConfigError: the package is too large, or the token is wrong.
        CapacityError: the server does not answer.
        RayfmError: it refuses.
    """
    job = f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}-{secrets.token_hex(4)}"
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "package.zip"
        size = package.write(archive)
        environment = {**(runtime_env or {}), "working_dir": str(archive)}
        try:
            with asking(server.address):
                server.client.submit_job(
                    entrypoint=shlex.join(entrypoint),
                    submission_id=job,
                    runtime_env=environment,
                    metadata=dict(metadata or {}),
                )
        except KeyboardInterrupt:
            # It may have arrived.
            with contextlib.suppress(Exception):
                server.client.stop_job(job)
            raise
    return Submission(job, size)


def runtime_environment(file: Path | None = None, variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Ray's runtime environment of a job, besides its working directory.

    Args:
        file: a YAML file of the environment, e.g. with ``pip`` or ``image_uri``.
        variables: environment variables, over those of the file.

    Raises:
        ConfigError: a key is not the file's to say, or a variable is one that rayfm sets in every process.
    """
    found = {} if file is None else read_yaml(file)
    for key in found:
        if key not in RUNTIME_KEYS:
            taken = {
                "working_dir": "it is what --working-dir names",
                "excludes": "name what is to be left out in .rayignore",
                "worker_process_setup_hook": "rayfm sets its own in every worker",
            }
            why = taken.get(key)
            raise ConfigError(
                f"{file}: {key!r} is not for this file: {why}"
                if why
                else f"{file}: unknown key {key!r}{nearest(key, list(RUNTIME_KEYS))}"
            )
    given = found.get("env_vars") or {}
    if not isinstance(given, dict) or not all(isinstance(value, str) for value in given.values()):
        raise ConfigError(f"{file}: 'env_vars': names and texts; put numbers in quotes")
    merged = {STOP_WAIT: str(STOP_WAIT_S), **given, **(variables or {})}
    for key in merged:
        if key in QUIET_ENVIRONMENT or key in WORKER_ENVIRONMENT:
            # Ray refuses a driver that sets what its job sets.
            raise ConfigError(f"--env {key}: rayfm sets it in every process; leave it out")
    return {**found, "env_vars": merged}
