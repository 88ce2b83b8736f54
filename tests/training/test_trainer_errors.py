"""What a worker group makes of errors that will come again: one clear error, no second try."""

from __future__ import annotations

from pathlib import Path

import pytest
import training_runs as runs
from example_store import write_store

from rayfm.training.trainer import fit


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_corrupt_lane_ends_the_training_at_once(tmp_path: Path) -> None:
    """Read by a Ray Data task, for one of two workers; the other waits in a collective."""
    store = write_store(tmp_path / "store", list(runs.PERIODS), impressions=700)
    path = store.lane_path(runs.PERIODS[1], "impression", 3)
    data = bytearray(path.read_bytes())
    data[20:600] = bytes(580)
    path.write_bytes(data)
    # The first period to be predicted is the third: prediction reads directly, and would find out first.
    spec = runs.spec(store.root, tmp_path, runs.learner("fm"), reader="ray_data", workers=2, cpus_per_worker=0.5)
    spec = spec.model_copy(update={"first_predicted": 2})
    coordinator = runs.Noted(tmp_path)
    fit(spec, coordinator)
    (message,) = coordinator.noted("failed")
    assert message.startswith(f"{path}: corrupt Parquet file")
    assert message.endswith(f"prepare period {runs.PERIODS[1]} again")
    assert coordinator.noted("trained") == [runs.PERIODS[0]]
    assert coordinator.noted("asked") == list(runs.PERIODS[:2]), "nothing is tried again"
