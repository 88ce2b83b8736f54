"""`rayfm run --follow` as a command, and what stops it, without a run."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_pipeline import write_config
from typer.testing import CliRunner

from rayfm.cli.main import app
from rayfm.pipeline.stop import StopSignals


@pytest.mark.parametrize("stopped", [True, False])
def test_a_run_stopped_before_anything_was_scored_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    asked = {}

    def run(config, **options):
        asked.update(options)
        return SimpleNamespace(summary={"metrics": []}, seconds=1.0, report=tmp_path / "report.html", stopped=stopped)

    monkeypatch.setattr("rayfm.pipeline.stream.run", run)
    path = write_config(tmp_path)
    result = CliRunner().invoke(app, ["run", str(path), "--resume", "--follow"])
    assert result.exit_code == 0, result.output
    assert (asked["follow"], asked["resume"]) == (True, True)
    assert (f"stopped; go on with: rayfm run {path} --resume --follow" in result.output) == stopped


def test_signals_are_a_wish_to_stop_and_a_second_interrupt_is_none() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignals() as signals:
        assert not signals.asked()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as Ray does when it starts
        signals.install()
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.asked()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.asked()
