"""``rayfm submit``: what it sends, against a server in the process; and against a real head that asks for a token."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from called import Called, caller
from fake_job_server import FakeClient, server
from ray_head import Head, running_head, write_token
from small_pipeline import PERIODS, write_config

from rayfm.submission.submit import STOP_WAIT


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    from rayfm.submission import server as module

    found = FakeClient(["line one\n", "line two\n"])
    monkeypatch.setattr(module, "connect", lambda address: server(found))
    return found


@pytest.fixture
def submit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Called:
    return caller("submit", monkeypatch, capsys)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In a project whose results lie elsewhere; the command is given in its folder."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return write_config(folder, storage="/mnt/none/data", runs="/mnt/none/runs")


def entrypoint(client: FakeClient) -> list[str]:
    return shlex.split(client.submitted["entrypoint"])


def test_a_job_is_sent_and_followed(submit: Called, client: FakeClient, config: Path) -> None:
    code, out, err = submit(config.name, "--set", "seeds=[1, 2]", "--env", "REGION=eu=1", "--", "--follow")
    assert (code, out) == (0, "line one\nline two\n")
    job = client.submitted["submission_id"]
    assert job.startswith("small-stream-")
    expected = ["python", "-m", "rayfm.cli.jobs", "stream", "small.yaml", "--set", "seeds=[1, 2]", "--follow"]
    assert entrypoint(client) == expected
    assert client.submitted["runtime_env"]["env_vars"] == {STOP_WAIT: "600", "REGION": "eu=1"}
    assert client.submitted["metadata"] == {"rayfm_job": "stream", "rayfm_run": "small"}
    assert {"small.yaml", f"log/{PERIODS[0]}.parquet", "rayfm/cli/jobs.py"} <= client.names
    lines = err.splitlines()
    assert "rayfm among them" in lines[0]
    assert (
        lines[1]
        == f"warning: not sent, but read and written on the cluster's nodes: data.source.path={Path('log').absolute()}"
    )
    assert lines[2] == f"job     {job} on http://ray:8265, Ray 2.60.0"
    assert lines[3].startswith(f"ended   {job} with exit code 0")


def test_the_driver_s_exit_code_is_returned(submit: Called, client: FakeClient, config: Path) -> None:
    client.ending, client.code = "FAILED", 3
    assert submit(config)[0] == 3


def test_without_waiting_the_id_is_all_of_stdout(submit: Called, client: FakeClient, config: Path) -> None:
    code, out, _ = submit(config, "--no-wait", "--job", "train")
    assert (code, out) == (0, client.submitted["submission_id"] + "\n")
    assert client.connections == 0


def test_files_are_named_as_the_package_has_them(submit: Called, client: FakeClient, config: Path, monkeypatch) -> None:
    (config.parent / "sub").mkdir()
    (config.parent / "sub" / "seeds.yaml").write_text("seeds: [5]\n")
    monkeypatch.chdir(config.parent / "sub")
    assert submit("../small.yaml", "--working-dir", "..", "--set", "@seeds.yaml", "--data", "/mnt/none/log")[0] == 0
    assert entrypoint(client)[4:] == ["small.yaml", "--set", "@sub/seeds.yaml", "--data", "/mnt/none/log"]


def test_tables_have_no_config(submit: Called, client: FakeClient, config: Path) -> None:
    code, _, err = submit("all", "--job", "reproduce")
    assert (code, "--folder runs/reproduce is relative" in err) == (1, True)
    assert submit("all", "--job", "reproduce", "--", "--folder", "/mnt/none/tables", "--quick")[0] == 0
    assert entrypoint(client)[3:] == ["reproduce", "all", "--folder", "/mnt/none/tables", "--quick"]
    code, _, err = submit("all", "--job", "reproduce", "--set", "a=1")
    assert (code, "--set and --data are of a config" in err) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["small.yaml", "--job", "trian"], 1, "error: --job: unknown 'trian'; did you mean 'train'?"),
        (["small.yaml", "--env", "A"], 1, "error: --env 'A': write it as NAME=VALUE"),
        (["small.yaml", "--set", "shedule={}"], 1, "error: small.yaml: unknown key 'shedule'; did you mean"),
        (["small.yaml", "--set", "runs=runs"], 1, "error: runs: 'runs' is relative"),
        (["small.yaml", "--working-dir", "log"], 1, "error: config small.yaml is outside the working directory"),
        (["small.yaml", "--job", "evaluate", "--", "--period", "p"], 2, "Missing option '--model'"),
        (["small.yaml", "--job", "label", "--", "--techer", "fm"], 2, "No such option: --techer"),
        (["none.yaml"], 1, "error: cannot read config none.yaml"),
    ],
)
def test_what_is_wrong_is_found_before_anything_is_sent(
    submit: Called, client: FakeClient, config: Path, arguments: list[str], code: int, message: str
) -> None:
    found, _, err = submit(*arguments)
    assert (found, message in err) == (code, True), err
    assert not client.submitted


def test_an_included_file_must_be_sent_too(submit: Called, client: FakeClient, config: Path) -> None:
    (config.parent.parent / "seeds.yaml").write_text("[1, 2]\n")
    config.write_text(config.read_text() + "seeds: {include: ../seeds.yaml}\n")
    code, _, err = submit(config)
    assert code == 1
    assert "seeds.yaml is outside the working directory" in err


def test_help_fits_a_terminal(submit: Called, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = submit("--help")
    assert code == 0
    assert all(len(line) <= 80 for line in out.splitlines())
    assert "Ctrl-C stops the job" in out


# -- a real head ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with running_head(tmp_path_factory.mktemp("token")) as running:
        yield running


COMMAND = """
import sys
from pathlib import Path
from rayfm.submission import collect, connect, follow, submit
from rayfm.submission.submit import runtime_environment

