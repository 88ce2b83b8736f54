from __future__ import annotations

import contextlib
import json
import uuid
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from rayfm.cli.snapshots import app
from rayfm.config import RayfmError
from rayfm.pipeline.tickets import metadata_path
from rayfm.snapshots import Collector, SnapshotStore, SQLiteMetadataStore, Updater, open_metadata, read_current
from rayfm.snapshots.current import TRIES
from rayfm.snapshots.publish import publish

MODEL = "fm.teacher.0"
VERSIONS = [f"2024-01-0{day}-0123abcd" for day in range(1, 6)]


class Rayfm:
    def __call__(self, *arguments: object, fails: bool = False):
        result = CliRunner().invoke(app, list(map(str, arguments)), terminal_width=120)
        assert isinstance(result.exception, RayfmError) == fails, result.output or result.exception
        return str(result.exception) if fails else result


@pytest.fixture
def rayfm(monkeypatch) -> Rayfm:
    from rayfm.cli import display

    monkeypatch.setattr(display.console, "_width", 140)
    return Rayfm()


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "run"
    for version in VERSIONS[:3]:
        publish(folder, MODEL, version, {"w": torch.ones(2)}, trained_through=version[:10])
    return folder


@pytest.fixture(params=["the run's", "zookeeper"])
def options(request, run) -> list[str]:
    """What names the metadata store."""
    if request.param == "the run's":
        return []
    server = request.getfixturevalue("zookeeper_server")
    return ["--metadata", f"zookeeper://{server.address}/cli/{uuid.uuid4().hex}"]


def opened(run: Path, options: list[str]):
    return open_metadata(options[1]) if options else SQLiteMetadataStore(metadata_path(run))


def corrupt(run: Path, version: str) -> None:
    (path,) = SnapshotStore(run).folder(MODEL, version).glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_versions_are_pinned_rolled_back_and_listed(run, options, rayfm):
    with contextlib.closing(opened(run, options)) as metadata:
        collector = Collector(SnapshotStore(run), metadata)
        updater = Updater(collector, MODEL, "replica 1")
        updater.step()
        assert f"{VERSIONS[2]}       2024-01-03  0.0  current" in " ".join(
            rayfm("list", run, *options).output.split(" ")
        )
        said = rayfm("rollback", run, MODEL, "--reason", "bad calibration", *options).output
        assert said == f"{MODEL}@{VERSIONS[1]} is current; versions up to {VERSIONS[2]} stay out\n"
        lease = collector.hold(MODEL, VERSIONS[1], "a label job", 60.0)
        shown = rayfm("show", run, MODEL, VERSIONS[1], *options)
        assert json.loads(shown.stdout)["version"] == VERSIONS[1]
        assert "bad calibration" in shown.stderr
        assert f"held by a label job (lease {lease.token})" in shown.stderr
        lines = rayfm("list", run, *options).output.splitlines()
        assert [line.split("0.0")[1].strip() for line in lines[-3:]] == ["", "current; held by 1", "rolled back"]
        metadata.release(lease)

        said = rayfm("pin", run, MODEL, VERSIONS[0], *options).output
        assert said == f"{MODEL}@{VERSIONS[0]} is current, pinned\n"
        assert read_current(metadata, MODEL).pinned
        assert not updater.step()
        assert "is current; versions up to" in rayfm("unpin", run, MODEL, *options).output
        publish(run, MODEL, VERSIONS[3], {"w": torch.ones(2)})
        assert updater.step()
        assert read_current(metadata, MODEL).version == VERSIONS[3]
    assert "not pinned" in rayfm("unpin", run, MODEL, *options, fails=True)
    assert "is not older" in rayfm("rollback", run, MODEL, "--to", VERSIONS[3], *options, fails=True)


def test_a_refused_version_is_shown_and_readmitted_once_it_is_intact(run, options, rayfm):
    corrupt(run, VERSIONS[2])
    with contextlib.closing(opened(run, options)) as metadata:
        updater = Updater(Collector(SnapshotStore(run), metadata), MODEL, "replica 1")
        updater.step()
        assert "failed for 1 of 3 updaters" in rayfm("list", run, *options).output
        for number in range(2, TRIES + 1):
            (pause,) = metadata.leases("snapshots/pauses/")
            metadata.release(pause)  # as when it has ended
            Updater(updater.collector, MODEL, f"replica {number}").step()
        assert rayfm("list", run, *options).output.splitlines()[-1].endswith("refused")
        assert "last by replica 3: " in rayfm("show", run, MODEL, *options).stderr
        assert "bytes differ" in rayfm("verify", run, *options, fails=True)
        assert rayfm("verify", run, MODEL, VERSIONS[1], *options).output == "1 version is intact\n"
        corrupt(run, VERSIONS[2])  # back again
        said = rayfm("verify", run, *options).output
        assert said == f"{MODEL}@{VERSIONS[2]} was refused and is readmitted\n3 versions are intact\n"
        assert updater.step()
        assert read_current(metadata, MODEL).version == VERSIONS[2]


