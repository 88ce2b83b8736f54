"""What every metadata store must do. A store is one entry in STORES; real processes race for it."""

from __future__ import annotations

import multiprocessing
import pickle
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rayfm.config import SnapshotError
from rayfm.snapshots.metadata import (
    Conflict,
    LeaseHeld,
    LeaseLost,
    MetadataStore,
    SQLiteMetadataStore,
)

STORES: dict[str, Callable[[Path], MetadataStore]] = {"sqlite": lambda folder: SQLiteMetadataStore(folder / "meta.db")}
SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture(params=sorted(STORES))
def store(request, tmp_path) -> MetadataStore:
    return STORES[request.param](tmp_path)


def test_values_change_only_from_the_expected_revision(store):
    assert store.get("a/b") is None
    first = store.compare_and_set("a/b", b"1", None)
    entry = store.get("a/b")
    assert (entry.key, entry.value, entry.revision) == ("a/b", b"1", first)
    with pytest.raises(Conflict, match="a/b"):
        store.compare_and_set("a/b", b"x", None)
    second = store.compare_and_set("a/b", b"2", first)
    assert second > first
    with pytest.raises(Conflict):
        store.compare_and_set("a/b", b"x", first)
    with pytest.raises(Conflict):
        store.delete("a/b", first)
    assert store.get("a/b").value == b"2"
    store.delete("a/b", second)
    assert store.get("a/b") is None
    with pytest.raises(Conflict):
        store.delete("a/b", second)
    with pytest.raises(Conflict):
        store.compare_and_set("a/b", b"x", second)
    assert store.compare_and_set("a/b", b"3", None) > second, "a revision must never come back"


def test_list_is_by_folder_and_sorted(store):
    for key in ("a/c", "a/b/d", "ab/x", "a/b", "b/a", "a0"):
        store.compare_and_set(key, key.encode(), None)
    assert [entry.key for entry in store.list("a/")] == ["a/b", "a/b/d", "a/c"]
    assert [entry.key for entry in store.list("a/b/")] == ["a/b/d"]
    assert len(store.list("")) == 6
    assert list(store.list("nothing/")) == []


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a", "a/../b", "a/.b", "a b", "a\n"])
def test_odd_keys_are_refused(store, key):
    with pytest.raises(SnapshotError, match="metadata key"):
        store.get(key)
    with pytest.raises(SnapshotError):
        store.acquire(key, "me", 1.0)


def test_a_lease_is_exclusive_until_released(store):
    lease = store.acquire("job/x", "one", 60.0)
    with pytest.raises(LeaseHeld, match="'one'"):
        store.acquire("job/x", "two", 60.0)
    with pytest.raises(LeaseHeld):
        store.acquire("job/x", "one", 60.0)
    assert [held.name for held in store.leases("job/")] == ["job/x"]
    assert list(store.leases("other/")) == []
    longer = store.extend(lease, 120.0)
    assert longer.token == lease.token
    assert longer.expires > lease.expires
    store.release(lease)
    assert list(store.leases("job/")) == []
    with pytest.raises(LeaseLost):
        store.extend(lease, 1.0)
    assert store.acquire("job/x", "two", 60.0).token > lease.token


def test_an_expired_lease_is_lost_and_its_paused_holder_is_fenced(store):
    paused = store.acquire("job/x", "paused", 0.2)
    other = store.acquire("job/y", "other", 60.0)
    time.sleep(0.3)
    assert [lease.name for lease in store.leases("job/")] == ["job/y"]
    successor = store.acquire("job/x", "successor", 60.0)
    assert paused.token < other.token < successor.token
    with pytest.raises(LeaseLost, match="paused"):
        store.extend(paused, 60.0)
    store.release(paused)  # must not end the successor's
    assert store.extend(successor, 60.0).owner == "successor"


