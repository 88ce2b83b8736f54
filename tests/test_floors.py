from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

ROOMS = [
    "quiet",
    "config",
    "client",
    "schema",
    "metrics",
    "operations",
    "theory",
    "data",
    "models",
    "distill",
    "export",
    "snapshots",
    "labels",
    "training",
    "planning",
    "simulator",
    "serving",
    "augment",
    "selection",
    "report",
    "pipeline",
    "reproduce",
    "submission",
    "cli",
]
"""From the ground floor up; a room imports only from those before it. The pipeline ends with the report it writes."""


def layers() -> list[str]:
    """The contract's rooms from the ground floor up."""
    (contract,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert contract["type"] == "layers"
    return [name.removeprefix("rayfm.") for name in reversed(contract["layers"])]


def test_the_contract_has_the_rooms_in_order():
    found = layers()
    assert found == [room for room in ROOMS if room in found]


def test_the_contract_has_every_room():
    packages = {path.parent.name for path in (ROOT / "rayfm").glob("*/__init__.py")}
    assert set(layers()) == packages
    loose = {path.name for path in (ROOT / "rayfm").glob("*.py")} - {"__init__.py", "__main__.py"}
    assert not loose, "a module outside the rooms is bound by no contract"


def test_rooms_import_only_downwards():
    program = "import sys; from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", program, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kept, 0 broken" in done.stdout
