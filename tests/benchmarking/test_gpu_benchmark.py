"""The GPU benchmark where there is no GPU: it says so for each part; its parts run on the CPU, in small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch

from benchmarks import gpu, gpu_parts, gpu_training
from benchmarks.data import schema
from rayfm.config import RayfmError

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, and the parts would run")


@without_gpu
def test_every_part_says_why_it_was_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 0
    said = capsys.readouterr().out
    assert "GPUs: none" in said
    assert said.count("not run: torch sees no CUDA device") == len(gpu.PARTS) == 6


@without_gpu
def test_the_command_needs_neither_torchrec_nor_fbgemm_nor_pydantic() -> None:
    """In a process of its own, since this one has them."""
    code = (
        "import sys\n"
        "for name in ('torchrec', 'fbgemm_gpu', 'pydantic', 'pyarrow', 'ray'): sys.modules[name] = None\n"
        "from benchmarks import gpu\n"
        "import torch\n"
        "assert gpu.main([]) == 0\n"
        "from benchmarks.gpu_parts import copies, dense, overlapped\n"
        "cpu = torch.device('cpu')\n"
        "print(dense(cpu, 8, 16, 1), copies(cpu, 1, 1), overlapped(cpu, 8, 16, 3, 1))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "times as fast" in done.stdout


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {part.name: part for part in gpu.PARTS}
    assert gpu.missing(parts["steps"], gpus=1) is None
    assert gpu.missing(parts["exchange"], gpus=1) == "it needs 2 GPUs, and there is 1"
    there = gpu.importlib.util.find_spec
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None if name == "torchrec" else there(name))
    assert gpu.missing(parts["steps"], gpus=1) == "not installed: torchrec"
    assert gpu.missing(parts["dense"], gpus=1) is None


def test_a_part_that_fails_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(device: torch.device) -> gpu.Figures:
        raise RuntimeError("out of memory\nand more")

    parts = (gpu.Part("bad", "fails", (), 1, fails), gpu.Part("good", "runs", (), 1, lambda _: {"x": {"ms": 2.0}}))
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "machine", lambda: {"gpus": ["one"]})
    assert gpu.main([]) == 1
    said = capsys.readouterr().out
    assert "not run: RuntimeError: out of memory\n" in said
    assert "2 ms" in said


def test_a_step_is_timed_on_either_pipeline() -> None:
    for pipeline in ("none", "sparse_dist"):
        for precision in ("fp32", "bf16"):
            found = gpu_training.step_rate(CPU, schema(2), 16, 4, pipeline=pipeline, precision=precision)
            assert found["rows/s"] == pytest.approx(16 / found["ms"] * 1e3)


def test_memories_of_a_gpu_are_refused_without_one() -> None:
    with pytest.raises((RayfmError, ValueError), match="table_memory of all tables is beside a GPU's"):
        gpu_training.step_rate(CPU, schema(2), 16, 4, table_memory={"kind": "uvm"})


def test_workers_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.multiprocessing, "spawn", processes.start)
    found = gpu_training.exchange("cpu", 2, rows=8, count=3, sparse=2)
    assert found.keys() == {"none", "sparse_dist"}
    assert all(values["rows/s"] > 0 for values in found.values())


def test_the_cross_network_is_the_models() -> None:
    from rayfm.models.dcnv2 import CrossNetwork

    ours, theirs = gpu_parts.Cross(8, 2), CrossNetwork(8, 2)
    ours.load_state_dict(theirs.state_dict())
    x_BI = torch.randn(5, 8)
    assert torch.equal(ours(x_BI), theirs(x_BI))