def test_an_expired_lease_cannot_be_extended_even_if_nobody_took_it(store):
    lease = store.acquire("job/x", "me", 0.1)
    time.sleep(0.2)
    with pytest.raises(LeaseLost):
        store.extend(lease, 60.0)


def test_extending_keeps_a_lease_past_its_first_time(store):
    lease = store.acquire("job/x", "me", 0.5)
    for _ in range(4):
        time.sleep(0.2)
        lease = store.extend(lease, 0.5)
    with pytest.raises(LeaseHeld):
        store.acquire("job/x", "you", 1.0)


@pytest.mark.parametrize("ttl", [0.0, -1.0, float("inf"), float("nan")])
def test_odd_lease_times_are_refused(store, ttl):
    with pytest.raises(SnapshotError, match="seconds"):
        store.acquire("job/x", "me", ttl)


def count_up(store: MetadataStore, times: int) -> None:
    for _ in range(times):
        while True:
            entry = store.get("counter")
            try:
                store.compare_and_set("counter", b"%d" % (int(entry.value) + 1), entry.revision)
                break
            except Conflict:
                continue


def take(store: MetadataStore, owner: str, start, results) -> None:
    start.wait()
    try:
        results.put((owner, store.acquire("only/one", owner, 60.0).token))
    except LeaseHeld:
        results.put((owner, None))


def test_processes_racing_lose_no_update(store):
    store.compare_and_set("counter", b"0", None)
    racers = [SPAWN.Process(target=count_up, args=(store, 40)) for _ in range(3)]
    for racer in racers:
        racer.start()
    count_up(store, 40)
    for racer in racers:
        racer.join(60)
        assert racer.exitcode == 0
    assert store.get("counter").value == b"160"


def test_of_processes_racing_for_a_lease_one_gets_it(store):
    start, results = SPAWN.Event(), SPAWN.Queue()
    racers = [SPAWN.Process(target=take, args=(store, f"p{i}", start, results)) for i in range(3)]
    for racer in racers:
        racer.start()
    start.set()
    tokens = dict(results.get(timeout=60) for _ in racers)
    for racer in racers:
        racer.join(60)
    assert sum(token is not None for token in tokens.values()) == 1


def test_what_a_killed_process_wrote_stands_and_its_lease_expires(tmp_path):
    store = SQLiteMetadataStore(tmp_path / "meta.db")
    code = (
        "import os, signal, sys; from rayfm.snapshots.metadata import SQLiteMetadataStore as S; s = S(sys.argv[1]);"
        "s.compare_and_set('k', b'v', None); s.acquire('l', 'dead', 0.3);"
        "s._connection().execute('BEGIN IMMEDIATE'); s._connection().execute('DELETE FROM entries');"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "meta.db")], timeout=60)
    assert store.get("k").value == b"v", "the open transaction must be rolled back"
    time.sleep(0.4)
    assert store.acquire("l", "alive", 1.0).token == 2


def test_a_store_pickles_as_its_path(store):
    store.compare_and_set("k", b"v", None)
    assert pickle.loads(pickle.dumps(store)).get("k").value == b"v"


def test_sqlite_clock_never_runs_back(tmp_path):
    store = SQLiteMetadataStore(tmp_path / "meta.db")
    lease = store.acquire("l", "me", 10.0)
    with sqlite3.connect(tmp_path / "meta.db") as connection:  # as if the machine's clock had been 100 s ahead
        connection.execute("UPDATE state SET clock = clock + 100")
    with pytest.raises(LeaseLost):
        store.extend(lease, 10.0)
    assert store.acquire("l", "you", 10.0).expires > lease.expires + 90


def test_sqlite_refuses_what_is_no_store(tmp_path):
    (tmp_path / "file").write_bytes(b"not a database, but long enough to be read as one" * 20)
    with pytest.raises(SnapshotError, match="metadata store"):
        SQLiteMetadataStore(tmp_path / "file")
    with pytest.raises(SnapshotError, match="metadata store"):
        SQLiteMetadataStore(tmp_path / "file" / "below")
