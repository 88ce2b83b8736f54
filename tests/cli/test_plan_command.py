"""``rayfm plan`` on a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from called import caller
from rich.console import Console
from small_pipeline import small_pipeline, write_config

from rayfm.cli import display
from rayfm.cli.plan import gigabytes, ranks, trained_models


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run ``rayfm plan``: exit code, stdout, stderr."""
    monkeypatch.setattr(display, "console", Console(width=80))
    return caller("plan", monkeypatch, capsys)


def test_a_teachers_plan(tmp_path: Path, planned: Callable[..., tuple[int, str, str]]) -> None:
    path = write_config(tmp_path)
    code, out, err = planned(path, "--nodes", 2, "--gpus-per-node", 4, "--gpu", "a100", "--batch-size", 128)
    assert (code, err) == (0, "")
    assert all(len(line) <= 80 for line in out.splitlines())
    said = " ".join(out.split())
    assert "fm on 2 x 4 a100 (8 ranks)" in said
    assert "batch 128 a GPU, 1,024 in all; dense part fp32" in said
    for name in small_pipeline(tmp_path).schema_.tables:
        assert f"\n{name} " in out
    for part in ("activations", "embedding look-up", "gradients, backward", "dense all-reduce", "Bottleneck: "):
        assert part in out
    assert "19.5 TFLOP/s fp32 at 40%" in said
    assert "network 25" in said
    assert "never compared with GPUs" in said


def test_the_configs_own_batch_is_split_over_its_workers(
    tmp_path: Path, planned: Callable[..., tuple[int, str, str]]
) -> None:
    _, out, _ = planned(write_config(tmp_path), "--gpus-per-node", 1, "--set", "teachers.fm.training.workers=4")
    assert "batch 4 a GPU, 4 in all" in out


def test_scale_and_precision(tmp_path: Path, planned: Callable[..., tuple[int, str, str]]) -> None:
    path = write_config(tmp_path)
    once, twice = (planned(path, "--scale", scale, "--precision", "bf16")[1] for scale in (1, 2))
    assert "dense part bf16" in once
    assert once.splitlines()[1].startswith("1.6k parameters in 4 tables")
    assert twice.splitlines()[1].startswith("3.2k parameters in 4 tables")


def test_a_group_trains_a_model_for_each_variant_and_seed(tmp_path: Path) -> None:
    config = small_pipeline(tmp_path)
    name, learners, training = trained_models(config, "students", 2.0)
    assert (name, training) == ("students", config.groups["students"])
    assert [(one.name, one.tasks, one.copies, one.model.scale) for one in learners] == [
        ("vm", ("click",), 2 * len(config.seeds), 2.0)
    ]
    assert trained_models(config, None, 1.0)[0] == "fm"


def test_own_hardware(tmp_path: Path, planned: Callable[..., tuple[int, str, str]]) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump({"ours": {"base": "h100", "network_gbs": 12.5}}))
    _, out, _ = planned(write_config(tmp_path), "--gpu", "ours", "--hardware", file, "--gpu-set", "memory_gb=40")
    assert "network 12.5" in " ".join(out.split())
    assert "of 40, 15% reserved" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "h1000"], "error: --gpu 'h1000' is not known"),
        (["--batch-size", 0], "error: --batch-size is 0"),
        (["--nodes", 0], "error: --nodes is 0"),
        (["--scale", 0], "error: --scale is 0"),
        (["--precision", "fp8"], "error: --precision 'fp8' is not known"),
        (["--trainer", "student"], "error: --trainer 'student' is not in the config; did you mean 'students'?"),
        (["--gpu-set", "memory_gb=0.0001"], "error: the part that every device holds"),
    ],
)
def test_bad_input_is_one_line(
    options: list[object], message: str, tmp_path: Path, planned: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, err = planned(write_config(tmp_path), *options)
    assert code == 1
    assert err.startswith(message)


def test_short_forms() -> None:
    assert [gigabytes(size) for size in (1.23456e7, 9.8765e9, 1.23456e13)] == ["0.0123", "9.88", "12,345.6"]
    assert ranks([0, 1], 2) == "all"
    assert ranks([], 1) == "0"
    assert ranks([5, 3, 3], 8) == "3,5"
    assert ranks([0, 1, 2, 3, 4], 8) == "5 of 8"


def test_tables_on_the_host_are_said_with_what_is_assumed(
    tmp_path: Path, planned: Callable[..., tuple[int, str, str]]
) -> None:
    path, gpu = write_config(tmp_path), ("--set", "teachers.fm.training.gpus_per_worker=1")
    plain = planned(path, *gpu)[1]
    assert "cache of rows" not in plain
    assert "rows of the host" not in plain
    code, out, err = planned(path, *gpu, "--set", "teachers.fm.training.table_memory.kind=uvm_caching")
    assert code == 0, err
    for line in ("cache of rows", "rows of the host", "tables, a node's host", "of 2000"):
        assert line in out, line
    assert ", 20% cached" in out
    flat = " ".join(out.split())
    assert "host memory 2,000 GB a node; cache hits 72% at 20% of the rows (ids after Zipf's law, exponent 0.8:" in flat
    assert "cache hits" not in planned(path, *gpu, "--set", "teachers.fm.training.table_memory.kind=uvm")[1]
