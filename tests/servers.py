"""The real servers that tests run against: ZooKeeper and Redis as Debian packages them, each on a port of its own.

A test may kill one (`Server.kill`), freeze it (`Server.pause`) and start it again on the same port and data
(`Server.start`). A guard process ends a server whose test process died without stopping it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

LOOPBACK = "127.0.0.1"
START_S = 60.0
ZOOKEEPER_JAR = Path("/usr/share/java/zookeeper.jar")
NETTY_JARS = tuple(Path(f"/usr/share/java/netty-{part}.jar") for part in ("codec", "resolver"))
"""What the jar of Debian's ZooKeeper leaves out of its class path, and TLS needs."""
ZOOKEEPER_TICK_MS = 200
"""ZooKeeper grants sessions of 2 to 20 ticks: short ones, so that tests see them expire."""


class Server:
    """A server process on ``port`` of the loopback interface with its data in ``folder``.

    Args:
        name: for messages.
        command: what to run, with the server in the foreground.
        port: where it answers.
        folder: its data; its output goes to ``folder/log``.
        probe, answer: bytes that a server which is ready answers to.
    """

    def __init__(self, name: str, command: list[str], port: int, folder: Path, probe: bytes, answer: bytes) -> None:
        self.name, self.command, self.port, self.folder = name, command, port, folder
        self._probe, self._answer = probe, answer
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """``host:port``."""
        return f"{LOOPBACK}:{self.port}"

    @property
    def pid(self) -> int:
        """The living server's process id."""
        assert self._process is not None, f"{self.name} does not run"
        return self._process.pid

    def running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> Server:
        """Start the server, if it does not run, on the port and data that it had; returns once it answers."""
        if self.running():
            return self
        self._reap()
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self.command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        # The pipe closes when this process dies, however it dies.
        self._guard = subprocess.Popen(
            ["sh", "-c", f"cat; kill -9 {self._process.pid}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + START_S
        while not self.answers():
            if not self.running() or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"{self.name} did not start:\n{(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.05)
        return self

    def answers(self) -> bool:
        """Whether the server answers its probe."""
        return self.ask().startswith(self._answer)

    def ask(self) -> bytes:
        """The answer to the probe (ZooKeeper's says whether it leads), nothing where there is none."""
        with contextlib.suppress(OSError), socket.create_connection((LOOPBACK, self.port), timeout=1.0) as connection:
            connection.sendall(self._probe)
            return connection.recv(4096)
        return b""

    def kill(self) -> None:
        """Kill -9: the server has no chance to say goodbye. Returns once the process is gone."""
        self._signal(signal.SIGKILL)

    def stop(self) -> None:
        """Ask the server to end, as an operator would. Returns once the process is gone."""
        self.resume()
        self._signal(signal.SIGTERM)

    def restart(self) -> None:
        """Kill -9, then start on the same port and data."""
        self.kill()
        self.start()

    def pause(self) -> None:
        """Freeze the process (SIGSTOP): connections stay open, and nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let a frozen process go on."""
        if self.running():
            os.kill(self.pid, signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._reap()

    def _reap(self) -> None:
        """End the guard before the server's process id can be another's."""
        if self._guard is not None:
            self._guard.kill()
            self._guard.communicate()
        self._guard = self._process = None


def missing(what: str) -> None:
    """Skip for want of a server's package; fail where CI promises that it is there."""
    reason = f"{what} is not installed; apt-get install zookeeper redis-server"
    if os.environ.get("RAYFM_CI") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def zookeeper(folder: Path) -> Server:
    """A ZooKeeper of one server, not started yet. Sessions may last 0.4 to 4 s."""
    return _zookeeper("ZooKeeper", folder, free_port(), "ZooKeeperServerMain", {})


@dataclasses.dataclass(frozen=True)
class TLSFiles:
    """PEM files of a ZooKeeper that lets in only who has a certificate of the same authority."""

    ca: Path
    certificate: Path
    """Of a client; of a server too, as 127.0.0.1."""
    key: Path


def zookeeper_tls(folder: Path) -> tuple[Server, str, TLSFiles]:
    """A ZooKeeper with a second port for TLS, not started yet; the second port's address; a client's files."""
    openssl = shutil.which("openssl")
    if openssl is None:
        missing("openssl")
    folder.mkdir(parents=True, exist_ok=True)
    files = TLSFiles(folder / "certificate.pem", folder / "certificate.pem", folder / "key.pem")
    # One that signs itself is its own authority, and both sides may show it.
    subprocess.run(
        [
            *(str(openssl), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=rayfm test"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(files.key), "-out", str(files.certificate)),
        ],
        check=True,
        capture_output=True,
    )
    both = folder / "server.pem"
    both.write_text(files.key.read_text() + files.certificate.read_text())
    port = free_port()
    settings = {
        "secureClientPort": port,
        "secureClientPortAddress": LOOPBACK,
        "serverCnxnFactory": "org.apache.zookeeper.server.NettyServerCnxnFactory",
        "ssl.keyStore.type": "PEM",
        "ssl.keyStore.location": both,
        "ssl.trustStore.type": "PEM",
        "ssl.trustStore.location": files.ca,
    }
    server = _zookeeper("ZooKeeper", folder, free_port(), "ZooKeeperServerMain", settings)
    return server, f"{LOOPBACK}:{port}", files


def zookeeper_ensemble(folder: Path, size: int = 3) -> list[Server]:
    """The servers of one ZooKeeper, not started yet. Start them together: one alone is no majority and never ready."""
    ports = [(free_port(), free_port(), free_port()) for _ in range(size)]
    peers = {f"server.{i}": f"{LOOPBACK}:{peer}:{vote}" for i, (_, peer, vote) in enumerate(ports, 1)}
    members = []
    for i, (port, _, _) in enumerate(ports, 1):
        own = folder / str(i)
        (own / "data").mkdir(parents=True)
        (own / "data" / "myid").write_text(str(i))
        settings = {"initLimit": 20, "syncLimit": 10, **peers}
        members.append(_zookeeper(f"ZooKeeper {i}", own, port, "quorum.QuorumPeerMain", settings))
    return members


def _zookeeper(name: str, folder: Path, port: int, main: str, more: Mapping[str, object]) -> Server:
    java = shutil.which("java")
    if java is None or not ZOOKEEPER_JAR.exists():
        missing("ZooKeeper")
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "dataDir": folder / "data",
        "clientPort": port,
        "clientPortAddress": LOOPBACK,
        "tickTime": ZOOKEEPER_TICK_MS,
        "maxClientCnxns": 0,
        "admin.enableServer": "false",
        "4lw.commands.whitelist": "srvr",
        **more,
    }
    (folder / "zoo.cfg").write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
    command = [
        *(str(java), "-Xmx128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto"),
        *(
            "-cp",
            ":".join(map(str, (ZOOKEEPER_JAR, *NETTY_JARS))),
            f"org.apache.zookeeper.server.{main}",
            str(folder / "zoo.cfg"),
        ),
    ]
    # Unlike `ruok`, `srvr` is answered in earnest only once requests are served.
    return Server(name, command, port, folder, b"srvr", b"Zookeeper version")


def redis(folder: Path) -> Server:
    """A Redis with an append-only file, not started yet. Its URL is ``redis://{server.address}/0``."""
    binary = shutil.which("redis-server")
    if binary is None:
        missing("Redis")
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    command = [
        *(str(binary), "--port", str(port), "--bind", LOOPBACK, "--dir", str(folder), "--save", ""),
        # `always`: with `everysec`, Redis may answer before it writes, and kill -9 would lose what it acknowledged.
        *("--appendonly", "yes", "--appendfsync", "always"),
    ]
    return Server("Redis", command, port, folder, b"PING\r\n", b"+PONG")


@contextlib.contextmanager
def running(server: Server) -> Iterator[Server]:
    """Start a server and stop it at the end."""
    try:
        yield server.start()
    finally:
        server.stop()