def test_gc_deletes_what_nobody_needs(run, options, rayfm):
    for version in VERSIONS[3:]:
        publish(run, MODEL, version, {"w": torch.ones(2)})
    with contextlib.closing(opened(run, options)) as metadata:
        collector = Collector(SnapshotStore(run), metadata)
        Updater(collector, MODEL, "replica 1").step()
        rayfm("pin", run, MODEL, VERSIONS[0], *options)
        lease = collector.hold(MODEL, VERSIONS[1], "a label job", 60.0)
        assert rayfm("gc", run, MODEL, "--keep", 1, *options).output == f"deleted: {VERSIONS[2]}, {VERSIONS[3]}\n"
        # A reader that was faster than the tombstone: its files stay until it lets go.
        metadata.compare_and_set(f"snapshots/tombstones/{MODEL}/{VERSIONS[1]}", b"", None)
        said = rayfm("gc", run, MODEL, "--keep", 1, *options).output
        assert said == f"deleted: nothing\nstill held: {VERSIONS[1]}; gc again later\n"
        assert "being deleted" in rayfm("list", run, *options).output
        metadata.release(lease)
        assert rayfm("gc", run, MODEL, "--keep", 1, *options).output == f"deleted: {VERSIONS[1]}\n"
    assert SnapshotStore(run).versions(MODEL) == [VERSIONS[0], VERSIONS[4]]


def test_the_store_that_the_runs_config_names_is_asked(run, tmp_path, rayfm):
    for version in VERSIONS[3:]:
        publish(run, MODEL, version, {"w": torch.ones(2)})
    (run / "config.yaml").write_text(f"endpoints:\n  metadata: sqlite://{tmp_path}/cluster.sqlite\n")
    with contextlib.closing(SQLiteMetadataStore(tmp_path / "cluster.sqlite")) as metadata:
        Updater(Collector(SnapshotStore(run), metadata), MODEL, "replica 1").step()
        rayfm("rollback", run, MODEL, "--to", VERSIONS[0])
        assert read_current(metadata, MODEL).version == VERSIONS[0]
        assert rayfm("gc", run, MODEL, "--keep", 1).output == f"deleted: {', '.join(VERSIONS[1:4])}\n"
    assert not metadata_path(run).exists()
    own = f"sqlite://{metadata_path(run)}"
    assert "no current version" in rayfm("rollback", run, MODEL, "--metadata", own, fails=True)
    (run / "config.yaml").write_text("endpoints:\n  metadata: 3\n")
    assert "'endpoints.metadata' is 3, no URL" in rayfm("gc", run, MODEL, fails=True)


def test_looking_makes_no_metadata(run, rayfm):
    before = sorted(run.iterdir())
    assert "state" not in rayfm("list", run).output
    rayfm("show", run, MODEL)
    rayfm("verify", run)
    assert sorted(run.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("pin", "fm.techer.0", "v1"), "unknown published model 'fm.techer.0'; did you mean 'fm.teacher.0'"),
        (("pin", MODEL, "v9"), "not published"),
        (("pin", MODEL, "../v9"), "use letters"),
        (("rollback", MODEL), "no current version"),
        (("gc", "fm"), "unknown published model"),
        (("verify", "fm"), "unknown published model"),
        (("unpin", MODEL, "--metadata", "redis://x"), "write sqlite:///absolute/path"),
    ],
)
def test_mistakes_are_said_plainly(run, rayfm, arguments, complaint):
    command, *rest = arguments
    assert complaint in rayfm(command, run, *rest, fails=True)


def test_a_run_that_is_not_there_is_said_plainly(tmp_path, rayfm):
    for command in (("pin", MODEL, "v1"), ("gc", MODEL), ("list",), ("unpin", MODEL)):
        assert "is not a run's folder" in rayfm(command[0], tmp_path / "nowhere", *command[1:], fails=True)
    assert not (tmp_path / "nowhere").exists()


def test_a_guarded_version_waits_until_the_guard_or_people_promote_it(rayfm, tmp_path):
    folder = tmp_path / "guarded"
    publish(folder, MODEL, VERSIONS[0], {"w": torch.ones(2)}, trained_through="2024-01-01")
    publish(folder, MODEL, VERSIONS[1], {"w": torch.ones(2)}, trained_through="2024-01-02", extra={"guarded": True})
    store = SQLiteMetadataStore(metadata_path(folder))
    updater = Updater(Collector(SnapshotStore(folder), store), MODEL, "test")
    updater.step()
    assert read_current(store, MODEL).version == VERSIONS[0]
    assert "waits for the guard" in rayfm("list", folder).stdout
    assert "is promoted" in rayfm("promote", folder, MODEL, VERSIONS[1], "--reason", "looked at it").stdout
    updater.step()
    assert read_current(store, MODEL).version == VERSIONS[1]
    shown = rayfm("show", folder, MODEL, VERSIONS[1])
    assert "looked at it" in shown.stderr
    assert "promoted by" in rayfm("list", folder).stdout
    assert "not published" in rayfm("promote", folder, MODEL, VERSIONS[2], fails=True)
