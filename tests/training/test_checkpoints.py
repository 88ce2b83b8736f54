"""Checkpoints while training goes on: when they are due, what a crash leaves, what is collected, what can be read."""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import processes
import pytest
import torch
import torch.distributed.checkpoint as dcp
import training_runs as runs
from example_store import write_store
from typer.testing import CliRunner

from rayfm.cli import display
from rayfm.cli.checkpoints import app
from rayfm.config import ConfigError, DataError
from rayfm.training import saving
from rayfm.training.checkpoint import complete, removable
from rayfm.training.checkpoint_files import checkpoints_of, read_state, verify_checkpoint
from rayfm.training.config import TrainingConfig
from rayfm.training.loop import TrainingLoop
from rayfm.training.schedule import Schedule
from rayfm.training.spec import TrainerSpec


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    write_store(root, list(runs.PERIODS), impressions=640)
    return root


class Clock:
    """Time in which each step takes ``step_s``."""

    def __init__(self, **training: object) -> None:
        self.now, self.asked = 0.0, 0
        self.schedule = Schedule(TrainingConfig.model_validate(training), self.agree, lambda: self.now)

    def agree(self, ask):
        self.asked += 1
        return ask()

    def due(self, steps: int, step_s: float, stall: float = 0.0, busy: float = 0.0) -> list[float]:
        """When checkpoints were made in so many steps, each written for ``busy`` seconds."""
        made: list[float] = []
        for step in range(steps):
            self.now += step_s
            if self.schedule.due(step, lambda: bool(made) and self.now < made[-1] + busy):
                made.append(self.now)
                self.now += stall
                self.schedule.made(stall)
        return made


def test_a_checkpoint_is_due_by_the_clock_with_few_questions() -> None:
    clock = Clock(checkpoint_seconds=60)
    made = clock.due(10_000, 0.05)
    assert len(made) == 8
    assert all(60 <= later - earlier < 61 for earlier, later in itertools.pairwise(made))
    assert clock.asked < 8 * 25, "an interval has 1,200 steps"


def test_steps_that_become_slower_delay_a_checkpoint_little() -> None:
    clock = Clock(checkpoint_seconds=60)
    assert clock.due(400, 0.05) == []
    made = clock.due(600, 0.2)
    assert 60 <= made[0] <= 100


def test_the_loop_stands_still_for_at_most_2_percent() -> None:
    made = Clock(checkpoint_seconds=10).due(20_000, 0.05, stall=3.0)
    gaps = [later - earlier for earlier, later in itertools.pairwise(made)]
    assert gaps
    assert all(3.0 / gap < 0.02 for gap in gaps)


def test_one_that_is_still_being_written_is_waited_for_by_the_clock() -> None:
    made = Clock(checkpoint_seconds=10).due(2_000, 0.05, busy=25.0)
    assert all(25 <= later - earlier < 28 for earlier, later in itertools.pairwise(made))


def test_by_steps_every_rank_knows_and_nobody_is_asked() -> None:
    clock = Clock(checkpoint_every=4)
    assert len(clock.due(20, 1.0)) == 5
    assert Clock(checkpoint_seconds=None).due(1000, 10.0) == []
    assert clock.asked == 0


@pytest.fixture
def slow_writes(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The thread that writes waits until it may."""
    may = threading.Event()
    original = saving.Writer._write

    def write(self, *arguments) -> None:
        if threading.current_thread().name == "rayfm-checkpoint":
            assert may.wait(60)
        original(self, *arguments)

    monkeypatch.setattr(saving.Writer, "_write", write)
    yield may
    may.set()


def test_training_goes_on_while_a_checkpoint_is_written(
    store: Path, tmp_path: Path, slow_writes: threading.Event
) -> None:
    """What is written is the state as it was, whatever steps have changed since: the run goes on to the same end."""
    spec = runs.spec(store, tmp_path / "run", runs.learner("fm"), checkpoint_every=3)
    original = TrainingLoop._report
    trained = []

    def report(self: TrainingLoop, period: str, step: int, steps: int, phase: str) -> None:
        if phase == "train":
            trained.append((period, step, [path.name for path in complete(self.checkpoints.root)]))
            if (period, step) == (runs.PERIODS[0], 5):
                slow_writes.set()
            if (period, step) == (runs.PERIODS[0], 8):
                raise KeyboardInterrupt  # after the checkpoint at step 6 has been begun
        original(self, period, step, steps, phase)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLoop, "_report", report)
        with pytest.raises(KeyboardInterrupt):
            runs.train_here(spec)
    assert [names for _, step, names in trained if step in (3, 4, 5)] == [[], [], []], "not yet complete, and no wait"
    root = spec.folder / "checkpoints"
    assert [path.name for path in complete(root)] == ["00000-00000003", "00000-00000006"], "begun ones are completed"
    for path in complete(root):
        verify_checkpoint(path)
    runs.train_here(spec)
    whole = runs.spec(store, tmp_path / "whole", runs.learner("fm"), checkpoint_every=3, async_checkpoints=False)
    runs.train_here(whole)
    assert runs.losses(spec) == pytest.approx(runs.losses(whole), rel=1e-9)


def test_a_checkpoint_that_cannot_be_written_stops_the_run(store: Path, tmp_path: Path) -> None:
    spec = runs.spec(store, tmp_path, runs.learner("fm"), checkpoint_every=3)

    def full(*arguments: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dcp, "save", full)
        with pytest.raises(OSError, match="No space left"):
            runs.train_here(spec)
    assert complete(spec.folder / "checkpoints") == []


def _die_while_writing(spec: TrainerSpec) -> None:
    original = dcp.save

    def save(*arguments, **kwargs):
        original(*arguments, **kwargs)
        if kwargs["checkpoint_id"].endswith("00001-00000006"):
            os.kill(os.getpid(), signal.SIGKILL)

    dcp.save = save
    torch.set_num_threads(1)
    runs.train_here(spec)


def test_a_crash_while_one_is_written_goes_back_to_the_one_before(store: Path, tmp_path: Path) -> None:
    spec = runs.spec(store, tmp_path, runs.learner("fm"), checkpoint_every=3)
    process = processes.context().Process(target=_die_while_writing, args=(spec,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    found = {item.path.name: item.state for item in checkpoints_of(tmp_path)}
    assert found["00001-00000006"] is None, "all tensors, and not yet complete"
    assert found["00001-00000003"].cursor.step == 3
    runs.train_here(spec)
    assert [path.name for path in sorted((spec.folder / "checkpoints").iterdir())] == [
        "00002-00000009",
        "00003-00000000",
    ], "orphans and superseded ones are collected"


def test_the_stall_is_what_is_reported(store: Path, tmp_path: Path) -> None:
    """Writing takes 0.3 s each; the loop does not wait for it but at a period's end."""
    spec = runs.spec(store, tmp_path, runs.learner("fm"), checkpoint_every=8)
    original = saving.Writer._write
    inside = []

    def write(self, *arguments) -> None:
        if threading.current_thread().name == "rayfm-checkpoint":
            inside.append(time.perf_counter())
            time.sleep(0.3)
        original(self, *arguments)

    stalls = []
    made = Schedule.made

    def note(self: Schedule, stall: float) -> None:
        stalls.append(stall)
        made(self, stall)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving.Writer, "_write", write)
        patch.setattr(Schedule, "made", note)
        runs.train_here(spec)
    assert len(inside) == 3
    parts = [json.loads((spec.folder / "periods" / f"{period}.json").read_text())["parts"] for period in runs.PERIODS]
    # The schedule starts with a call of its own; then each period has one inside and one at its end.
    for period, part in enumerate(parts):
        assert part["checkpoint"] == pytest.approx(sum(stalls[1 + 2 * period : 3 + 2 * period]))


