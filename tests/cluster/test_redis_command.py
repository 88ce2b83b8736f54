"""The Redis of the manifests asks for the password that its container gets, and no argument holds it."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import kustomized
import psutil
import pytest
import redis

BASE = Path(__file__).resolve().parents[2] / "cluster" / "kubernetes" / "base"
PASSWORD = "a-password-of-letters"


def test_the_containers_command_starts_a_redis_that_asks_for_the_password(tmp_path: Path):
    if shutil.which("redis-server") is None:
        assert os.environ.get("RAYFM_CI") != "1", "CI installs redis-server"
        pytest.skip("no redis-server on the path")
    objects = kustomized.documents(BASE / "redis.yaml")
    text = kustomized.select(objects, "ConfigMap", "redis")["data"]["redis.conf"]
    (container,) = kustomized.select(objects, "StatefulSet", "redis")["spec"]["template"]["spec"]["containers"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = tmp_path / "redis.conf"
    config.write_text(text.replace("/data", str(tmp_path)) + f"bind 127.0.0.1\nport {port}\n")
    command = [word.replace("/etc/redis/redis.conf", str(config)) for word in container["command"]]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(command, env={**os.environ, "REDIS_PASSWORD": PASSWORD}, stdout=log, stderr=log)
    try:
        client = redis.Redis(port=port, password=PASSWORD)
        end = time.monotonic() + 30
        while True:
            with contextlib.suppress(redis.ConnectionError):
                assert client.ping()
                break
            assert server.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < end
            time.sleep(0.05)
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(port=port).ping()
        assert client.config_get("appendonly") == {"appendonly": "yes"}
        assert PASSWORD not in " ".join(psutil.Process(server.pid).cmdline())
        for probe_name in ("readinessProbe", "livenessProbe"):
            script = container[probe_name]["exec"]["command"][-1].replace("redis-cli", f"redis-cli -p {port}")
            environment = {**os.environ, "REDIS_PASSWORD": PASSWORD}
            assert subprocess.run(["bash", "-c", script], env=environment, check=False).returncode == 0
            wrong = {**environment, "REDIS_PASSWORD": "wrong"}
            assert subprocess.run(["bash", "-c", script], env=wrong, check=False, capture_output=True).returncode != 0
    finally:
        server.terminate()
        server.wait(20)
