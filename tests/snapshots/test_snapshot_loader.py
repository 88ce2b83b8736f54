"""What a replica has in memory: loaded once, swapped whole, kept for those who name it, harmless when it dies."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from pathlib import Path

import processes
import pytest
import torch

from rayfm.config import SnapshotError
from rayfm.snapshots import (
    Collector,
    Loader,
    Pointer,
    SnapshotFollower,
    SnapshotStore,
    StoreUnavailable,
    Updater,
    open_metadata,
)
from rayfm.snapshots.collect import JOB, REPLICA
from rayfm.snapshots.keeper import LeaseKeeper
from rayfm.snapshots.publish import publish


def publish_version(root: Path, version: str) -> None:
    publish(root, "fm", version, {"w": torch.full((3,), float(version[1:]))})


class Replica:
    """A loader, and a record of what it did."""

    def __init__(self, collector: Collector, owner: str = "replica 1", spare: int = 0, lease_s: float = 30.0) -> None:
        self.collector, self.events = collector, []
        self.broken: dict[str, Exception] = {}
        self.loader = Loader(collector, "fm", owner, self.load, self.warm, spare=spare, lease_s=lease_s)

    def load(self, version: str) -> torch.Tensor:
        self.events.append(f"load {version}")
        if version in self.broken:
            raise self.broken[version]
        return self.collector.store.load("fm", version)["w"]

    def warm(self, value: torch.Tensor) -> None:
        self.events.append(f"warm v{int(value[0])}")


@pytest.fixture
def collector(tmp_path, metadata) -> Collector:
    return Collector(SnapshotStore(tmp_path), metadata, keep=1)


@pytest.fixture
def updater(collector) -> Updater:
    return Updater(collector, "fm", "updater")


@pytest.fixture
def replica(collector):
    made = Replica(collector)
    yield made
    made.loader.close()


def release(tmp_path: Path, updater: Updater, version: str) -> None:
    publish_version(tmp_path, version)
    assert updater.step()


def test_what_current_names_is_loaded_once_warmed_and_swapped_in(tmp_path, collector, updater, replica):
    loader = replica.loader
    assert not loader.step()
    with pytest.raises(SnapshotError, match="no version that can be served yet"):
        loader.current()
    release(tmp_path, updater, "v1")
    assert loader.step()
    assert not loader.step()
    assert loader.version == "v1"
    first = loader.current()
    (lease,) = collector.holders("fm", "v1")
    assert lease.owner == "replica 1"

    release(tmp_path, updater, "v2")
    answering = []
    replica.warm, warm = lambda value: None, replica.warm
    loader._warm = lambda value: (answering.append((loader.version, loader.versions())), warm(value))
    assert loader.step()
    assert answering == [("v1", ["v1"])], "the old version answers until the new one is warm"
    assert replica.events == ["load v1", "warm v1", "load v2", "warm v2"]
    assert loader.current()[0] == 2
    assert first[0] == 1, "a request that began with the old version ends with it"
    assert collector.holders("fm", "v1") == []
    assert len(collector.holders("fm", "v2")) == 1
    assert collector.expire("fm") == ["v1"]


def test_a_version_that_a_job_names_stays_in_memory(tmp_path, collector, updater, replica):
    release(tmp_path, updater, "v1")
    replica.loader.step()
    job = collector.hold("fm", "v1", "label job", 60.0)
    release(tmp_path, updater, "v2")
    other = Replica(collector, "replica 2")
    other.loader.step()
    assert replica.loader.step()
    assert replica.loader.versions() == ["v1", "v2"]
    assert replica.loader.get("v1")[0] == 1
    assert replica.events.count("load v1") == 1
    assert [lease.owner for lease in collector.holders("fm", "v1", JOB)] == ["label job"]
    assert [lease.owner for lease in collector.holders("fm", "v1", REPLICA)] == ["replica 1"]
    assert collector.expire("fm") == []
    collector.metadata.release(job)
    assert not replica.loader.step()
    assert replica.loader.versions() == ["v2"]
    assert collector.expire("fm") == ["v1"]
    assert other.loader.versions() == ["v2"]
    other.loader.close()


def test_named_versions_are_loaded_beside_and_the_spare_ones_stay(tmp_path, collector, updater):
    for version in ("v1", "v2", "v3"):
        publish_version(tmp_path, version)
    updater.step()
    replica = Replica(collector, spare=1)
    replica.loader.step()
    for version in ("v1", "v2", "v2", "v1", "v1"):
        assert replica.loader.get(version)[0] == int(version[1:])
        assert replica.loader.version == "v3"
    assert replica.loader.get("v3")[0] == 3
    assert replica.loader.versions() == ["v1", "v3"]
    assert [event for event in replica.events if event[0] == "l"] == ["load v3", "load v1", "load v2", "load v1"]
    with pytest.raises(SnapshotError, match="not published"):
        replica.loader.get("v9")
    with pytest.raises(SnapshotError, match="use letters"):
        replica.loader.get("../v1")
    replica.loader.close()
    assert [collector.holders("fm", version) for version in ("v1", "v2", "v3")] == [[], [], []]


def test_requests_at_once_load_a_version_once(tmp_path, collector, updater):
    release(tmp_path, updater, "v1")
    replica = Replica(collector, spare=1)
    load = replica.load
    replica.loader._load = lambda version: (time.sleep(0.1), load(version))[1]
    threads = [threading.Thread(target=replica.loader.get, args=("v1",)) for _ in range(4)]
    for thread in [*threads, threading.Thread(target=replica.loader.step)]:
        thread.start()
    for thread in threads:
        thread.join(60)
    replica.loader.step()
    assert replica.events.count("load v1") == 1
    replica.loader.close()


@pytest.mark.parametrize("error", [SnapshotError("no such model"), MemoryError("too large"), KeyError("table")])
def test_a_version_that_cannot_be_loaded_leaves_the_old_one_answering(
    tmp_path, collector, updater, replica, monkeypatch, caplog, error
):
    clock = [100.0]
    monkeypatch.setattr("rayfm.snapshots.loader.time.monotonic", lambda: clock[0])
    release(tmp_path, updater, "v1")
    replica.loader.step()
    replica.broken["v2"] = error
    release(tmp_path, updater, "v2")
    for _ in range(3):
        with caplog.at_level(logging.ERROR):
            assert not replica.loader.step()
        assert replica.loader.version == "v1"
        assert "fm@v2" in replica.loader.failure
    assert replica.events.count("load v2") == 1, "it is not tried at each look"
    assert collector.holders("fm", "v2") == []
    assert len(collector.holders("fm", "v1")) == 1
    clock[0] += 3.0
    assert not replica.loader.step()
    assert replica.events.count("load v2") == 2
    clock[0] += 3.0
    assert not replica.loader.step()
    assert replica.events.count("load v2") == 2, "the pauses grow"
    del replica.broken["v2"]
    clock[0] += 3.0
    assert replica.loader.step()
    assert (replica.loader.version, replica.loader.failure) == ("v2", None)


def test_a_newer_version_does_not_wait_for_a_broken_one(tmp_path, updater, replica):
    replica.broken["v1"] = SnapshotError("broken")
    release(tmp_path, updater, "v1")
    assert not replica.loader.step()
    with pytest.raises(SnapshotError, match="no version that can be served yet: fm@v1: broken"):
        replica.loader.current()
    release(tmp_path, updater, "v2")
    assert replica.loader.step()


def test_bytes_that_changed_after_the_update_are_not_loaded(tmp_path, collector, updater, replica):
    release(tmp_path, updater, "v1")
    replica.loader.step()
    release(tmp_path, updater, "v2")
    (path,) = collector.store.folder("fm", "v2").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    assert not replica.loader.step()
    assert "bytes differ" in replica.loader.failure
    assert replica.loader.version == "v1"
    assert "load v2" not in replica.events


def test_replicas_follow_a_rollback_and_a_pin(tmp_path, collector, updater, replica):
    for version in ("v1", "v2"):
        release(tmp_path, updater, version)
        replica.loader.step()
    pointer = Pointer(collector, "fm", "operator")
    pointer.rollback("bad")
    assert replica.loader.step()
    assert (replica.loader.version, replica.loader.versions()) == ("v1", ["v1"])
    pointer.pin("v2", "again")
    assert replica.loader.step()
    assert replica.loader.version == "v2"


def test_leases_are_extended_until_a_newer_version_is_in(tmp_path, collector, updater):
    release(tmp_path, updater, "v1")
    replica = Replica(collector, lease_s=1.2)
    replica.loader.step()
    (first,) = collector.holders("fm", "v1")
    publish_version(tmp_path, "v2")
    for _ in range(4):
        time.sleep(0.4)
        assert collector.expire("fm") == [], "held, far beyond the lease's first time"
    (later,) = collector.holders("fm", "v1")
    assert later.token == first.token
    assert later.expires > first.expires + 0.5
    updater.step()
    replica.loader.step()
    assert collector.expire("fm") == ["v1"]
    replica.loader.close()
    assert collector.holders("fm", "v2") == []


def load_and_die(root: Path, url: str) -> None:
    collector = Collector(SnapshotStore(root), open_metadata(url))

    def load(version: str) -> None:
        assert collector.holders("fm", version), "held before the first byte is read"
        os.kill(os.getpid(), signal.SIGKILL)

    Loader(collector, "fm", "dies half-way", load, lease_s=1.5).step()


def test_a_loader_that_dies_half_way_leaves_nothing_behind(tmp_path, collector, updater, replica, url):
    release(tmp_path, updater, "v1")
    dying = processes.context().Process(target=load_and_die, args=(tmp_path, url))
    dying.start()
    dying.join(60)
    assert dying.exitcode == -signal.SIGKILL
    publish_version(tmp_path, "v2")
    updater.step()
    assert replica.loader.step(), "others are not kept waiting"
    deadline = time.monotonic() + 10
    while collector.holders("fm", "v1"):
        assert time.monotonic() < deadline, "the dead loader's lease must end by itself"
        time.sleep(0.1)
    assert collector.expire("fm") == ["v1"]
    assert collector.sweep("fm") == ["v1"]


def test_a_replica_that_was_paused_answers_and_holds_its_version_anew(tmp_path, collector, updater, replica, caplog):
    release(tmp_path, updater, "v1")
    replica.loader.step()
    (lease,) = collector.holders("fm", "v1")
    collector.metadata.release(lease)  # as when it has expired
    replica.loader._keeper.extend()
    assert replica.loader.current()[0] == 1
    assert not replica.loader.step()
    (anew,) = collector.holders("fm", "v1")
    assert anew.token > lease.token
    assert replica.events.count("load v1") == 1

    collector.metadata.release(anew)
    replica.loader._keeper.extend()
    collector.metadata.compare_and_set("snapshots/tombstones/fm/v1", b"", None)
    with caplog.at_level(logging.WARNING):
        replica.loader.step()
        replica.loader.step()
    assert caplog.text.count("answers from memory alone") == 1
    assert replica.loader.current()[0] == 1
    release(tmp_path, updater, "v2")
    assert replica.loader.step()
    assert replica.loader.versions() == ["v2"]


def test_requests_never_see_a_mixture_or_a_gap(tmp_path, collector, updater, replica):
    release(tmp_path, updater, "v1")
    replica.loader.step()
    stop, wrong, served = threading.Event(), [], set()

    def ask() -> None:
        while not stop.is_set():
            value = replica.loader.current()
            served.add(int(value[0]))
            if len(set(value.tolist())) != 1:
                wrong.append(value)

    clients = [threading.Thread(target=ask) for _ in range(2)]
    for client in clients:
        client.start()
    for number in range(2, 7):
        release(tmp_path, updater, f"v{number}")
        assert replica.loader.step()
        deadline = time.monotonic() + 10
        while number not in served and time.monotonic() < deadline:
            time.sleep(0.001)
    stop.set()
    for client in clients:
        client.join(60)
    assert not wrong
    assert served == {1, 2, 3, 4, 5, 6}


def wait_until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_follower_updates_loads_and_survives_what_fails(tmp_path, collector, caplog):
    publish_version(tmp_path, "v1")
    replica = Replica(collector)
    updater = Updater(collector, "fm", "updater")
    follower = SnapshotFollower(replica.loader, updater, poll_s=0.02)
    assert follower.current()[0] == 1, "the first version is there before the follower is"
    publish_version(tmp_path, "v2")
    wait_until(lambda: replica.loader.version == "v2")
    step = updater.step
    looks = []

    def fail() -> bool:
        looks.append(1)
        raise StoreUnavailable("the store is away")

    updater.step = fail
    with caplog.at_level(logging.ERROR):
        wait_until(lambda: len(looks) > 5)
    assert caplog.text.count("the store is away") == 1, "once, not at each look"
    updater.step = step
    publish_version(tmp_path, "v3")
    wait_until(lambda: replica.loader.version == "v3")
    follower.close()
    publish_version(tmp_path, "v4")
    time.sleep(0.1)
    assert replica.loader.version == "v3"
    assert collector.holders("fm", "v3") == []


def test_a_follower_goes_on_through_zookeepers_death(tmp_path, zookeeper_server):
    url = f"zookeeper://{zookeeper_server.address}/death"
    with contextlib.closing(open_metadata(url)) as metadata:
        collector = Collector(SnapshotStore(tmp_path), metadata, keep=1)
        publish_version(tmp_path, "v1")
        replica = Replica(collector, lease_s=10.0)
        follower = SnapshotFollower(replica.loader, Updater(collector, "fm", "updater"), poll_s=0.05)
        (lease,) = collector.holders("fm", "v1")
        zookeeper_server.kill()
        try:
            publish_version(tmp_path, "v2")
            time.sleep(0.3)
            assert follower.current()[0] == 1
        finally:
            zookeeper_server.start()
        wait_until(lambda: follower.loader.version == "v2")
        assert [held.token for held in collector.holders("fm", "v1")] in ([], [lease.token])
        wait_until(lambda: collector.expire("fm") == ["v1"])
        follower.close()


def test_a_keeper_gives_up_lost_leases_and_returns_the_others(metadata):
    keeper = LeaseKeeper(metadata, 60.0)
    with keeper.keeping(metadata.acquire("l/1", "me", 60.0)) as first:
        second = metadata.acquire("l/2", "me", 60.0)
        keeper.keep(second)
        keeper.extend()
        assert keeper.kept(first)
        metadata.release(second)
        keeper.extend()
        assert keeper.kept(first)
        assert not keeper.kept(second)
    assert not keeper.kept(first)
    assert list(metadata.leases("l/")) == []
    keeper.keep(metadata.acquire("l/3", "me", 60.0))
    keeper.close()
    assert list(metadata.leases("l/")) == []
