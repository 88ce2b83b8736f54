"""docs/logs.md does what it says: its log, its config and its commands, on fewer rows."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from rayfm.cli.main import main
from rayfm.pipeline.config import load_config
from rayfm.pipeline.stream import run

PAGE = Path(__file__).resolve().parents[2] / "docs" / "logs.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_from_a_parquet_folder_to_a_report(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (program,), (config,) = blocks("python"), blocks("yaml")
    assert "ROWS = 20_000" in program
    exec(compile(program.replace("ROWS = 20_000", "ROWS = 100"), "make_log.py", "exec"), {})
    Path("shop.yaml").write_text(config)
    said = [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines()]
    assert ["rayfm", "run", "shop.yaml"] in said
    for command, expected in (("config check", "embedding_dim: 16"), ("doctor", "5 periods, 3 of them tested")):
        words = ["rayfm", *command.split(), "shop.yaml"]
        assert words in said
        monkeypatch.setattr(sys, "argv", words)
        with contextlib.suppress(SystemExit):  # `doctor` ends with 1 on a machine that is too small for the plan
            main()
        assert expected in capsys.readouterr().out
    result = run(load_config(Path("shop.yaml")))
    assert result.report.samefile("runs/shop/report.html")
    metrics = json.loads(Path("runs/shop/summary.json").read_text())["metrics"]
    assert {(row["model"], row["variant"]) for row in metrics} >= {
        ("large", "teacher"),
        ("small", "none"),
        ("small", "direct"),
        ("small", "auxiliary"),
    }
