"""An intact version that no replica can load is refused and left; one flaky replica refuses nothing."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import pytest
import torch

from rayfm.config import SnapshotError
from rayfm.snapshots import (
    Collector,
    Conflict,
    Loader,
    Pointer,
    SnapshotFollower,
    SnapshotStore,
    StoreUnavailable,
    Updater,
    load_failures,
    open_metadata,
    read_current,
    refusals,
)
from rayfm.snapshots.current import TRIES
from rayfm.snapshots.failures import FAILURES, LOADERS, record_failure, record_load
from rayfm.snapshots.publish import publish
from rayfm.snapshots.state import details, states
from rayfm.snapshots.updater import verify_again


def publish_version(root: Path, version: str) -> None:
    publish(root, "fm", version, {"w": torch.full((3,), float(version[1:]))})


def corrupt(root: Path, version: str) -> None:
    (path,) = SnapshotStore(root).folder("fm", version).glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


class Replica:
    """A loader whose pauses have always passed, and the versions that it cannot load."""

    def __init__(self, collector: Collector, owner: str, *broken: str, error: Exception | None = None) -> None:
        self.broken, self.error = set(broken), error or SnapshotError("its tables have another shape")
        self.loader = Loader(collector, "fm", owner, self.load)

    def load(self, version: str) -> str:
        if version in self.broken:
            raise self.error
        return version

    def look(self) -> bool:
        if self.loader._failed is not None:
            self.loader._failed = (*self.loader._failed[:2], 0.0)
        return self.loader.step()


@pytest.fixture
def collector(tmp_path, metadata) -> Collector:
    return Collector(SnapshotStore(tmp_path), metadata, keep=1)


@pytest.fixture
def updater(collector) -> Updater:
    return Updater(collector, "fm", "updater")


@pytest.fixture
def published(tmp_path, updater) -> None:
    """v1 to v3, of which v3 is current."""
    for number in (1, 2, 3):
        publish_version(tmp_path, f"v{number}")
    assert updater.step()


def current(collector: Collector) -> str:
    return read_current(collector.metadata, "fm").version


def test_a_version_that_nobody_can_load_is_refused_and_left(tmp_path, collector, updater, published, caplog):
    replicas = [Replica(collector, name, "v3") for name in ("a", "b")]
    for replica in replicas:
        assert not replica.look()
        assert not updater.step()
    (failures,) = load_failures(collector.metadata, "fm").values()
    assert {who: failure.times for who, failure in failures.loaders.items()} == {"a": 1, "b": 1}
    assert failures.loaders["a"].reason == "SnapshotError: its tables have another shape"
    assert states(collector, "fm")["v3"] == ("current", "failed to load 2 times")
    assert current(collector) == "v3"
    assert not replicas[0].look()
    with caplog.at_level(logging.ERROR):
        assert updater.step()
    assert "goes back to v2" in caplog.text
    found = read_current(collector.metadata, "fm")
    assert (found.version, found.by, found.pinned, found.barred) == ("v2", "updater", False, "")
    assert found.reason == (
        "v3 was refused: no replica can load it (3 failures), last a: SnapshotError: its tables have another shape"
    )
    refusal = refusals(collector.metadata, "fm")["v3"]
    assert (refusal.tries, refusal.by) == (TRIES, "updater")
    assert "last a: SnapshotError: its tables have another shape" in refusal.reason
    assert "refused" in states(collector, "fm")["v3"]
    assert "failed to load 2 times for a: SnapshotError: its tables have another shape" in details(
        collector, "fm", "v3"
    )

    for replica in replicas:
        assert replica.look()
        assert (replica.loader.version, replica.loader.failure) == ("v2", None)
    assert not updater.step(), "v3 is kept out"
    assert not Updater(collector, "fm", "another").step()
    publish_version(tmp_path, "v4")
    assert updater.step()
    assert current(collector) == "v4"


def test_what_was_refused_for_its_loads_is_readmitted_with_new_tries(collector, updater, published):
    replica = Replica(collector, "a", "v3")
    for _ in range(FAILURES):
        replica.look()
    assert updater.step()
    assert current(collector) == "v2"
    assert verify_again(collector, "fm", "v3")
    assert load_failures(collector.metadata, "fm") == refusals(collector.metadata, "fm") == {}
    assert updater.step()
    assert current(collector) == "v3"
    replica.look()
    assert not updater.step()
    replica.broken.clear()  # its code knows the model by now
    assert replica.look()
    assert replica.loader.version == "v3"
    assert load_failures(collector.metadata, "fm") == {}


def test_one_flaky_replica_refuses_nothing_that_others_have(collector, updater, published):
    good = Replica(collector, "good")
    assert good.look()
    flaky = Replica(collector, "flaky", "v3", error=MemoryError("no memory"))
    for _ in range(4 * FAILURES):
        assert not flaky.look()
        assert not updater.step()
    (failures,) = load_failures(collector.metadata, "fm").values()
    assert (failures.counted, failures.times) == (0, 4 * FAILURES)
    assert states(collector, "fm")["v3"] == ("current", "failed to load 12 times", "held by 1")
    # The good one's lease is lost for a moment (a store that was away): what is known does not make up for it.
    (lease,) = collector.holders("fm", "v3")
    collector.metadata.release(lease)
    assert not updater.step()
    assert current(collector) == "v3"
    flaky.broken.clear()
    assert flaky.look()
    assert load_failures(collector.metadata, "fm") == {}


def test_who_loads_it_in_the_end_clears_it_of_what_came_before(collector, updater, published):
    flaky, other = Replica(collector, "flaky", "v3"), Replica(collector, "other")
    for _ in range(FAILURES):
        flaky.look()
    assert other.look(), "before an updater looked"
    assert not updater.step()
    (failures,) = load_failures(collector.metadata, "fm").values()
    assert (failures.counted, list(failures.loaders)) == (0, ["flaky"])
    other.loader.close()
    flaky.look()
    assert not updater.step(), "it takes new failures"


def test_a_loader_that_tries_for_the_first_time_is_waited_for(collector, updater, published):
    flaky = Replica(collector, "flaky", "v3")
    loading, go_on = threading.Event(), threading.Event()

    def load(version: str) -> str:
        loading.set()
        assert go_on.wait(60)
        return version

    slow = Loader(collector, "fm", "slow", load)
    thread = threading.Thread(target=slow.step)
    for _ in range(FAILURES - 1):
        flaky.look()
    thread.start()
    assert loading.wait(60)
    for _ in range(2 * FAILURES):
        flaky.look()
        assert not updater.step()
    go_on.set()
    thread.join(60)
    assert slow.version == "v3"
    assert not updater.step()
    assert current(collector) == "v3"


def test_a_pinned_version_stays_and_is_reported(collector, updater, published, caplog):
    pointer = Pointer(collector, "fm", "operator")
    pointer.pin("v3", "an experiment")
    replica = Replica(collector, "a", "v3")
    for _ in range(FAILURES):
        replica.look()
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            assert not updater.step()
    assert caplog.text.count("no replica can load it, and it is pinned; last a: SnapshotError: its tables") == 1
    assert states(collector, "fm")["v3"] == ("current, pinned", "failed to load 3 times")
    assert refusals(collector.metadata, "fm") == {}
    pointer.unpin()
    assert updater.step()
    assert current(collector) == "v2"
    assert "v3" in refusals(collector.metadata, "fm")
    assert pointer.pin("v3", "once more").pinned
    assert (refusals(collector.metadata, "fm"), load_failures(collector.metadata, "fm")) == ({}, {})


def test_it_goes_back_to_what_is_intact_and_was_not_rolled_back_from(tmp_path, collector, updater, published):
    publish_version(tmp_path, "v4")
    updater.step()
    pointer = Pointer(collector, "fm", "operator")
    assert pointer.rollback("bad", to="v3").left == ("v4",)
    publish_version(tmp_path, "v5")
    updater.step()
    corrupt(tmp_path, "v3")
    replica = Replica(collector, "a", "v5", "v2")
    for _ in range(FAILURES):
        replica.look()
    assert updater.step()
    found = read_current(collector.metadata, "fm")
    assert (found.version, found.barred, found.left) == ("v2", "v4", ("v4",)), "v4 was left by people, v3 is broken"
    assert refusals(collector.metadata, "fm")["v3"].tries == 1
    for _ in range(FAILURES):
        replica.look()
    assert updater.step()
    assert current(collector) == "v1", "and further, where that cannot be loaded either"
    assert replica.look()
    with pytest.raises(SnapshotError, match="no intact version older than v1"):
        pointer.rollback("bad")


def test_without_an_older_version_it_stays_and_says_so(tmp_path, collector, updater, caplog):
    publish_version(tmp_path, "v1")
    updater.step()
    replica = Replica(collector, "a", "v1")
    for _ in range(FAILURES):
        replica.look()
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            assert not updater.step()
    assert caplog.text.count("there is no older version to go back to") == 1
    assert states(collector, "fm")["v1"] == ("current", "refused", "failed to load 3 times")
    assert refusals(collector.metadata, "fm")["v1"].tries == TRIES
    publish_version(tmp_path, "v2")
    assert updater.step()
    assert replica.look()


def test_a_newer_version_is_taken_before_an_older_one(tmp_path, collector, updater, published):
    replica = Replica(collector, "a", "v3")
    for _ in range(FAILURES):
        replica.look()
    publish_version(tmp_path, "v4")
    assert updater.step()
    assert current(collector) == "v4"
    assert refusals(collector.metadata, "fm") == {}


def test_an_updater_that_dies_before_the_move_leaves_it_to_another(collector, updater, published, monkeypatch):
    replica = Replica(collector, "a", "v3")
    for _ in range(FAILURES):
        replica.look()

    def die(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(updater.pointer, "move", die)
    with pytest.raises(KeyboardInterrupt):
        updater.step()
    assert current(collector) == "v3"
    assert refusals(collector.metadata, "fm")["v3"].tries == TRIES
    assert Updater(collector, "fm", "another").step()
    assert current(collector) == "v2"
    assert refusals(collector.metadata, "fm")["v3"].tries == TRIES, "refused once"


def test_a_move_back_that_comes_too_late_changes_nothing(tmp_path, collector, updater, published, monkeypatch):
    replica = Replica(collector, "a", "v3")
    for _ in range(FAILURES):
        replica.look()
    verified = updater._verified

    def move_meanwhile(version: str) -> bool:
        Pointer(collector, "fm", "operator").pin("v1", "safe")
        monkeypatch.setattr(updater, "_verified", verified)
        return verified(version)

    monkeypatch.setattr(updater, "_verified", move_meanwhile)
    assert not updater.step()
    found = read_current(collector.metadata, "fm")
    assert (found.version, found.by, found.pinned) == ("v1", "operator", True)


def test_an_operator_may_go_back_to_what_was_refused(tmp_path, collector, updater, published):
    replica = Replica(collector, "a", "v3")
    for _ in range(FAILURES):
        replica.look()
    updater.step()
    publish_version(tmp_path, "v4")
    updater.step()
    pointer = Pointer(collector, "fm", "operator")
    assert pointer.rollback("bad").version == "v2", "not by itself"
    publish_version(tmp_path, "v5")
    updater.step()
    assert pointer.rollback("bad", to="v3").version == "v3"
    assert refusals(collector.metadata, "fm") == {}
    assert not updater.step(), "its failures are forgotten"


def test_failures_go_with_the_version(tmp_path, collector, updater, published):
    replica = Replica(collector, "a", "v3")
    for _ in range(FAILURES):
        replica.look()
    updater.step()
    publish_version(tmp_path, "v4")
    updater.step()
    assert "v3" in collector.expire("fm")
    assert "v3" in collector.sweep("fm")
    assert (refusals(collector.metadata, "fm"), load_failures(collector.metadata, "fm")) == ({}, {})


def test_a_store_that_is_away_costs_no_more_than_the_record(collector, published, monkeypatch):
    replica = Replica(collector, "a", "v3")

    def away(*_arguments, **_options):
        raise StoreUnavailable("away")

    with monkeypatch.context() as patch:
        patch.setattr(type(collector), "holders", away)
        assert not replica.look()
    assert "its tables have another shape" in replica.loader.failure
    assert load_failures(collector.metadata, "fm") == {}
    replica.broken.clear()
    with monkeypatch.context() as patch:
        patch.setattr("rayfm.snapshots.loader.record_load", away)
        assert replica.look()


def test_records_of_many_loaders_are_counted_once_and_bounded(url, metadata):
    def fail(number: int) -> None:
        own = open_metadata(url)
        for _ in range(3):
            record_failure(own, "fm", "v1", f"replica {number}", "x" * 10_000, ())
        own.close()

    threads = [threading.Thread(target=fail, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    (failures,) = load_failures(metadata, "fm").values()
    assert failures.times == 9
    assert all(failure.times == 3 for failure in failures.loaders.values())
    for number in range(LOADERS + 5):
        failures = record_failure(metadata, "fm", "v1", f"later {number}", "x" * 10_000, ())
    assert len(failures.loaders) == LOADERS
    assert "later 0" not in failures.loaders
    assert len(metadata.get("snapshots/failures/fm/v1").value) < 50_000
    record_load(metadata, "fm", "v1", "somebody")
    record_load(metadata, "fm", "v2", "somebody")
    assert [failures.counted for failures in load_failures(metadata, "fm").values()] == [0]


def test_a_broken_record_counts_for_nothing(collector, updater, published):
    metadata = collector.metadata
    for value in (b"x", b"[]", b'{"counted": 9, "loaders": {"a": 1}}', b'{"counted": 9, "loaders": {}}'):
        while (entry := metadata.get("snapshots/failures/fm/v3")) is not None:
            metadata.delete(entry.key, entry.revision)
        metadata.compare_and_set("snapshots/failures/fm/v3", value, None)
        assert not updater.step()
        assert states(collector, "fm")["v3"] == ("current",)
    with pytest.raises(Conflict):
        metadata.compare_and_set("snapshots/failures/fm/v3", b"", None)
    Replica(collector, "a", "v3").look()
    (failures,) = load_failures(metadata, "fm").values()
    assert (failures.counted, failures.times) == (1, 1)


def test_followers_leave_it_by_themselves(tmp_path, collector, published, monkeypatch):
    """With the pauses shortened, and an updater and a loader in each of two tasks."""
    monkeypatch.setattr("rayfm.snapshots.loader.MAX_PAUSE_S", 0.02)
    replicas = [Replica(collector, name, "v3") for name in ("a", "b")]
    followers = [
        SnapshotFollower(replica.loader, Updater(collector, "fm", replica.loader.owner), poll_s=0.02)
        for replica in replicas
    ]
    deadline = time.monotonic() + 30
    while {replica.loader.version for replica in replicas} != {"v2"}:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert current(collector) == "v2"
    for follower in followers:
        follower.close()
