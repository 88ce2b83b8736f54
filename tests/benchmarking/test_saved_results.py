"""What a dated result says of where it was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import saved

CPUINFO = """processor\t: 0
model name\t: One Processor
flags\t\t: fpu avx2 avx512f avx512_bf16

processor\t: 1
model name\t: Another
flags\t\t: fpu
"""


def test_the_command_has_no_path_of_the_machine() -> None:
    arguments = ["--work", "/home/ada/bench", "--seeds", "1", "--data", "criteo-1m"]
    assert saved.command("others", arguments) == "python -m benchmarks.others --work bench --seeds 1 --data criteo-1m"


def test_the_first_processor_is_named_with_what_its_products_hang_on(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    found = saved.machine(tmp_path / "cpuinfo")
    assert (found["model"], found["flags"]) == ("One Processor", ["avx2", "avx512f", "avx512_bf16"])
    assert saved.machine(tmp_path / "none")["flags"] == []


def test_a_result_is_dated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved, "RESULTS", tmp_path / "results")
    monkeypatch.setattr("sys.argv", ["x", "--data", "/data/criteo"])
    content = json.loads(saved.save("reader", {"ratio": 0.5}, load=0.1).read_text())
    assert content["command"] == "python -m benchmarks.reader --data criteo"
    assert (content["ratio"], content["machine"]["load_at_start"]) == (0.5, 0.1)


def test_committed_results_have_no_path_of_a_machine() -> None:
    for path in Path(saved.__file__).parent.glob("results/*.json"):
        command = json.loads(path.read_text()).get("command", "")
        assert not [part for part in command.split() if part.startswith("/")], path
