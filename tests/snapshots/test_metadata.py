"""What every metadata store must do, on SQLite and on a real ZooKeeper; real processes race for it."""

from __future__ import annotations

import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import time

import processes
import pytest

from rayfm.config import ConfigError, SnapshotError
from rayfm.snapshots.metadata import (
    Conflict,
    LeaseHeld,
    LeaseLost,
    MetadataStore,
    SQLiteMetadataStore,
    check_metadata_url,
    open_metadata,
    read_fenced,
    write_fenced,
)


@pytest.fixture
def store(metadata) -> MetadataStore:
    return metadata


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
    lease = store.acquire("job/x", "me", 1.0)
    for _ in range(4):
        time.sleep(0.3)
        lease = store.extend(lease, 1.0)
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
    racers = [processes.context().Process(target=count_up, args=(store, 40)) for _ in range(3)]
    for racer in racers:
        racer.start()
    count_up(store, 40)
    for racer in racers:
        racer.join(60)
        assert racer.exitcode == 0
    assert store.get("counter").value == b"160"


def test_of_processes_racing_for_a_lease_one_gets_it(store):
    start, results = processes.context().Event(), processes.context().Queue()
    racers = [processes.context().Process(target=take, args=(store, f"p{i}", start, results)) for i in range(3)]
    for racer in racers:
        racer.start()
    start.set()
    tokens = dict(results.get(timeout=60) for _ in racers)
    for racer in racers:
        racer.join(60)
    assert sum(token is not None for token in tokens.values()) == 1


def hold_and_die(store: MetadataStore) -> None:
    store.compare_and_set("k", b"v", None)
    store.acquire("l", "dead", 1.0)
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_wrote_stands_and_its_lease_expires(store):
    killed = processes.context().Process(target=hold_and_die, args=(store,))
    killed.start()
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    assert store.get("k").value == b"v"
    with pytest.raises(LeaseHeld, match="'dead'"):
        store.acquire("l", "alive", 1.0)
    time.sleep(1.0)
    assert store.acquire("l", "alive", 1.0).owner == "alive"


def hold_paused(store: MetadataStore, pipe) -> None:
    lease = store.acquire("job/x", "paused", 1.0)
    write_fenced(store, "result", b"paused", lease)
    read = store.get("plain")
    pipe.send(lease)
    pipe.recv()
    for attempt in (
        lambda: write_fenced(store, "result", b"late", lease),
        lambda: store.extend(lease, 60.0),
        lambda: store.compare_and_set("plain", b"late", read.revision),
    ):
        try:
            attempt()
            pipe.send("allowed")
        except (LeaseLost, Conflict) as error:
            pipe.send(type(error).__name__)


def test_a_paused_holder_of_an_expired_lease_is_refused(store):
    store.compare_and_set("plain", b"before", None)
    here, there = processes.context().Pipe()
    paused = processes.context().Process(target=hold_paused, args=(store, there))
    paused.start()
    lease = here.recv()
    os.kill(paused.pid, signal.SIGSTOP)  # as a machine that swaps, or a virtual one that is moved
    with pytest.raises(LeaseHeld):
        store.acquire("job/x", "successor", 60.0)
    time.sleep(1.1)
    successor = store.acquire("job/x", "successor", 60.0)
    assert successor.token > lease.token
    write_fenced(store, "result", b"successor", successor)
    store.compare_and_set("plain", b"successor", store.get("plain").revision)
    os.kill(paused.pid, signal.SIGCONT)
    here.send("go on")
    assert [here.recv() for _ in range(3)] == ["LeaseLost", "LeaseLost", "Conflict"]
    paused.join(60)
    assert (read_fenced(store, "result").token, read_fenced(store, "result").value) == (successor.token, b"successor")
    assert store.get("plain").value == b"successor"
    store.extend(successor, 1.0)


def test_a_fenced_key_holds_nothing_else(store):
    assert read_fenced(store, "k") is None
    store.compare_and_set("k", b"plain", None)
    with pytest.raises(SnapshotError, match="not written under a lease"):
        write_fenced(store, "k", b"x", store.acquire("l", "me", 10.0))


def test_a_lease_that_was_counted_dead_stays_dead(store):
    lease = store.acquire("job/x", "me", 0.3)
    time.sleep(0.4)
    assert list(store.leases("job/")) == []
    with pytest.raises(LeaseLost):
        store.extend(lease, 60.0)
    assert list(store.leases("")) == []


