from __future__ import annotations

import pyarrow as pa
import pytest
import servers
from typer.testing import CliRunner

from rayfm.cli.nearline import app
from rayfm.config import ConfigError, DataError, SnapshotError
from rayfm.serving.nearline.config import load_nearline
from rayfm.serving.nearline.doorbell import Doorbell
from rayfm.serving.nearline.spool import ROW, Spool

ROWS = pa.table({"example_id": [7, 8], ROW: [0, 1]})


@pytest.fixture
def file(tmp_path, redis_server):
    path = tmp_path / "near.yaml"
    path.write_text(
        f"run: {tmp_path.name}\nteacher: fm\nroot: {tmp_path}\nmodel: fm.teacher.0\n"
        f"redis: redis://{redis_server.address}/0\n"
    )
    return path


@pytest.fixture
def spool(tmp_path, file):
    return Spool(tmp_path, "fm")


def run(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_status_counts_what_there_is(file, spool):
    assert "waiting       0 tickets" in run("status", file)
    spool.accept(ROWS, "v1", ROWS.append_column("reason", pa.array(["a", "b"])))
    spool.bury(spool.accept(ROWS, "v1"), "broken")
    lines = run("status", file).splitlines()
    assert lines[0] == "waiting       1 tickets"
    assert lines[1].startswith("oldest        20")
    assert lines[2:] == [
        "queue         0 messages",
        "dead letters  1 tickets",
        "rejects       2 rows",
        "label table   none yet",
    ]


def test_status_says_that_redis_is_down(file, spool):
    lines = [line for line in file.read_text().splitlines() if not line.startswith("redis")]
    file.write_text("\n".join([*lines, f"redis: redis://127.0.0.1:{servers.free_port()}/0"]))
    output = run("status", file)
    assert "does not answer" in output
    assert "dead letters  0 tickets" in output


def test_dead_letters_are_listed_exported_replayed_and_discarded(file, spool, tmp_path):
    dead = [spool.accept(ROWS, "v1") for _ in range(3)]
    for ticket in dead:
        spool.bury(ticket, "no such id")
    lines = run("dead-letters", file, "--export", tmp_path / "out").splitlines()
    assert lines == [*(f"{ticket}  2 rows  no such id" for ticket in sorted(dead)), "3 dead letters"]
    kept = pa.ipc.open_file(tmp_path / "out" / f"{dead[0]}.arrow").read_all()
    assert kept.to_pydict() == ROWS.to_pydict(), "the original rows"

    assert run("replay", file, dead[0]) == "1 dead letters queued\n"
    doorbell = Doorbell(load_nearline(file))
    assert doorbell.waiting() == 1
    doorbell.close()
    assert spool.status(dead[0]).state == "queued"
    assert run("replay", file, dead[1], "--discard") == "1 dead letters discarded\n"
    assert spool.status(dead[1]) is None
    assert run("replay", file) == "1 dead letters queued\n"
    assert spool.dead_letters() == []


def test_what_cannot_be_done_says_why(file, spool, monkeypatch):
    spool.bury(spool.accept(ROWS, "v1"), "no such id")
    with pytest.raises(ConfigError, match="name the tickets"):
        run("replay", file, "--discard")
    with pytest.raises(SnapshotError, match="is not published"):
        run("replay", file, "--version", "v9")
    with pytest.raises(DataError, match="no dead letter of teacher 'fm'"):
        run("replay", file, "0" * 32)
    with pytest.raises(SnapshotError, match="no snapshot of"):
        run("serve", file)
    monkeypatch.delenv("RAYFM_TOKEN", raising=False)
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0 can be reached from other machines and needs a token"):
        run("serve", file, "--host", "0.0.0.0")
    assert len(spool.dead_letters()) == 1
    assert run("compact", file, "--period", "2024-01-31") == "0 files joined\n"


def test_the_commands_are_rayfms():
    from rayfm.cli.main import app as rayfm

    result = CliRunner().invoke(rayfm, ["nearline", "--help"])
    assert result.exit_code == 0
    for command in ("serve", "status", "dead-letters", "replay", "compact"):
        assert command in result.output
