from __future__ import annotations

import os
import signal
import threading

import pytest
from small_pipeline import small_pipeline

from rayfm.cli import serve as command
from rayfm.pipeline.endpoints import Serving

READY = {
    "ready": False,
    "models": {"vm.none.1": "2024-01-02-aa", "vm.direct.1": None},
    "teachers": {"fm": "2024-01-02-bb"},
    "retrieval": {"towers.none.1": "2024-01-02-cc"},
}


@pytest.fixture
def signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_it_is_told_to_stop(tmp_path, monkeypatch, capsys, signals, number):
    ended = []

    def serve(config, until, production):
        threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
        until(Serving("http://127.0.0.1:8000", None, "rayfm-small", READY))
        ended.append(production)

    monkeypatch.setattr(command, "serve", serve)
    command.serve_and_show(small_pipeline(tmp_path), production=False)
    assert ended == [False]
    said = capsys.readouterr().out
    for words in ("models/vm.none.1:score", "not in memory", "towers.none.1:retrieve", "teachers/fm:score", "/readyz"):
        assert words in said
    assert "stopping" in said
    assert "other machines" not in said


def test_it_says_who_can_reach_it(tmp_path, capsys):
    config = small_pipeline(tmp_path)
    command.show(Serving("http://HOST:8000", "HOST:9000", "rayfm-small", READY), config, production=False)
    said = " ".join(capsys.readouterr().out.split())
    assert "HOST:9000 application rayfm-small" in said
    assert "put TLS before" in said
    command.show(Serving("http://HOST:8000", None, "rayfm-small", READY), config, production=True)
    assert "8404 (statistics) and 9101 (metrics) on every interface" in " ".join(capsys.readouterr().out.split())
