"""A real head whose job server asks for a token, for tests that submit jobs."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

JOB = Path(__file__).resolve().parents[1] / "jobs" / "stream.py"
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
MARK = "RAYFM_TEST_HEAD"
"""In the environment of the head, and so of everything that it starts."""


@dataclass(frozen=True)
class Head:
    """A running head."""

    address: str
    """Of the job server."""
    environment: dict[str, str]
    """With the right token."""

    def submit(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """``ray job submit`` of jobs/stream.py, until the job ends."""
        command = [*RAY, "job", "submit", "--address", self.address, "--", sys.executable, str(JOB), *arguments]
        return subprocess.run(
            command, env=self.environment | environment, capture_output=True, text=True, timeout=400, check=False
        )


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def listens(port: int) -> bool:
    """Whether somebody answers at a port, on loopback or on the node's own address."""
    return any(found.laddr.port == port for found in psutil.net_connections("tcp") if found.status == "LISTEN")


def marked(value: str) -> list[psutil.Process]:
    """Live processes with the mark in their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == value and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def write_token(path: Path) -> Path:
    path.write_text(secrets.token_hex(32))
    path.chmod(0o600)
    return path


def end(head: subprocess.Popen[bytes], mark: str) -> None:
    """End the head's process group, and whatever of its children has left the group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(5)
    _, alive = psutil.wait_procs(marked(mark), timeout=10)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=10)


@contextlib.contextmanager
def started(
    environment: dict[str, str], folder: Path, cpus: int, **options: object
) -> Iterator[tuple[dict[str, int], str]]:
    """``ray start --head`` on ports that are free; ended, with all that it started, when the block is left.

    Args:
        environment: of all its processes.
        folder: its temporary folder, removed at the end.
        cpus: of the node.
        options: more of ``ray start``, with underscores.

    Yields:
        Name of a port (``port``, ``dashboard``, ``agent``, ``client``) -> its number; and the mark of its processes.
    """
    mark = secrets.token_hex(8)
    ports = dict(zip(("port", "dashboard", "agent", "client"), free_ports(4), strict=True))
    given = {
        "port": ports["port"],
        "dashboard-port": ports["dashboard"],
        "dashboard-agent-listen-port": ports["agent"],
        "ray-client-server-port": ports["client"],
        "min-worker-port": 0,
        "max-worker-port": 0,
        "num-cpus": cpus,
        "object-store-memory": 200 * 2**20,
        "temp-dir": folder,
        **{name.replace("_", "-"): value for name, value in options.items()},
    }
    log = folder / "head.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*RAY, "start", "--head", "--block", *(f"--{name}={value}" for name, value in given.items())],
            env=environment | {MARK: mark},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        while not (listens(ports["dashboard"]) and listens(ports["agent"])):  # the agent, which runs jobs, comes last
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        found = {child.name() for child in marked(mark)}
        assert {"raylet", "gcs_server"} <= found, f"the mark finds only {found}"
        yield ports, mark
    finally:
        end(process, mark)
        left = marked(mark)
        shutil.rmtree(folder, ignore_errors=True)
    assert not left, f"the head left {left}"


def short_folder() -> Path:
    """A folder for a head: short, as a Unix socket's path has 107 characters; and not in /tmp/ray, where other Rays
    look for a cluster.
    """
    return Path(tempfile.mkdtemp(prefix="rayfm", dir="/tmp"))


def with_token(environment: dict[str, str], token: Path) -> dict[str, str]:
    """The environment of who has a token, which is written."""
    return environment | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(write_token(token))}


@contextlib.contextmanager
def running_head(folder_of_token: Path) -> Iterator[Head]:
    """A head with token authentication."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_TMPDIR")}
    environment |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),  # `python` of a job
    }
    environment = with_token(environment, folder_of_token / "token")
    with started(environment, short_folder(), cpus=3) as (ports, _):
        yield Head(f"http://127.0.0.1:{ports['dashboard']}", environment)
