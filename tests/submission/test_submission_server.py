"""Ray's own client before servers that answer as a job server, or as something else."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from rayfm.config import CapacityError, ConfigError, RayfmError
from rayfm.submission.server import DEFAULT, asking, check_version, connect, server_address
from rayfm.submission.submit import STOP_WAIT, runtime_environment


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def answering() -> Iterator[Any]:
    """Starts a server of one answer; gives its address."""
    servers = []

    def start(status: int, body: str) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *arguments: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def version(ray_version: str) -> str:
    return json.dumps({"version": "4", "ray_version": ray_version, "ray_commit": "x"})


def test_a_job_server_answers(answering, monkeypatch) -> None:
    address = answering(200, version(ray.__version__))
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")  # Ray's client would take this one
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:2")
    server = connect(address + "/")
    assert (server.address, server.version) == (address, ray.__version__)
    assert server.client.get_address() == address


def test_another_ray_is_refused_with_both_versions(answering) -> None:
    with pytest.raises(ConfigError, match=rf"runs Ray 2\.40\.0, and here it is {ray.__version__}"):
        connect(answering(200, version("2.40.0")))


def test_a_patch_of_the_same_ray_is_not() -> None:
    check_version("2.60.3", "2.60.0", "http://ray")
    with pytest.raises(ConfigError, match="of an unknown version"):
        check_version("", "2.60.0", "http://ray")


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "asks for a token and was sent none; set RAY_AUTH_MODE=token"), (403, "does not know the token")],
)
def test_a_server_that_wants_another_token(answering, status: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        connect(answering(status, "no"))


def test_nobody_listens() -> None:
    with pytest.raises(CapacityError, match=r"no Ray job server at http://127\.0\.0\.1:1: nobody listens there.*8265"):
        connect("127.0.0.1:1")


def test_somebody_else_listens(answering) -> None:
    with pytest.raises(CapacityError, match=r"what answers there is none \(status 404\)"):
        connect(answering(404, "nothing here"))


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [
        (None, {}, DEFAULT),
        ("head:8265", {"RAY_API_SERVER_ADDRESS": "http://other"}, "http://head:8265"),
        (None, {"RAY_API_SERVER_ADDRESS": "https://other/", "RAY_ADDRESS": "http://third"}, "https://other"),
        (None, {"RAY_ADDRESS": "http://third:1"}, "http://third:1"),
        (None, {"RAY_ADDRESS": "10.0.0.1:6379"}, DEFAULT),
    ],
)
def test_where_the_address_comes_from(given, environment, expected, monkeypatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert server_address(given) == expected


@pytest.mark.parametrize("address", ["ray://head:10001", "http://", "http://head:port", "s3://bucket"])
def test_what_is_no_dashboard_s_url(address: str) -> None:
    with pytest.raises(ConfigError, match="give the URL of the dashboard"):
        server_address(address)


def test_a_refusal_is_its_last_line() -> None:
    text = "Request failed with status code 500: Traceback (most recent call last):\n  File x\nValueError: no agent.\n"
    with pytest.raises(RayfmError, match=r"^http://ray refuses: ValueError: no agent$"), asking("http://ray"):
        raise RuntimeError(text)


def test_the_environment_gives_a_job_time_to_stop(tmp_path) -> None:
    assert runtime_environment() == {"env_vars": {STOP_WAIT: "600"}}
    file = tmp_path / "environment.yaml"
    file.write_text("pip: [x]\nenv_vars: {A: '1', B: '2'}\n")
    found = runtime_environment(file, {"B": "3", STOP_WAIT: "60"})
    assert found == {"pip": ["x"], "env_vars": {STOP_WAIT: "60", "A": "1", "B": "3"}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("working_dir: /x", "'working_dir' is not for this file: it is what --working-dir names"),
        ("worker_process_setup_hook: x", "rayfm sets its own in every worker"),
        ("pipp: [x]", "unknown key 'pipp'; did you mean 'pip'"),
        ("env_vars: {A: 1}", "put numbers in quotes"),
        ("env_vars: {PYTHONWARNINGS: default}", "--env PYTHONWARNINGS: rayfm sets it in every process"),
    ],
)
def test_an_environment_that_would_not_work(tmp_path, text: str, message: str) -> None:
    file = tmp_path / "environment.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        runtime_environment(file)
