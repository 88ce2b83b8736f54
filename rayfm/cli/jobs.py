"""What runs as a Ray job, and how: each job is a command of the command line, on the cluster that it is submitted to.

The scripts in ``jobs/`` are this by name. ``python -m rayfm.cli.jobs NAME ...`` is the same where there are no scripts:
`rayfm submit` runs that, so that a project of one's own needs no copy of them.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from typing import Any

import typer


@dataclasses.dataclass(frozen=True)
class Job:
    """A command as a job.

    Attributes:
        command: of the command line.
        about: what it does, in some words.
        options: given besides the caller's: a job that died is simply submitted again, and goes on.
        config: whether its first argument is a pipeline's YAML file.
    """

    command: str
    about: str
    options: tuple[str, ...] = ()
    config: bool = True


JOBS = {
    "prepare": Job("prepare", "raw logs into the example store"),
    "train": Job("train", "teachers, or groups of students"),
    "label": Job("label", "what teachers say of prepared periods"),
    "stream": Job("run", "the whole pipeline; with --follow, for every new period", ("--resume",)),
    "evaluate": Job("evaluate", "a published version on prepared periods"),
    "select_features": Job("select", "features worth having", ("--resume",)),
    "reproduce": Job("reproduce", "the papers' tables", config=False),
    "serve": Job("serve", "the endpoints, until the job is stopped"),
}
"""Name -> job."""

_OVERRIDE = re.compile(r"@|[^=/\s]+=")
"""How ``KEY=VALUE`` begins."""


def command_line(name: str, arguments: list[str]) -> list[str]:
    """The arguments of ``rayfm`` that a job's are: its command, on the cluster that the job runs on.

    Args:
        name: of the job.
        arguments: as the command takes them; after a config, ``KEY=VALUE`` and ``@FILE`` stand for ``--set`` of it.
    """
    job = JOBS[name]
    if not job.config:
        return [job.command, *arguments, *job.options]
    valued = {option for option, flag in options(job.command).items() if not flag}
    # First, so that an address that is given prevails.
    found = [job.command, "--set", "ray.address=auto"]
    before, config = "", False
    for argument in arguments:
        positional = before not in valued and not argument.startswith("-")
        found += ["--set", argument] if positional and config and _OVERRIDE.match(argument) else [argument]
        config, before = config or positional, argument
    return [*found, *job.options]


def options(command: str) -> dict[str, bool]:
    """Option of a command -> whether it is a flag, without a value."""
    return {
        name: parameter.is_flag
        for parameter in _found(command).params
        if getattr(parameter, "is_flag", None) is not None
        for name in (*parameter.opts, *parameter.secondary_opts)
    }


def parse(name: str, arguments: list[str]) -> dict[str, Any]:
    """What a job's arguments mean to its command, by the names of its parameters; nothing is run.

    Raises:
        typer's usage error: they do not fit the command.
    """
    command, *rest = command_line(name, arguments)
    with _found(command).make_context(f"rayfm {command}", rest) as context:
        return dict(context.params)


def _found(command: str) -> Any:
    """A command of the command line."""
    from typer.main import get_command

    from rayfm.cli.main import app

    return getattr(get_command(app), "commands")[command]  # noqa: B009 - a group has them, a command does not


def job(name: str, arguments: list[str], usage: str | None = None) -> int:
    """Run a job; returns its exit code: 0, 1 for an error (printed as one line), 2 for arguments that do not fit.

    Args:
        name: of the job.
        arguments: as `command_line` takes them.
        usage: what to say where there are none.
    """
    from rayfm.cli.main import main

    if not arguments or "--help" in arguments:
        typer.echo(usage or f"python -m rayfm.cli.jobs {name} ARGUMENTS; `--help` tells them", err=not arguments)
    if not arguments:
        return 2
    os.environ.setdefault("RAY_ADDRESS", "auto")  # Ray sets it in a job; for a script that is started on a node
    try:
        main(command_line(name, arguments))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(bool(end.code))
    return 0


def _named(arguments: list[str]) -> int:
    """The job that the first argument names."""
    if not arguments or arguments[0] not in JOBS:
        typer.echo(f"python -m rayfm.cli.jobs NAME ARGUMENTS, where NAME is one of {', '.join(JOBS)}", err=True)
        return 2
    return job(arguments[0], arguments[1:])


if __name__ == "__main__":
    sys.exit(_named(sys.argv[1:]))
