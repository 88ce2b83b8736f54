"""bfloat16 on a processor that has no products of it: said once a run, never an error."""

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
from rayfm.training.precision import has_bf16_products, precision_warning, processor_flags, warn_of_precision
from rayfm.training.trainer import fit_here

SKYLAKE = "processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu fma avx2 avx512f avx512_vnni\npower management:\n"
ZEN4 = SKYLAKE.replace("avx512_vnni", "avx512_vnni avx512_bf16")
GRAVITON2 = "processor\t: 0\nBogoMIPS\t: 243.75\nFeatures\t: fp asimd asimdhp asimddp\n"
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("cpuinfo", "has"),
    [
        (SKYLAKE, False),
        (ZEN4, True),
        (SKYLAKE.replace("avx512_vnni", "amx_bf16 amx_tile"), True),
        (SKYLAKE.replace("avx512_vnni", "amx_tile amx_int8 avx_ne_convert"), False),
        (GRAVITON2, False),
        (GRAVITON2.replace("asimddp", "asimddp i8mm bf16"), True),
    ],
)
def test_what_a_processors_flags_say(cpuinfo: str, has: bool) -> None:
    assert has_bf16_products(processor_flags(cpuinfo)) is has


def test_only_the_first_processors_flags_are_read_and_none_is_none() -> None:
    assert processor_flags(SKYLAKE + ZEN4) == {"fpu", "fma", "avx2", "avx512f", "avx512_vnni"}
    assert processor_flags("processor : 0\n") == frozenset()


def test_who_is_warned_and_with_which_key(tmp_path: Path) -> None:
    changes = {"groups": {"students": {"precision": "bf16"}}, "teachers": {"fm": {"training": {"precision": "bf16"}}}}
    config = small_pipeline(tmp_path, **changes)
    (student,), teacher = student_specs(config, PERIODS), teacher_spec(config, "fm", PERIODS)
    old, new = processor_flags(SKYLAKE), processor_flags(ZEN4)
    said = precision_warning(teacher, CPU, old)
    assert said is not None
    assert said.startswith("teachers.fm.training.precision is bf16, and the processor that trains has no bf16 products")
    assert said.endswith("take precision: fp32, or workers that have them")
    assert (precision_warning(student, CPU, old) or "").startswith("groups.students.precision is bf16")
    assert precision_warning(student, CPU, new) is None
    assert precision_warning(student, CPU, frozenset()) is None, "where flags are not known, nothing is claimed"
    assert precision_warning(student, torch.device("cuda", 0), old) is None
    plain = student.model_copy(update={"training": student.training.model_copy(update={"precision": "fp32"})})
    assert precision_warning(plain, CPU, old) is None


def test_it_is_said_once_a_run_by_worker_and_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = small_pipeline(tmp_path, groups={"students": {"precision": "bf16"}})
    specs = [teacher_spec(config, "fm", PERIODS), *student_specs(config, PERIODS)]
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(SKYLAKE)
    records = RunRecords(config, specs, Tickets(SQLiteMetadataStore(metadata_path(config.run_dir)), config.name))
    assert records.warnings() == []
    with caplog.at_level(logging.WARNING):
        for _ in range(2):  # a group that is started again
            for spec in specs:
                warn_of_precision(spec, CPU, cpuinfo)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("groups.students.precision is bf16")
    assert records.warnings() == [said]
    assert records.warnings() == []
    warn_of_precision(specs[1], CPU, tmp_path / "none")  # a system without /proc


def test_the_loop_trains_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_store(tmp_path / "store", list(runs.PERIODS[:1]), impressions=200)
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(SKYLAKE)
    monkeypatch.setattr("rayfm.training.precision.CPUINFO", cpuinfo)
    spec = runs.spec(tmp_path / "store", tmp_path / "run", runs.learner("dcnv2"), precision="bf16")
    fit_here(spec.model_copy(update={"periods": runs.PERIODS[:1]}), runs.Free())
    assert "bf16 products" in (spec.folder / "warnings" / "precision.txt").read_text()
    assert (spec.folder / "periods" / f"{runs.PERIODS[0]}.json").exists()
