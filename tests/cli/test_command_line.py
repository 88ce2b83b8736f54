from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
import yaml
from rich.console import Console
from small_pipeline import PERIODS, mapping, write_config
from typer.testing import CliRunner

from rayfm.cli import display, doctor
from rayfm.cli.main import app, main
from rayfm.labels.store import LabelStore
from rayfm.pipeline.config import PipelineConfig
from rayfm.schema import Task
from rayfm.snapshots import SnapshotStore
from rayfm.snapshots.publish import publish

HEAVY = ("torch", "ray", "pandas", "pyarrow", "numpy", "torchrec", "matplotlib", "rayfm.pipeline")


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch):
    console = Console(width=80)
    monkeypatch.setattr(display, "console", console)
    monkeypatch.setattr(doctor, "console", console)
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def rayfm(monkeypatch, capsys) -> Callable[..., SimpleNamespace]:
    """Run the entry point in this process: exit code, stdout, stderr."""

    def call(*arguments: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["rayfm", *map(str, arguments)])
        code: object = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return call


def run_in_fresh_process(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True, timeout=60
    ).stdout


def test_help_imports_nothing_heavy():
    found = run_in_fresh_process(
        f"""
        import contextlib, io, sys
        from rayfm.cli.main import app
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
            app(["--help"])
        assert "Train large recommender teachers" in out.getvalue()
        print([name for name in {HEAVY!r} if name in sys.modules])
        """
    )
    assert found.strip() == "[]"


@pytest.mark.parametrize(
    "command", ["run", "prepare", "train", "label", "evaluate", "report", "list", "doctor", "config", "snapshots"]
)
def test_each_command_has_help_in_80_columns(command):
    result = CliRunner().invoke(app, [command, "--help"], terminal_width=80)
    assert result.exit_code == 0
    assert all(len(line) <= 80 for line in result.output.splitlines())


def test_an_unknown_key_is_one_line_with_the_nearest(tmp_path, rayfm):
    path = write_config(tmp_path, shedule={"warmup": 1})
    result = rayfm("config", "check", path)
    assert result.code == 1
    assert result.out == ""
    assert result.err == f"error: {path}: unknown key 'shedule'; did you mean 'schedule'?\n"


def test_every_complaint_is_shown(tmp_path, rayfm):
    path = write_config(tmp_path, shedule={"warmup": 1}, sedes=[1])
    result = rayfm("config", "check", path)
    assert result.code == 1
    assert [line.split(": ")[0] for line in result.err.splitlines()] == ["error", "error"]
    assert "Traceback" not in result.err


def test_debug_shows_the_traceback(tmp_path):
    path = write_config(tmp_path, shedule={"warmup": 1})
    command = [sys.executable, "-m", "rayfm.cli.main", "config", "check", str(path), "--debug"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "COLUMNS": "80"})
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert "did you mean 'schedule'?" in done.stderr


def test_a_missing_file_is_one_line(tmp_path, rayfm):
    result = rayfm("run", tmp_path / "nowhere.yaml")
    assert result.code == 1
    assert result.err.startswith("error: cannot read config")
    assert len(result.err.splitlines()) == 1


def test_config_check_prints_what_is_in_force(tmp_path, rayfm):
    path = write_config(tmp_path)
    result = rayfm("config", "check", path, "--set", "seeds=[4, 5]", "--data", tmp_path / "log")
    assert result.code == 0
    found = PipelineConfig.model_validate(yaml.safe_load(result.out))
    assert found.seeds == (4, 5)
    assert found.serving.replicas == 1, "defaults included"


def test_a_wrong_override_is_one_line(tmp_path, rayfm):
    result = rayfm("config", "check", write_config(tmp_path), "--set", "seeds")
    assert (result.code, result.err) == (1, "error: --set 'seeds': write it as a.b=value\n")


def test_config_schema_is_json_schema(tmp_path, rayfm):
    result = rayfm("config", "schema")
    assert result.code == 0
    schema = json.loads(result.out)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads(json.dumps(mapping(tmp_path))), schema)