@pytest.mark.parametrize("skew_s", [-1e6, 1e6])
def test_a_clients_clock_does_not_matter(store, monkeypatch, skew_s):
    lease = store.acquire("job/x", "me", 1.0)
    real = time.time
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: real() + skew_s)
        with pytest.raises(LeaseHeld):
            store.acquire("job/x", "skewed", 1.0)
        other = store.acquire("job/y", "skewed", 1.0)
        lease = store.extend(lease, 1.0)
    assert abs(other.expires - lease.expires) < 1.0
    assert {held.name for held in store.leases("job/")} == {"job/x", "job/y"}
    time.sleep(1.1)
    assert list(store.leases("job/")) == []


def test_revisions_and_tokens_grow_over_all_keys(store):
    first = store.compare_and_set("a", b"1", None)
    second = store.compare_and_set("b", b"1", None)
    assert store.compare_and_set("a", b"1", first) > second > first, "an equal value is a change too"
    tokens = []
    for name in ("x", "y", "x"):
        lease = store.acquire(name, "me", 60.0)
        tokens.append(lease.token)
        store.release(lease)
    assert tokens == sorted(set(tokens))


def test_a_key_and_keys_below_it_come_and_go_apart(store):
    upper = store.compare_and_set("a/b", b"upper", None)
    lower = store.compare_and_set("a/b/c", b"lower", None)
    store.delete("a/b", upper)
    assert store.get("a/b") is None
    assert store.get("a/b/c").value == b"lower"
    again = store.compare_and_set("a/b", b"again", None)
    store.delete("a/b/c", lower)
    assert [(entry.key, entry.value) for entry in store.list("")] == [("a/b", b"again")]
    store.delete("a/b", again)
    assert store.list("") == []


def test_a_store_pickles_as_its_address(store):
    store.compare_and_set("k", b"v", None)
    assert pickle.loads(pickle.dumps(store)).get("k").value == b"v"


def test_a_closed_store_opens_again(store):
    store.compare_and_set("k", b"v", None)
    store.close()
    assert store.get("k").value == b"v"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("/a/path.db", "write sqlite:///absolute/path or zookeeper://"),
        ("redis://localhost:1/0", "write sqlite:///absolute/path or zookeeper://"),
        ("sqlite://relative.db", "three slashes"),
        ("sqlite:///", "three slashes"),
        ("zookeeper://host/root", "'host' is not host:port"),
        ("zookeeper://a:2181,b:99999/root", "'b:99999' is not host:port"),
        ("zookeeper:///root", "'' is not host:port"),
        ("zookeeper://a:2181/ro ot", "the root is a path"),
        ("zookeeper://a:2181/../x", "the root is a path"),
        ("zookeeper://a:2181/zookeeper/x", "choose another root"),
        ("zookeeper://a:2181/x?y=1", "no '\\?'"),
        ("zookeeper://[::1/x", "metadata store"),
    ],
)
def test_odd_urls_are_refused(text, complaint):
    with pytest.raises(ConfigError, match=complaint):
        open_metadata(text)
    with pytest.raises(ValueError, match=complaint):
        check_metadata_url(text)


def test_urls_name_stores(tmp_path, monkeypatch):
    assert repr(open_metadata("zookeeper://a:1,b:2")) == "ZooKeeperMetadataStore('a:1,b:2', '/rayfm')"
    assert repr(open_metadata("zookeeper://a:1/x/y/")) == "ZooKeeperMetadataStore('a:1', '/x/y')"
    assert open_metadata(f"sqlite://{tmp_path}/a%20b.db").path == tmp_path / "a b.db"
    monkeypatch.setitem(sys.modules, "kazoo", None)
    monkeypatch.setitem(sys.modules, "kazoo.client", None)
    monkeypatch.delitem(sys.modules, "rayfm.snapshots.metadata.tree", raising=False)
    monkeypatch.delitem(sys.modules, "rayfm.snapshots.metadata.zookeeper", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'rayfm\[cluster\]'"):
        open_metadata("zookeeper://a:1")


def test_sqlite_rolls_back_what_a_killed_process_left_open(tmp_path):
    store = SQLiteMetadataStore(tmp_path / "meta.db")
    code = (
        "import os, signal, sys; from rayfm.snapshots.metadata import SQLiteMetadataStore as S; s = S(sys.argv[1]);"
        "s.compare_and_set('k', b'v', None);"
        "s._connection().execute('BEGIN IMMEDIATE'); s._connection().execute('DELETE FROM entries');"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "meta.db")], timeout=60)
    assert store.get("k").value == b"v"


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
