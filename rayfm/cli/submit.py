"""``rayfm submit``: a job on a cluster, followed to its end."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rayfm.submission.package import Package


def submit(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG", help="The pipeline's YAML file; with --job reproduce, a table.", show_default=False
        ),
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="OPTION", help="After --: the job's own, e.g. -- --follow.", show_default=False),
    ] = None,
    job: Annotated[
        str,
        typer.Option(
            "--job",
            metavar="NAME",
            help="prepare, train, label, stream, evaluate, select_features, reproduce or serve.",
        ),
    ] = "stream",
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            metavar="URL",
            help="Of the dashboard; by default RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265.",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key; @FILE as for `rayfm run`.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="FOLDER", help="Where the source's logs are, on the cluster.")
    ] = None,
    working_dir: Annotated[
        Path, typer.Option("--working-dir", metavar="FOLDER", help="What is sent; it holds CONFIG.")
    ] = Path(),
    env: Annotated[
        list[str] | None, typer.Option("--env", metavar="NAME=VALUE", help="Variable of the job; no secrets.")
    ] = None,
    runtime_env: Annotated[
        Path | None,
        typer.Option("--runtime-env", metavar="FILE", help="YAML of Ray's runtime environment: pip, image_uri ..."),
    ] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Print the job's id, and do not follow it.")] = False,
) -> None:
    """Run a job on a cluster: send this folder, follow the log, end with its exit code.

    Ctrl-C stops the job; a second one leaves it to stop by itself. With token
    authentication, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH (or
    RAY_AUTH_TOKEN). More in docs/jobs.md.
    """
    from rayfm.submission.follow import follow
    from rayfm.submission.package import megabytes
    from rayfm.submission.server import connect
    from rayfm.submission.submit import runtime_environment
    from rayfm.submission.submit import submit as send

    environment = runtime_environment(runtime_env, _variables(env))
    work = _work(job, config, arguments or [], set_, data, working_dir)
    server = connect(address)
    metadata = {"rayfm_job": job, "rayfm_run": work.name}
    entrypoint = ["python", "-m", "rayfm.cli.jobs", job, *work.arguments]
    submitted = send(server, entrypoint, work.package, f"{work.name}-{job}", environment, metadata)
    own = ", rayfm among them" if work.package.own else ""
    _say(f"sent    {len(work.package.files)} files of {work.package.folder}{own}: {megabytes(submitted.bytes)}")
    if work.here:
        _say(f"warning: not sent, but read and written on the cluster's nodes: {', '.join(work.here)}")
    _say(f"job     {submitted.id} on {server.address}, Ray {server.version}")
    if no_wait:
        typer.echo(submitted.id)
        return
    started = time.monotonic()
    code = follow(server, submitted.id, _write, _say)
    _say(f"ended   {submitted.id} with exit code {code} after {time.monotonic() - started:.0f} s")
    raise typer.Exit(code)


@dataclasses.dataclass(frozen=True)
class _Work:
    """What a job is to do, and with what.

    Attributes:
        package: what is sent.
        arguments: of the job, with files as the package names them.
        name: of the run.
        here: ``key=path`` of what the config names on this machine, and is not sent.
    """

    package: Package
    arguments: list[str]
    name: str
    here: list[str]


def _work(
    job: str, config: str, arguments: list[str], set_: list[str] | None, data: str | None, working_dir: Path
) -> _Work:
    """All that can be found wrong before anything is sent.

    Raises:
        ConfigError: the config, a path or an option.
    """
    from rayfm.cli.jobs import JOBS, parse
    from rayfm.config import ConfigError, nearest
    from rayfm.submission.package import collect

    if job not in JOBS:
        raise ConfigError(f"--job: unknown {job!r}{nearest(job, list(JOBS))}")
    if JOBS[job].config:
        return _work_of_config(job, config, arguments, set_ or [], data, working_dir)
    if set_ or data is not None:
        raise ConfigError(f"--set and --data are of a config, and --job {job} has none; give its own options after --")
    given = [config, *arguments]
    folder = str(parse(job, given)["folder"])
    if not os.path.isabs(folder):
        raise ConfigError(
            f"--folder {folder} is relative, and would go with the job; name one that every node mounts: "
            f"-- --folder /mnt/shared/{Path(folder).name}"
        )
    return _Work(collect(working_dir), given, "rayfm", [])


def _work_of_config(
    job: str, config: str, arguments: list[str], overrides: list[str], data: str | None, working_dir: Path
) -> _Work:
    from rayfm.cli.jobs import parse
    from rayfm.config import config_files
    from rayfm.pipeline.config import load_config
    from rayfm.quiet import quiet_libraries
    from rayfm.submission.package import collect
    from rayfm.submission.paths import check_paths, left_out

    quiet_libraries()
    loaded = load_config(config, overrides, data)
    package = collect(working_dir, left_out(loaded, working_dir))
    given = [package.name(Path(config), "config")]
    for file in config_files(config)[1:]:
        package.name(file, "included file")
    for override in overrides:
        at = override.startswith("@")
        given += ["--set", f"@{package.name(Path(override[1:]), '--set file')}" if at else override]
    given += [*(["--data", data] if data is not None else []), *arguments]
    parse(job, given)
    return _Work(package, given, loaded.name, check_paths(loaded, package))


def _variables(given: list[str] | None) -> dict[str, str]:
    """``NAME=VALUE`` by name. Raises ConfigError for another form."""
    from rayfm.config import ConfigError

    found = {}
    for item in given or []:
        name, separator, value = item.partition("=")
        if not separator or not name:
            raise ConfigError(f"--env {item!r}: write it as NAME=VALUE")
        found[name] = value
    return found


def _say(line: str) -> None:
    """A line of our own; the job's go to stdout."""
    typer.echo(line, err=True)


def _write(piece: str) -> None:
    """A piece of the job's log, at once."""
    sys.stdout.write(piece)
    sys.stdout.flush()