@pytest.fixture(scope="module")
def finished(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished")
    runs.train_here(runs.spec(store, run, runs.learner("fm"), checkpoint_every=4))
    return run


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display.console, "_width", 80)


@pytest.mark.usefixtures("wide")
def test_checkpoints_are_listed_verified_and_pruned(finished: Path) -> None:
    def rayfm(*arguments: str) -> str:
        result = CliRunner().invoke(app, [arguments[0], str(finished), *arguments[1:]])
        assert result.exception is None, result.output
        return result.output

    orphan = finished / "trainers" / "group" / "checkpoints" / "00002-00000005"
    orphan.mkdir()
    (orphan / "__0_0.distcp").write_bytes(b"half")
    listed = rayfm("list")
    assert "end of 2024-01-03" in listed
    assert "step 8 of 2024-01-03" in listed
    assert "unfinished" in listed
    assert max(map(len, listed.splitlines()[1:])) <= 80
    assert rayfm("verify").startswith("2 checkpoints intact, ")
    assert rayfm("prune", "--keep", "2") == "nothing to delete\n", "what changed just now may be being written"
    os.utime(orphan / "__0_0.distcp", (1e9, 1e9))
    os.utime(orphan, (1e9, 1e9))
    assert rayfm("prune", "--keep", "2") == "deleted group/00002-00000005\n"
    assert rayfm("prune") == "deleted group/00002-00000008\n"
    assert rayfm("verify").startswith("1 checkpoint intact, ")
    result = CliRunner().invoke(app, ["list", str(finished), "--trainer", "grup"])
    assert isinstance(result.exception, ConfigError)
    assert "did you mean 'group'" in str(result.exception)


@pytest.mark.parametrize("where", [0.3, 0.5, 0.8])
def test_a_changed_byte_is_found(store: Path, tmp_path: Path, where: float) -> None:
    spec = runs.spec(store, tmp_path, runs.learner("fm"))
    runs.train_here(spec.model_copy(update={"periods": runs.PERIODS[:1]}))
    (path,) = complete(spec.folder / "checkpoints")
    assert verify_checkpoint(path) > 10_000
    file = path / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    reader = dcp.FileSystemReader(path).read_metadata()
    largest = max(reader.storage_data.values(), key=lambda place: place.length)
    place = largest.offset + int(largest.length * where)
    content[place] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        DataError, match=r"__0_0\.distcp, .*: the checkpoint cannot be used, remove its folder|checksum"
    ):
        verify_checkpoint(path)


def test_what_is_missing_or_cut_short_is_found(store: Path, tmp_path: Path) -> None:
    spec = runs.spec(store, tmp_path, runs.learner("fm"))
    runs.train_here(spec.model_copy(update={"periods": runs.PERIODS[:1]}))
    (path,) = complete(spec.folder / "checkpoints")
    file = path / "__0_0.distcp"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"__0_0\.distcp, "):
        verify_checkpoint(path)
    file.unlink()
    with pytest.raises(DataError, match=r"__0_0\.distcp, .*No such file"):
        verify_checkpoint(path)
    (path / ".metadata").write_bytes(b"no pickle")
    with pytest.raises(DataError, match=r"\.metadata: "):
        verify_checkpoint(path)
    (path / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"state\.json: .*; remove the checkpoint"):
        read_state(path)


def test_nothing_is_removed_where_nothing_is(tmp_path: Path) -> None:
    assert removable(tmp_path / "none", 1) == []
