"""Structured log lines."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator

import pytest

from rayfm.config import ConfigError
from rayfm.operations.logs import LoggingConfig, about, configure, environment, fields

log = logging.getLogger("rayfm.test_logs")


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("RAYFM_LOG_FORMAT", raising=False)
    monkeypatch.delenv("RAYFM_LOG_LEVEL", raising=False)
    logger = logging.getLogger("rayfm")
    before = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before
    logger.setLevel(before[1])


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_a_line_says_what_it_is_about(capsys: pytest.CaptureFixture[str]):
    configure(LoggingConfig(format="json", level="info"))
    with about(run="ads", role="students", trainer="students"):
        with about(period="2026-01-01"):
            log.info("trained %d rows", 7, extra=fields(model="vm.none.1", rows=7))
        log.warning("after")
    log.debug("not at this level")
    first, second = lines(capsys)
    assert first.pop("time").endswith("Z")
    assert first == {
        "level": "INFO",
        "logger": "rayfm.test_logs",
        "message": "trained 7 rows",
        "run": "ads",
        "role": "students",
        "trainer": "students",
        "period": "2026-01-01",
        "model": "vm.none.1",
        "rows": 7,
    }
    assert "period" not in second
    assert second["run"] == "ads"


def test_threads_do_not_mix(capsys: pytest.CaptureFixture[str]):
    configure(LoggingConfig(format="json"))
    with about(run="one"):
        thread = threading.Thread(target=lambda: log.warning("of another thread"))
        thread.start()
        thread.join()
    assert "run" not in lines(capsys)[0]


def test_an_error_is_one_line_with_its_traceback(capsys: pytest.CaptureFixture[str]):
    configure(LoggingConfig(format="json"))
    try:
        raise RuntimeError("two\nlines")
    except RuntimeError:
        log.exception("it broke")
    (line,) = lines(capsys)
    assert "RuntimeError: two\nlines" in line["exception"]


def test_text_names_run_trainer_and_period(capsys: pytest.CaptureFixture[str]):
    configure(LoggingConfig(format="text", level="info"))
    with about(run="ads", trainer="fm", period="2026-01-01"):
        log.info("published")
    assert capsys.readouterr().err.endswith("INFO [ads fm 2026-01-01] published\n")


def test_by_default_nothing_is_set_up():
    before = list(logging.getLogger("rayfm").handlers)
    configure(LoggingConfig())
    configure(None)
    assert logging.getLogger("rayfm").handlers == before
    assert environment() == {}


def test_the_environment_wins_and_reaches_the_processes_that_are_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("RAYFM_LOG_FORMAT", "json")
    configure(LoggingConfig(format="text", level="error"))
    log.error("as JSON")
    log.warning("below the config's level")
    assert [line["message"] for line in lines(capsys)] == ["as JSON"]
    assert environment() == {"RAYFM_LOG_FORMAT": "json", "RAYFM_LOG_LEVEL": "error"}


def test_set_up_twice_a_line_is_still_written_once(capsys: pytest.CaptureFixture[str]):
    configure(LoggingConfig(format="json"))
    configure(LoggingConfig(format="json"))
    log.warning("once")
    assert len(lines(capsys)) == 1


def test_a_format_that_there_is_not_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAYFM_LOG_FORMAT", "xml")
    with pytest.raises(ConfigError, match="RAYFM_LOG_FORMAT is 'xml'; set it to one of text, json"):
        configure()
