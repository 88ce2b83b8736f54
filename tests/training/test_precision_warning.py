"""bfloat16 on a processor that is slower with it: said once a run, never an error."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import training_runs as runs
from example_store import write_store
from small_pipeline import PERIODS, small_pipeline

from rayfm.pipeline.plan import student_specs, teacher_spec
from rayfm.pipeline.records import RunRecords
from rayfm.pipeline.tickets import Tickets, metadata_path
from rayfm.snapshots import SQLiteMetadataStore
from rayfm.training import precision
from rayfm.training.precision import bf16_speedup, warn_of_precision
from rayfm.training.spec import TrainerSpec
from rayfm.training.trainer import fit_here

CPU = torch.device("cpu")


def measured(monkeypatch: pytest.MonkeyPatch, speedup: float) -> list[float]:
    """This processor multiplies so many times as fast in bfloat16; each time that it is asked."""
    asked: list[float] = []

    def speed() -> float:
        asked.append(speedup)
        return speedup

    monkeypatch.setattr(precision, "bf16_speedup", speed)
    return asked


def said_of(spec: TrainerSpec) -> str | None:
    path = spec.folder / "warnings" / "precision.txt"
    return path.read_text() if path.exists() else None


def test_a_slower_kind_of_product_is_found_by_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten products in place of one stand for a processor that emulates; whatever this one has, that is slower."""
    multiply = torch.mm
    times = {torch.float32: 1, torch.bfloat16: 1}

    def repeated(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        for _ in range(times[rows.dtype] - 1):
            multiply(rows, weights)
        return multiply(rows, weights)

    monkeypatch.setattr(torch, "mm", repeated)
    plain = bf16_speedup()
    times[torch.bfloat16] = 10
    assert bf16_speedup() < plain / 3
    times |= {torch.float32: 10, torch.bfloat16: 1}
    assert bf16_speedup() > plain * 3


@pytest.mark.parametrize(("speedup", "warned"), [(0.5, True), (0.94, True), (0.96, False), (3.0, False)])
def test_who_is_warned_and_with_which_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speedup: float, warned: bool
) -> None:
    asked = measured(monkeypatch, speedup)
    changes = {"groups": {"students": {"precision": "bf16"}}, "teachers": {"fm": {"training": {"precision": "bf16"}}}}
    config = small_pipeline(tmp_path, **changes)
    specs = {
        "groups.students": student_specs(config, PERIODS)[0],
        "teachers.fm.training": teacher_spec(config, "fm", PERIODS),
    }
    for key, spec in specs.items():
        warn_of_precision(spec, CPU)
        said = said_of(spec)
        assert (said is not None) is warned
        if said is not None:
            assert said.startswith(f"{key}.precision is bf16, and the processor that trains multiplies bfloat16 at ")
            assert f"at {speedup:.2g} times the speed of float32; take precision: fp32" in said
    assert len(asked) == 2


def test_a_gpu_and_fp32_are_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = measured(monkeypatch, 0.5)
    (student,) = student_specs(small_pipeline(tmp_path, groups={"students": {"precision": "bf16"}}), PERIODS)
    warn_of_precision(student, torch.device("cuda", 0))
    plain = student.model_copy(update={"training": student.training.model_copy(update={"precision": "fp32"})})
    warn_of_precision(plain, CPU)
    assert not asked
    assert said_of(student) is None


def test_it_is_said_once_a_run_by_worker_and_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    measured(monkeypatch, 0.5)
    config = small_pipeline(tmp_path, groups={"students": {"precision": "bf16"}})
    specs = [teacher_spec(config, "fm", PERIODS), *student_specs(config, PERIODS)]
    records = RunRecords(config, specs, Tickets(SQLiteMetadataStore(metadata_path(config.run_dir)), config.name))
    assert records.warnings() == []
    with caplog.at_level(logging.WARNING):
        for _ in range(2):  # a group that is started again
            for spec in specs:
                warn_of_precision(spec, CPU)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("groups.students.precision is bf16")
    assert records.warnings() == [said]
    assert records.warnings() == []


def test_the_loop_trains_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, 0.5)
    write_store(tmp_path / "store", list(runs.PERIODS[:1]), impressions=200)
    spec = runs.spec(tmp_path / "store", tmp_path / "run", runs.learner("dcnv2"), precision="bf16")
    fit_here(spec.model_copy(update={"periods": runs.PERIODS[:1]}), runs.Free())
    assert "multiplies bfloat16" in (said_of(spec) or "")
    assert (spec.folder / "periods" / f"{runs.PERIODS[0]}.json").exists()