def test_list_shows_what_a_config_can_name(rayfm):
    result = rayfm("list")
    assert result.code == 0
    for kind, name in (
        ("model", "dcnv2"),
        ("model", "two_tower"),
        ("objective", "auxiliary_head"),
        ("source", "kuairand"),
        ("source", "simulator"),
    ):
        assert any(line.split()[:2] == [kind, name] for line in result.out.splitlines()), (kind, name)
    assert all(len(line) <= 80 for line in result.out.splitlines())
    models = rayfm("list", "models").out
    assert "dcnv2" in models
    assert "auxiliary_head" not in models


def test_list_of_something_else(rayfm):
    result = rayfm("list", "modles")
    assert (result.code, result.err) == (1, "error: cannot list 'modles'; did you mean 'models'?\n")


@pytest.fixture
def machine(monkeypatch):
    """A machine on which only the config decides."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=8e9, total=16e9))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=1e9))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def test_doctor_of_a_config_that_fits(tmp_path, machine, rayfm):
    result = rayfm("doctor", write_config(tmp_path))
    assert result.code == 0, result.out
    lines = [line.split() for line in result.out.splitlines()]
    assert all(line[0] == "ok" for line in lines)
    assert ["ok", "plan", "1.75", "CPUs", "of", "4"] in lines
    assert ["ok", "source", "3", "periods,", "2", "of", "them", "tested"] in lines
    assert ["ok", "cores", "4"] in lines
    assert all(len(line) <= 80 for line in result.out.splitlines())
    assert not (tmp_path / "runs").exists(), "it looks, and makes nothing"


def test_doctor_of_a_config_that_does_not(tmp_path, machine, rayfm):
    path = write_config(tmp_path, groups={"students": {"workers": 16}}, schedule={"warmup": 3})
    result = rayfm("doctor", path)
    assert result.code == 1
    text = " ".join(result.out.split())
    assert "the plan needs 9.25 CPUs at once and Ray has 4: 0.5 trainer fm (1 x 0.5)" in text
    assert "8 trainer students (16 x 0.5)" in text
    assert "warmup 3 leaves no test period of the 3 there are" in text
    assert all(len(line) <= 80 for line in result.out.splitlines())


def test_doctor_finds_a_version_that_was_not_tested(machine, rayfm, monkeypatch):
    monkeypatch.setitem(doctor.PINNED, "ray", "1.0.0")
    result = rayfm("doctor")
    assert result.code == 1
    bad = [line for line in result.out.splitlines() if line.startswith("bad")]
    assert len(bad) == 1
    assert "tested with 1.0.0" in bad[0]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """What a run leaves, as far as snapshots and labels go."""
    folder = tmp_path_factory.mktemp("cli") / "a-run-with-a-rather-long-name"
    for model in ("fm.teacher.0", "two_tower_retrieval.auxiliary_and_adapter.1"):
        for period in PERIODS[:2]:
            publish(
                folder, model, f"{period}-0123abcd", {"w": torch.ones(4, 4)}, trained_through=period, tasks=("click",)
            )
    lanes = [
        (kind, lane, pa.table({"example_id": np.arange(10), "click": np.full(10, 0.5, np.float32)}))
        for kind in ("impression", "consideration")
        for lane in range(4)
    ]
    for before, period in itertools.pairwise(PERIODS):
        LabelStore(folder).label("fm", f"{before}-0123abcd", before, period, lanes, [Task(name="click")])
    return folder


def test_snapshots_are_listed(run_dir, rayfm):
    result = rayfm("snapshots", "list", run_dir)
    assert result.code == 0
    rows = [line.split() for line in result.out.splitlines()]
    assert ["fm.teacher.0", "2024-01-01-0123abcd", "2024-01-01", "0.0"] in rows
    assert sum("2024-01-02-0123abcd" in line for line in result.out.splitlines()) == 2
    table = result.out[result.out.index("model ") :]
    assert all(len(line) <= 80 for line in table.splitlines())


def test_a_snapshot_is_shown(run_dir, rayfm):
    shown = json.loads(rayfm("snapshots", "show", run_dir, "fm.teacher.0").out)
    assert (shown["version"], shown["trained_through"]) == ("2024-01-02-0123abcd", "2024-01-02"), "the newest"
    shown = json.loads(rayfm("snapshots", "show", run_dir, "fm.teacher.0", "2024-01-01-0123abcd").out)
    assert shown["version"] == "2024-01-01-0123abcd"


def test_what_is_not_published_is_one_line(run_dir, rayfm):
    result = rayfm("snapshots", "show", run_dir, "fm.techer.0")
    assert result.code == 1
    assert result.err == "error: unknown published model 'fm.techer.0'; did you mean 'fm.teacher.0'?\n"
    result = rayfm("snapshots", "show", run_dir, "fm.teacher.0", "v9")
    assert result.code == 1
    assert "fm.teacher.0@v9 is not published" in result.err
    assert len(result.err.splitlines()) == 1


def test_snapshots_are_verified(run_dir, tmp_path, rayfm):
    assert rayfm("snapshots", "verify", run_dir).out == "4 versions are intact\n"
    publish(tmp_path, "fm", "v1", {"w": torch.ones(4, 4)})
    (file,) = SnapshotStore(tmp_path).folder("fm", "v1").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    result = rayfm("snapshots", "verify", tmp_path)
    assert result.code == 1
    assert "bytes differ from the manifest of snapshot fm@v1" in result.err


def test_labels_are_listed_by_teacher_period_and_version(run_dir, rayfm):
    result = rayfm("labels", "list", run_dir)
    assert result.code == 0
    rows = [line.split() for line in result.out.splitlines()[-2:]]
    assert rows == [
        ["fm", "2024-01-02", "2024-01-01-0123abcd", "80"],
        ["fm", "2024-01-03", "2024-01-02-0123abcd", "80"],
    ]


@pytest.mark.parametrize("command", [("snapshots", "list"), ("snapshots", "verify"), ("labels", "list"), ("report",)])
def test_a_folder_that_is_not_there_is_one_line(tmp_path, rayfm, command):
    result = rayfm(*command, tmp_path / "nowhere")
    assert result.code == 1
    assert result.err.startswith("error: ")
    assert "nowhere" in result.err
    assert len(result.err.splitlines()) == 1
    assert not (tmp_path / "nowhere").exists()


def test_a_log_gets_lines_of_progress_in_place_of_bars(capsys, tmp_path):
    first, second = (
        SimpleNamespace(name="fm", role="teacher", periods=("1", "2")),
        SimpleNamespace(name="students", role="students", periods=("2",), learners=()),
    )
    config = PipelineConfig.model_validate(mapping(tmp_path))
    watch = SimpleNamespace(
        pipeline=SimpleNamespace(follow=False, periods=("1", "2"), specs=[first, second]),
        prepared=1,
        trained={"fm": (0.5, "train 1"), "students": (0.0, "starting")},
        labelled={"fm": (0, 1)},
    )
    with display.Display(config, interval_s=0) as shown:
        shown.update(watch)
        shown.update(watch)
        watch.trained["students"] = (1.0, "")
        shown.update(watch)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("0 s: ")]
    assert lines == [
        "0 s: prepare 1/2, train fm 0.5/2, label fm 0/1, train students 0/1",
        "0 s: prepare 1/2, train fm 0.5/2, label fm 0/1, train students 1/1",
    ]


@pytest.mark.parametrize("module", ["rayfm.data.span", "rayfm.serving.lane_task", "rayfm.training.worker"])
def test_what_ray_loads_in_processes_that_use_no_torch_does_not_load_it(module):
    """Tasks of Ray Data, and Ray Train's controllers: each is a process, and torch with TorchRec is 4 s of it."""
    found = run_in_fresh_process(f"import sys, {module}; print([n for n in ('torch', 'torchrec') if n in sys.modules])")
    assert found.strip() == "[]"
