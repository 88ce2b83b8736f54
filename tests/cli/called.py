"""The command line, called in the test's process."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from rayfm.cli.main import main

Called = Callable[..., tuple[int, str, str]]


def caller(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Called:
    """Calls ``rayfm COMMAND ...``: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rayfm", command, *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return call
