"""A reader's pins live as long as it reads, and no longer."""

from __future__ import annotations

import pickle
import time

import pytest
import training_runs as runs
from example_store import write_store
from stored_lanes import LANES, PERIOD, ROWS, lane_labels, run_job, take_out

from rayfm.config import LabelError
from rayfm.labels import LabelStore, kept_pins
from rayfm.labels.kept_pins import KeptPins
from rayfm.serving.labelling import StoredLabels
from rayfm.snapshots import SQLiteMetadataStore
from rayfm.training.spec import PinnedLabels
from rayfm.training.trainer import fit_here

VERSION = "2022-04-25-aa"


@pytest.fixture
def store(tmp_path) -> LabelStore:
    return LabelStore(tmp_path, SQLiteMetadataStore(tmp_path / "meta.db"))


@pytest.fixture
def labels(store) -> StoredLabels:
    return StoredLabels(store.root, store.metadata, "students")


def committed(store: LabelStore, version: str = VERSION) -> PinnedLabels:
    return PinnedLabels(version=version, table_version=run_job(store.root, version).table_version)


def owners(store: LabelStore) -> list[str]:
    assert store.metadata is not None
    return [lease.owner for lease in store.metadata.leases("labels/pins/")]


def test_a_pin_outlives_its_lease_while_it_is_read_and_not_a_moment_longer(store, monkeypatch):
    monkeypatch.setattr(kept_pins, "PIN_S", 3.0)
    labels = StoredLabels(store.root, store.metadata, "students")
    lookup = labels.lookup("fm", committed(store), ("click",))
    take_out(store, VERSION)
    time.sleep(3.5)
    assert store.vacuum(retention_hours=0) == []
    ids = lane_labels(1)["example_id"].to_numpy()
    assert lookup.rows(PERIOD, "impression", 1, 0, ROWS, ids)[1].all()
    labels.release()
    assert len(store.vacuum(retention_hours=0)) == 2 * LANES


def test_what_is_read_from_one_table_version_has_one_pin(store, labels):
    pinned, other = committed(store), committed(store, "2022-04-25-bb")
    for _ in range(2):
        labels.lookup("fm", pinned, ("click",))
        labels.lookup("fm", pinned, ("watch_time",))
        labels.representation("fm", pinned, 2)
    assert owners(store) == ["students"]
    labels.lookup("fm", other, ("click",))
    assert owners(store) == ["students"] * 2
    labels.release()
    assert owners(store) == []
    labels.lookup("fm", other, ("click",))
    assert owners(store) == ["students"], "the next period's"
    labels.release()


def test_a_pin_that_was_lost_is_taken_anew(store):
    pinned = committed(store)
    with KeptPins(store.storage, store.metadata, "me") as pins:
        first = pins.pin("fm", VERSION, pinned.table_version)
        store.release(first)  # as after a pause that was longer than the lease
        assert pins._keeper is not None
        pins._keeper.extend()
        again = pins.pin("fm", VERSION, pinned.table_version)
        assert again.lease.token > first.lease.token
        assert owners(store) == ["me"]
    assert owners(store) == []


def test_pins_stay_where_they_were_taken(store, labels):
    pinned = committed(store)
    labels.lookup("fm", pinned, ("click",))
    worker = pickle.loads(pickle.dumps(labels))
    worker.lookup("fm", pinned, ("click",))
    assert owners(store) == ["students"] * 2
    worker.release()
    assert owners(store) == ["students"]
    labels.release()


def test_a_store_without_metadata_has_nothing_to_keep(store):
    pinned = committed(store)
    with KeptPins(store.storage, None, "me") as pins:
        assert pins.pin("fm", VERSION, pinned.table_version).lease is None


class _Source(runs.IdLabels):
    """Notes what the loop asks of it; labels of the third period are gone."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def lookup(self, teacher, labels, tasks):
        self.events.append(labels.version)
        if labels.version == f"{runs.PERIODS[2]}-v":
            raise LabelError("gone")
        return super().lookup(teacher, labels, tasks)

    def release(self) -> None:
        self.events.append("release")


def test_the_loop_lets_go_after_each_period_also_of_one_that_fails(tmp_path):
    store, source = write_store(tmp_path / "data", list(runs.PERIODS), 64, 32, 2), _Source()
    spec = runs.spec(store.root, tmp_path / "run", runs.learner("fm", "direct"))
    with pytest.raises(LabelError, match="gone"):
        fit_here(spec, runs.Free(spec.teachers), source)
    second, third = (f"{period}-v" for period in runs.PERIODS[1:])
    assert source.events == ["release", second, "release", third, "release"]
