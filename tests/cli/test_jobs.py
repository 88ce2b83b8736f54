"""The entry points of jobs, in the test's process: arguments in, the command line's function called, an exit code."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_pipeline import write_config

from rayfm.cli.jobs import JOBS, command_line, job
from rayfm.config import LabelError

FOLDER = Path(__file__).resolve().parents[2] / "jobs"

Script = Callable[..., int]


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Runs ``jobs/NAME.py`` in this process; returns its exit code."""

    def run(*arguments: object) -> int:
        path = FOLDER / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        spec = importlib.util.spec_from_file_location("__main__", path)
        assert spec is not None
        assert spec.loader is not None
        with pytest.raises(SystemExit) as end:
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        assert isinstance(end.value.code, int)
        return end.value.code

    return run


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "")  # what a job sets goes with the test
    monkeypatch.setenv("COLUMNS", "80")


def recorded(answer: Any) -> tuple[Callable[..., Any], list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def call(*arguments: Any, **options: Any) -> Any:
        calls.append((arguments, options))
        return answer

    return call, calls


def test_there_is_a_script_for_every_job_and_none_besides() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == set(JOBS)


@pytest.mark.parametrize("name", JOBS)
def test_without_arguments_a_script_says_how_it_is_called(name: str, monkeypatch, capsys) -> None:
    assert script(name, monkeypatch)() == 2
    assert f"ray job submit --working-dir . -- python jobs/{name}.py" in capsys.readouterr().err


@pytest.mark.parametrize("name", JOBS)
def test_help_has_the_job_s_command_and_the_options(name: str, monkeypatch, capsys) -> None:
    assert script(name, monkeypatch)("--help") == 0
    shown = capsys.readouterr().out
    assert f"python jobs/{name}.py" in shown
    assert f"rayfm {JOBS[name].command} [OPTIONS]" in shown


PARTS = {
    "prepare": ([], "prepare", []),
    "train": (["--trainer", "students"], "train", [["students"]]),
    "label": (["--teacher", "fm", "--period", "2024-01-02"], "label", [["fm"], ["2024-01-02"]]),
    "evaluate": (["--model", "vm.none.1", "--period", "p"], "evaluate", ["vm.none.1", ("p",), None]),
}
"""Job -> its arguments, the function, what it is called with after the config."""


@pytest.mark.parametrize("name", PARTS)
def test_a_part_is_the_function_of_the_command_line(name: str, tmp_path: Path, monkeypatch) -> None:
    from rayfm.pipeline import parts

    arguments, function, expected = PARTS[name]
    call, calls = recorded({} if name == "train" else [])
    monkeypatch.setattr(parts, function, call)
    assert script(name, monkeypatch)(write_config(tmp_path), "seeds=[3]", *arguments) == 0
    [((config, *rest), _)] = calls
    assert rest == expected
    assert (config.ray.address, config.seeds) == ("auto", (3,))


def test_the_stream_goes_on_with_a_run_that_stands(tmp_path: Path, capsys, monkeypatch) -> None:
    from rayfm.pipeline import stream

    report = tmp_path / "report.html"
    call, calls = recorded(SimpleNamespace(summary={"metrics": []}, seconds=12.3, report=report, stopped=True))
    monkeypatch.setattr(stream, "run", call)
    config = write_config(tmp_path)
    assert script("stream", monkeypatch)(config, "--follow", "seeds=[3]", "ray.address=10.0.0.1:6379") == 0
    [((found,), options)] = calls
    assert (found.ray.address, found.seeds) == ("10.0.0.1:6379", (3,)), "an address that is given prevails"
    assert (options["resume"], options["follow"], options["overwrite"]) == (True, True, False)
    assert "stopped; go on with" in capsys.readouterr().out


def test_features_are_selected_where_a_selection_was_broken_off(tmp_path: Path, monkeypatch) -> None:
    from rayfm.cli import select

    call, calls = recorded(None)
    monkeypatch.setattr(select, "select_and_show", call)
    assert script("select_features", monkeypatch)(write_config(tmp_path)) == 0
    [((config, resume, overwrite), _)] = calls
    assert (config.ray.address, resume, overwrite) == ("auto", True, False)


def test_the_endpoints_are_served(tmp_path: Path, monkeypatch) -> None:
    from rayfm.cli import serve

    call, calls = recorded(None)
    monkeypatch.setattr(serve, "serve_and_show", call)
    assert script("serve", monkeypatch)(write_config(tmp_path), "--production") == 0
    [((config, production), _)] = calls
    assert (config.ray.address, production) == ("auto", True)


def test_tables_are_reproduced_on_the_cluster(tmp_path: Path, monkeypatch) -> None:
    import os

    from rayfm.cli import reproduced

    call, calls = recorded(None)
    monkeypatch.setattr(reproduced, "reproduce_and_show", call)
    monkeypatch.delenv("RAY_ADDRESS")
    assert script("reproduce", monkeypatch)("one", "two", "--folder", tmp_path, "--quick") == 0
    assert calls == [((["one", "two"], None, None, True, "1,2,3", tmp_path), {})]
    assert os.environ["RAY_ADDRESS"] == "auto", "its studies' configs name no cluster"


def test_a_wrong_config_is_one_line_and_a_failed_job(tmp_path: Path, capsys, monkeypatch) -> None:
    path = write_config(tmp_path, shedule={})
    assert script("stream", monkeypatch)(path) == 1
    assert capsys.readouterr().err == f"error: {path}: unknown key 'shedule'; did you mean 'schedule'?\n"


def test_a_failure_is_one_line_and_a_failed_job(tmp_path: Path, capsys, monkeypatch) -> None:
    from rayfm.pipeline import parts

    def fail(*arguments: object) -> None:
        raise LabelError("no labels; run `rayfm label`")

    monkeypatch.setattr(parts, "train", fail)
    assert script("train", monkeypatch)(write_config(tmp_path)) == 1
    assert capsys.readouterr().err == "error: no labels; run `rayfm label`\n"


def test_an_unknown_option_is_a_failed_job(tmp_path: Path, capsys, monkeypatch) -> None:
    assert script("label", monkeypatch)(write_config(tmp_path), "--techer", "fm") == 2
    assert "No such option: --techer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["c.yaml", "a.b=1", "@f.yaml"], ["c.yaml", "--set", "a.b=1", "--set", "@f.yaml"]),
        (["c.yaml", "--set", "a=1", "--set=b=2"], ["c.yaml", "--set", "a=1", "--set=b=2"]),
        (["k=v.yaml", "runs=/x=y"], ["k=v.yaml", "--set", "runs=/x=y"]),
        (["--data", "logs=1", "c.yaml"], ["--data", "logs=1", "c.yaml"]),
    ],
)
def test_key_value_stands_for_set(given: list[str], expected: list[str]) -> None:
    assert command_line("prepare", given) == ["prepare", "--set", "ray.address=auto", *expected]


def test_a_flag_is_not_followed_by_a_value() -> None:
    assert command_line("stream", ["c.yaml", "--follow", "a=1"])[-4:] == ["--follow", "--set", "a=1", "--resume"]


def test_a_job_by_name_needs_no_script(tmp_path: Path) -> None:
    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "rayfm.cli.jobs", *arguments], capture_output=True, text=True, check=False
        )

    unknown = python("trian")
    assert unknown.returncode == 2
    assert "one of prepare, train, label, stream" in unknown.stderr
    missing = python("train", str(tmp_path / "none.yaml"))
    assert missing.returncode == 1
    assert missing.stderr.startswith(f"error: cannot read config {tmp_path / 'none.yaml'}")


def test_a_bug_is_not_taken_for_a_user_s_error(tmp_path: Path, monkeypatch) -> None:
    from rayfm.pipeline import parts

    def fail(*arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(parts, "prepare", fail)
    with pytest.raises(ZeroDivisionError):
        job("prepare", [str(write_config(tmp_path))])