server = connect(sys.argv[1])
job = submit(server, sys.argv[3:], collect(Path(sys.argv[2])), "any", runtime_environment())
write = lambda piece: print(piece, end="", flush=True)
sys.exit(follow(server, job.id, write, lambda line: print(line, file=sys.stderr, flush=True)))
"""
"""Submits any command: the jobs of the command line do not exit with 3."""


def start(head: Head, folder: Path, *command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, head.address, str(folder), *command],
        env=head.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def rayfm(head: Head, folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rayfm.cli.main", "submit", "--address", head.address, *arguments],
        env=head.environment | {"COLUMNS": "80"} | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.timeout(300)
def test_a_part_runs_on_the_cluster(head: Head, tmp_path: Path) -> None:
    """Preparation of a log that travels in the package, into folders of the cluster."""
    project = tmp_path / "project"
    project.mkdir()
    write_config(project, storage=str(tmp_path / "data"), runs=str(tmp_path / "runs"))
    result = rayfm(head, project, "small.yaml", "--job", "prepare", "--set", "data.source.path=log")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "example store" in result.stdout
    assert all(period in result.stdout for period in PERIODS)
    assert {path.name for path in (tmp_path / "data" / "examples").iterdir()} >= {f"period={p}" for p in PERIODS}


@pytest.mark.timeout(300)
def test_the_log_and_the_exit_code_are_the_driver_s(head: Head, tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(
        "import sys, time\nfor number in range(30):\n    print('line', number)\n    time.sleep(0.05)\nsys.exit(3)\n"
    )
    process = start(head, tmp_path, "python", "job.py")
    out, err = process.communicate(timeout=240)
    assert process.returncode == 3, out + err
    assert [line for line in out.splitlines() if line.startswith("line")] == [f"line {n}" for n in range(30)]


@pytest.mark.timeout(300)
def test_ctrl_c_stops_the_job_which_has_time_to_end(head: Head, tmp_path: Path) -> None:
    """Longer than the 3 s after which Ray kills where nobody says otherwise."""
    (tmp_path / "job.py").write_text(
        "import signal, sys, time\n"
        "def end(*_):\n    time.sleep(4)\n    print('saved')\n    sys.exit()\n"
        "signal.signal(signal.SIGTERM, end)\nprint('working')\ntime.sleep(200)\n"
    )
    process = start(head, tmp_path, "python", "job.py")
    assert process.stdout is not None
    for line in process.stdout:
        if line == "working\n":
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 130, out + err
    assert out == "saved\n"
    assert "once more leaves it" in err


@pytest.mark.timeout(300)
def test_without_the_right_token_nothing_is_submitted(head: Head, tmp_path: Path) -> None:
    write_config(tmp_path, storage=str(tmp_path / "data"), runs=str(tmp_path / "runs"))
    cases = {
        "does not know the token": {"RAY_AUTH_TOKEN_PATH": str(write_token(tmp_path / "token"))},
        "asks for a token and was sent none": {"RAY_AUTH_MODE": "disabled"},
        "no token can be read": {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "nowhere"), "HOME": str(tmp_path)},
    }
    for refusal, environment in cases.items():
        result = rayfm(head, tmp_path, "small.yaml", "--job", "prepare", **environment)
        assert result.returncode == 1
        assert refusal in result.stderr
        assert [line for line in result.stderr.splitlines() if line] == [result.stderr.strip()], "one line"
    assert not (tmp_path / "data").exists()
