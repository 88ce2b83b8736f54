"""The figures of this machine that `benchmarks.plan` measures: that they are taken up, not what they are."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from benchmarks import plan
from rayfm.planning.hardware import load_hardware


def test_seconds_are_of_one_call():
    def busy() -> None:
        end = time.process_time() + 0.02
        while time.process_time() < end:
            pass

    assert plan.seconds(busy, 2) == pytest.approx(0.02, rel=0.5)


def test_figures_of_this_machine_are_written_and_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plan, "product_flops", lambda dtype: 3e12 if dtype == torch.bfloat16 else 1e12)
    monkeypatch.setattr(plan, "lookup_bandwidth", lambda: 4e9)
    monkeypatch.setattr(plan, "operator_seconds", lambda: 2e-6)
    file = tmp_path / "cpu.yaml"
    plan.write(file, plan.calibrate())
    found = load_hardware("cpu", file)
    assert (found.device, found.memory_gbs, found.operator_us) == ("cpu", 4, pytest.approx(2))
    assert (found.peak_flops("bf16"), found.peak_flops("tf32"), found.peak_flops("fp32")) == (3e12, 1e12, 1e12)
    assert found.compute_efficiency == found.memory_efficiency == 1


def test_rates_are_work_over_seconds(monkeypatch: pytest.MonkeyPatch):
    calls: list[int] = []

    def half_a_second(work: object, times: int) -> float:
        work()  # type: ignore[operator]
        calls.append(times)
        return 0.5

    monkeypatch.setattr(plan, "seconds", half_a_second)
    assert plan.product_flops(torch.float32, rows=4, inputs=8, outputs=2) == 3 * 2 * 4 * 8 * 2 / 0.5
    # 10 ids of 8 bytes, 10 rows and 10 vectors of 4 columns.
    assert plan.lookup_bandwidth(rows=100, columns=4, ids=10) == 10 * (8 + 16 + 16) / 0.5
    assert plan.operator_seconds() == 0.5
    assert len(calls) == 3
