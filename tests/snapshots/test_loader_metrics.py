"""What a replica records when versions take over, and when one cannot be loaded."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from rayfm.config import SnapshotError
from rayfm.operations.metrics import LOAD_FAILURES, SERVED_PERIOD, SERVED_PUBLISHED, SWAP_SECONDS, SWAPS, capture
from rayfm.snapshots import Collector, Loader, SnapshotStore, SQLiteMetadataStore, Updater
from rayfm.snapshots.publish import publish


def test_swaps_their_seconds_and_failures_are_counted(tmp_path: Path):
    collector = Collector(SnapshotStore(tmp_path / "ads"), SQLiteMetadataStore(tmp_path / "metadata.sqlite"))
    broken: set[str] = set()

    def load(version: str) -> str:
        if version in broken:
            raise SnapshotError("no memory")
        return version

    loader, updater = Loader(collector, "fm", "replica 1", load), Updater(collector, "fm", "task 1")
    labels = {"run": "ads", "model": "fm"}
    with capture() as seen:
        for version, period in (("v1", "2026-01-01T05"), ("v2", "warm-up")):
            publish(tmp_path / "ads", "fm", version, {"w": torch.ones(3)}, trained_through=period)
            updater.step()
            assert loader.step()
            assert not loader.step()
        broken.add("v3")
        publish(tmp_path / "ads", "fm", "v3", {"w": torch.ones(3)})
        updater.step()
        assert not loader.step()
    loader.close()
    assert seen.get(SWAPS, **labels) == 2
    assert len(seen.get(SWAP_SECONDS, **labels)) == 2
    assert seen.get(LOAD_FAILURES, **labels) == 1
    assert time.time() - 600 < seen.get(SERVED_PUBLISHED, **labels) <= time.time()
    assert seen.get(SERVED_PERIOD, **labels) == 1_767_243_600, "05:00 UTC; a name that is no time says nothing"
