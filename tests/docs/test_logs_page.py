"""docs/logs.md does what it says up to the training, on fewer rows; a run is a minute, and tests/pipeline has one."""

from __future__ import annotations

import contextlib
import re
import shlex
import sys
from pathlib import Path

import pytest

from rayfm.cli.main import main
from rayfm.pipeline.config import load_config
from rayfm.pipeline.parts import prepare

PAGE = Path(__file__).resolve().parents[2] / "docs" / "logs.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_the_log_fits_the_config(
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
    manifests = prepare(load_config(Path("shop.yaml")))
    assert [manifest.rows("impression") for manifest in manifests] == [100] * 5
    assert not list(Path("runs/data/shop/rejects").glob("*")), "every row can be used"
    assert "`rayfm prepare shop.yaml`" in PAGE.read_text()
