"""Kill -9 at any point of a writer that labels, compacts, expires and vacuums: the store stays readable and whole."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import processes
import pytest
from stored_lanes import LANES, PERIOD, ROWS, all_lanes, check_complete, write

from rayfm.labels import LabelLookup, LabelStore, Retention, compact, delta, expire
from rayfm.snapshots import SQLiteMetadataStore

VERSIONS = [f"2022-04-2{day}-{day}" for day in (1, 2, 3)]
KEPT = VERSIONS[1:]


def open_store(root: Path) -> LabelStore:
    return LabelStore(root, SQLiteMetadataStore(root / "meta.db"))


def work(root: Path, seed: int, progress) -> None:
    """All jobs from the start, lane by lane, with maintenance in between, in an order of the seed's."""
    delta._CONFIGURATION["delta.checkpointInterval"] = "4"  # so that kills meet checkpoints of the log too
    store, rng = open_store(root), random.Random(seed)
    lanes = [(version, *lane) for version in VERSIONS for lane in all_lanes()]
    rng.shuffle(lanes)
    for version, kind, lane, labels in lanes:
        if rng.random() < 0.5:
            compact(store)
        if rng.random() < 0.3:
            store.vacuum(retention_hours=0)
        if rng.random() < 0.2:
            expire(store, Retention(version=VERSIONS[0]))
        store.commit([write(root, lane, labels, kind=kind, version=version)])
        with progress.get_lock():
            progress.value += 1


def check_readable(root: Path) -> dict[str, set[tuple[str, int]]]:
    """Every lane that the store lists is whole and right. Returns version -> lanes."""
    store, held = open_store(root), {}
    for version in VERSIONS:
        held[version] = store.labelled_lanes("fm", version, PERIOD)
        rows = [part.rows for part in store.list("fm", PERIOD) if part.version == version]
        assert rows == [ROWS] * len(held[version]), "none doubled, none half there"
        if not held[version]:
            continue
        lookup = LabelLookup((root, None), "fm", version, ("watch_time", "click"))
        for kind, lane, labels in all_lanes():
            if (kind, lane) in held[version]:
                values, mask = lookup.rows(PERIOD, kind, lane, 0, ROWS, labels["example_id"].to_numpy())
                assert mask.all()
                np.testing.assert_array_equal(values[:, 0], labels["watch_time"].to_numpy().astype(np.float32))
                np.testing.assert_array_equal(values[:, 1], labels["click"].to_numpy())
    return held


@pytest.mark.parametrize("seed", range(4))
def test_a_writer_killed_again_and_again_leaves_a_whole_store(tmp_path, seed):
    rng, before, killed = random.Random(1000 + seed), {version: set() for version in VERSIONS}, 0
    open_store(tmp_path)
    for _ in range(6):
        progress = processes.context().Value("i", 0)
        child = processes.context().Process(target=work, args=(tmp_path, rng.randrange(10**6), progress))
        child.start()
        deadline, wanted = time.monotonic() + 60, rng.randint(1, 8)
        while progress.value < wanted and child.is_alive() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))  # somewhere within what follows
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
        child.join(60)
        killed += child.exitcode == -signal.SIGKILL
        held = check_readable(tmp_path)
        for version in KEPT:
            assert held[version] >= before[version], "what was committed stays"
        before = held
    assert killed >= 3
    store = open_store(tmp_path)
    for version in KEPT:
        store.commit([write(tmp_path, lane, labels, kind=kind, version=version) for kind, lane, labels in all_lanes()])
    compact(store)
    store.vacuum(retention_hours=0)
    for version in KEPT:
        check_complete(tmp_path, version)
        assert len(store.labelled_lanes("fm", version, PERIOD)) == 2 * LANES
    assert list((tmp_path / "labels" / "_delta_log").glob("*.checkpoint.parquet"))
    left = {str(path.relative_to(tmp_path / "labels")) for path in (tmp_path / "labels").rglob("*.parquet")}
    named = {file.path for file in _files(store)}
    assert {path for path in left if not path.startswith("_delta_log")} == named, "what kills left behind is gone"


def _files(store: LabelStore):
    from rayfm.labels.index import label_files

    return label_files(store.open())
