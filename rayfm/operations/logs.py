"""Structured logs: one place that says how rayfm's log lines look, and what they are about.

By default nothing is set up: lines go where Python, or whoever embeds rayfm, sends them. With ``logging`` in the config
(or ``RAYFM_LOG_FORMAT`` in the environment, which wins and reaches every worker process) lines go to the error stream,
as text or as one JSON object a line::

    {"time": "2026-01-02T03:04:05.678Z", "level": "INFO", "logger": "rayfm.training.loop", "message": "...",
     "run": "ads", "role": "students", "trainer": "students", "period": "2026-01-01T00", ...}
"""

from __future__ import annotations

import contextlib
import contextvars
import datetime
import json
import logging
import os
import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from rayfm.config import Config, ConfigError

Format = Literal["text", "json"]
Level = Literal["debug", "info", "warning", "error"]

FORMAT_VARIABLE, LEVEL_VARIABLE = "RAYFM_LOG_FORMAT", "RAYFM_LOG_LEVEL"
FIELDS = "fields"
"""Key of a call's ``extra``: a mapping of further fields of the line, as `fields` makes it."""


class LoggingConfig(Config):
    """How log lines look. ``RAYFM_LOG_FORMAT`` and ``RAYFM_LOG_LEVEL`` of the environment win."""

    format: Format = "text"
    """``json``: an object a line, with run, role, trainer, model and period where they are known."""
    level: Level = "warning"
    """``info`` says what is done of each period and version."""


_NOTHING: Mapping[str, str] = types.MappingProxyType({})
_about: contextvars.ContextVar[Mapping[str, str]] = contextvars.ContextVar("rayfm_log_about", default=_NOTHING)


@contextlib.contextmanager
def about(**fields: str) -> Iterator[None]:
    """Within the block, in this thread, every log line has these fields besides those of the blocks around it."""
    token = _about.set({**_about.get(), **fields})
    try:
        yield
    finally:
        _about.reset(token)


def fields(**values: Any) -> dict[str, Any]:
    """``extra`` of a log call: fields of that line alone."""
    return {FIELDS: values}


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON; what JSON has not becomes text."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, Any] = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_about.get(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """A record as a line for people, what it is about in front."""

    def format(self, record: logging.LogRecord) -> str:
        known = _about.get()
        where = " ".join(known[name] for name in ("run", "trainer", "period") if name in known)
        line = f"{self.formatTime(record)} {record.levelname} {f'[{where}] ' if where else ''}{record.getMessage()}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _Ours(logging.StreamHandler[Any]):
    """The handler that `configure` sets; it writes to the error stream of the time of writing."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        import sys

        return sys.stderr


def environment() -> dict[str, str]:
    """What worker processes must have in their environment to log alike."""
    return {name: os.environ[name] for name in (FORMAT_VARIABLE, LEVEL_VARIABLE) if name in os.environ}


def configure(config: LoggingConfig | None = None) -> None:
    """Set up this process's log lines, by the environment or by ``config``; nothing to do where both say nothing.

    What is set up is written to the environment too, so that processes which this one starts log alike.

    Raises:
        ConfigError: the environment names a format or a level that there is not.
    """
    asked = environment()
    if not asked and (config is None or config == LoggingConfig()):
        return
    base = config or LoggingConfig()
    format_, level = asked.get(FORMAT_VARIABLE, base.format), asked.get(LEVEL_VARIABLE, base.level).lower()
    for variable, value, known in (
        (FORMAT_VARIABLE, format_, ("text", "json")),
        (LEVEL_VARIABLE, level, ("debug", "info", "warning", "error")),
    ):
        if value not in known:
            raise ConfigError(f"{variable} is {value!r}; set it to one of {', '.join(known)}")
    logger = logging.getLogger("rayfm")
    for handler in [handler for handler in logger.handlers if isinstance(handler, _Ours)]:
        logger.removeHandler(handler)
    handler = _Ours()
    handler.setFormatter(JsonFormatter() if format_ == "json" else TextFormatter())
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False
    os.environ[FORMAT_VARIABLE], os.environ[LEVEL_VARIABLE] = format_, level
