"""Every table, whole, from the command line: small models on little data."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rayfm.cli.main import main
from rayfm.reproduce.table import TABLES

COMMAND = [sys.executable, "-m", "rayfm.cli.main", "reproduce"]
ENVIRONMENT = os.environ | {"COLUMNS": "80", "OMP_NUM_THREADS": "1"}


def reproduce(*arguments: str, timeout: float) -> str:
    command = [*COMMAND, *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.timeout(700)
def test_all_tables_in_one_call_and_nothing_twice(tmp_path: Path) -> None:
    names = list(TABLES)
    arguments = ("--quick", "--source", "simulator", "--folder", str(tmp_path))
    output = reproduce(*names, *arguments, timeout=600)
    for name in names:
        assert f"{name}  " in output, name
    lines = [line for line in output.splitlines() if not line.startswith(tuple(TABLES)) and str(tmp_path) not in line]
    assert max(map(len, lines)) <= 80
    assert "of the paper's" in output
    page = (tmp_path / "quick.html").read_text()
    for name in names:
        assert f">{name}<" in page
    assert not list(tmp_path.glob("runs/*/trainers/*/checkpoints"))  # gigabytes at full size
    # A table's variants that were trained for all of them are found again.
    assert "trained before" in reproduce("exfm-table2", *arguments, timeout=200)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["khani-table1", "--source", "nowhere"], "source 'nowhere': no pipeline of that name"),
        (["sead-table1", "--seeds", "one"], "--seeds 'one': give whole numbers"),
    ],
)
def test_what_cannot_be_run_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["reproduce", *arguments, "--folder", str(tmp_path)])
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
