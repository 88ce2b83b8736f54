"""Every example is trained once, whatever is killed: the ledger says which, and the weights agree."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
import training_runs as runs
from example_store import write_store

from rayfm.config import DataError
from rayfm.data.store import ExampleStore
from rayfm.snapshots.load import SnapshotStore
from rayfm.training.checkpoint import Cursor
from rayfm.training.ledger import Ledger, LedgerEntries, check_ledger, expected_ids, read_ledger
from rayfm.training.spec import TrainerSpec

KILLS = int(os.environ.get("RAYFM_KILLS", "40"))
"""``make soak-training`` has more, and longer periods for them."""
IMPRESSIONS, CONSIDERATIONS = 16 * KILLS, 5 * KILLS


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    write_store(root, list(runs.PERIODS), impressions=IMPRESSIONS, considerations=CONSIDERATIONS)
    return root


def made(store: Path, run_dir: Path, **training: object) -> TrainerSpec:
    """One small model, 54 steps a period (of forty kills), a checkpoint after every second."""
    options = {"batch_size": 12, "checkpoint_every": 2, "ledger": True, **training}
    return runs.spec(store, run_dir, runs.learner("fm", reference={"click": "logged/ranking/click"}), **options)


@pytest.fixture(scope="module")
def unbroken(store: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainerSpec:
    spec = made(store, tmp_path_factory.mktemp("unbroken"))
    runs.train_here(spec)
    return spec


def assert_trained_once(spec: TrainerSpec) -> None:
    for period in spec.periods:
        expected = expected_ids(ExampleStore(spec.store), period, spec.training.batch_size, spec.consideration_share)
        impressions = ExampleStore(spec.store).manifest(period).rows("impression")
        assert impressions < len(expected) < impressions * 1.3, "all impressions, and the sampled considerations"
        check = check_ledger(read_ledger(spec.folder / "ledger", period), expected)
        assert check.exact, (period, check)


def assert_same_end(spec: TrainerSpec, unbroken: TrainerSpec, rel: float) -> None:
    """Losses, counts, metric sums and published weights as those of the unbroken run."""
    assert runs.losses(spec) == pytest.approx(runs.losses(unbroken), rel=rel)
    for period in spec.periods:
        counts = [
            json.loads((s.folder / "periods" / f"{period}.json").read_text())["examples"] for s in (spec, unbroken)
        ]
        assert counts[0] == counts[1]
    for period in spec.periods[1:]:
        ours, theirs = (runs.metric_sums(s, period, "fm.none.1") for s in (spec, unbroken))
        for name, value in theirs.items():
            if rel > 1e-5 and not name.endswith("/sums"):
                continue  # counts of predictions by bin: one at a bin's edge may fall to either side
            torch.testing.assert_close(ours[name], value, rtol=rel, atol=1e-9 if rel < 1e-5 else 1e-3)
    ours, theirs = (weights(s) for s in (spec, unbroken))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=rel, atol=1e-7 if rel < 1e-5 else 1e-5)


def weights(spec: TrainerSpec) -> dict[str, torch.Tensor]:
    snapshots = SnapshotStore(spec.run_dir)
    return snapshots.load("fm.none.1", snapshots.latest("fm.none.1"))


def test_an_unbroken_run_trains_every_example_once(unbroken: TrainerSpec) -> None:
    assert_trained_once(unbroken)
    entries = read_ledger(unbroken.folder / "ledger", runs.PERIODS[0])
    assert entries.step.max() == math.ceil(IMPRESSIONS / 12) - 1
    assert (np.diff(entries.step) >= 0).all()
    assert set(entries.rank) == {0}


def test_kills_at_random_moments_change_nothing(store: Path, tmp_path: Path, unbroken: TrainerSpec) -> None:
    spec = made(store, tmp_path)
    for kill in range(KILLS):
        assert forked.run(1, forked.Train(spec, seed=kill)) == [-signal.SIGKILL], f"killed as attempt {kill}"
    walked = sorted(path.name for path in (spec.folder / "periods").iterdir())
    assert walked, "the kills reached beyond the first period"
    assert forked.run(1, forked.Train(spec)) == [0]
    assert_trained_once(spec)
    assert_same_end(spec, unbroken, rel=1e-6)


def test_the_world_grows_and_shrinks_in_the_middle_of_a_period(
    store: Path, tmp_path: Path, unbroken: TrainerSpec
) -> None:
    """Killed at random moments under 1, 2 and 4 workers, up and down again: lanes are dealt again from the cursor."""
    spec = made(store, tmp_path, sharding="row_wise")
    seen = set()
    for attempt, world in enumerate((1, 2, 4, 1, 4, 2, 1, 2)):
        assert -signal.SIGKILL in forked.run(world, forked.Train(spec, seed=100 + attempt))
        entries = read_ledger(spec.folder / "ledger", runs.PERIODS[0])
        seen |= set(entries.rank)
    assert forked.run(2, forked.Train(spec)) == [0, 0]
    assert seen == {0, 1, 2, 3}
    assert_trained_once(spec)
    assert_same_end(spec, unbroken, rel=1e-3)


def test_a_ledger_shows_what_was_doubled_left_out_and_foreign() -> None:
    ids = np.array([1, 2, 2, 9])
    check = check_ledger(LedgerEntries(ids, ids, ids), np.array([1, 2, 3]))
    assert (check.doubled.tolist(), check.missing.tolist(), check.foreign.tolist()) == ([2], [3], [9])
    assert not check.exact


def test_a_rewind_cuts_off_what_the_weights_forget(tmp_path: Path) -> None:
    for rank in (0, 1):
        ledger = Ledger(tmp_path, rank)
        for step in range(5):
            ledger.enter("p0", step, np.array([100 * rank + step]))
        for step in range(3):
            ledger.enter("p1", step, np.array([100 * rank + 10 + step] * step))
        ledger.enter("p2", 0, np.array([7]))
        ledger.close()
    with (tmp_path / "p1" / "rank-00001.ids").open("ab") as file:
        file.write(np.array([3, 9, 1, 2], "<i8").tobytes() + b"cut")  # the last entry a kill cut short
    assert len(read_ledger(tmp_path, "p1").example_id) == 6
    Ledger(tmp_path, 0).rewind(Cursor(finished=("p0",), period="p1", step=2))
    assert read_ledger(tmp_path, "p0").step.tolist() == [0, 1, 2, 3, 4] * 2
    assert read_ledger(tmp_path, "p1").example_id.tolist() == [11, 111]
    assert not (tmp_path / "p2").exists()
    later = Ledger(tmp_path, 1)
    later.enter("p1", 2, np.array([5]))
    assert read_ledger(tmp_path, "p1").example_id.tolist() == [11, 111, 5], "entered where it was cut"
    later.close()


def test_a_period_without_a_ledger_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"p0: no ledger; it is kept where the trainer's config says 'ledger: true'"):
        read_ledger(tmp_path, "p0")
