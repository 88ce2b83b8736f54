"""The ZooKeeper store through lost replies, lost sessions and a killed server: nothing lost, nothing doubled."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import servers
from kazoo.client import KazooClient, TransactionRequest
from kazoo.exceptions import ConnectionLoss

from rayfm.config import SnapshotError
from rayfm.snapshots.metadata import Conflict, LeaseHeld, LeaseLost, MetadataStore, StoreUnavailable, open_metadata
from rayfm.snapshots.metadata.cells import read_cells
from rayfm.snapshots.metadata.tree import Tree
from rayfm.snapshots.metadata.zookeeper import MAX_VALUE_BYTES, ZooKeeperMetadataStore


@pytest.fixture
def store(zookeeper_server) -> Iterator[ZooKeeperMetadataStore]:
    url = f"zookeeper://{zookeeper_server.address}/faults/{uuid.uuid4().hex}"
    with contextlib.closing(open_metadata(url)) as opened:
        yield opened
    zookeeper_server.start()


class Lost:
    """The reply to a request whose connection breaks."""

    def get(self, timeout=None):
        raise ConnectionLoss


class BreakingConnection:
    """Breaks the connection at the next transaction, before or after the server has carried it out.

    Args:
        how: ``before``: the request is lost; ``after``: only the reply is; ``straggler``: the request reaches the
            server once the client has given it up (`arrive`).
    """

    def __init__(self, monkeypatch, how: str) -> None:
        self.how, self.faults, self.held = how, 1, []
        self.meanwhile = lambda: None
        commit = TransactionRequest.commit_async

        def commit_async(request: TransactionRequest):
            if not self.faults:
                return commit(request)
            self.faults -= 1
            if self.how == "after":
                commit(request).get(timeout=10)
            elif self.how == "straggler":
                self.held.append(request)
            self.meanwhile()
            return Lost()

        self.arrive = lambda: [commit(request).get(timeout=10) for request in self.held]
        monkeypatch.setattr(TransactionRequest, "commit_async", commit_async)


@pytest.mark.parametrize("how", ["before", "after", "straggler"])
def test_a_write_whose_reply_is_lost_happens_once(store, monkeypatch, how):
    old = store.compare_and_set("k", b"1", None)
    breaking = BreakingConnection(monkeypatch, how)
    new = store.compare_and_set("k", b"2", old)
    assert breaking.faults == 0
    entry = store.get("k")
    assert (entry.value, entry.revision) == (b"2", new)
    assert new > old
    breaking.arrive()
    assert store.get("k") == entry

    breaking.held.clear()
    breaking.faults = 1
    store.delete("k", new)
    breaking.arrive()
    assert store.get("k") is None


@pytest.mark.parametrize("how", ["before", "after", "straggler"])
def test_a_lease_whose_reply_is_lost_is_held_once(store, monkeypatch, how):
    breaking = BreakingConnection(monkeypatch, how)
    lease = store.acquire("l", "me", 30.0)
    (held,) = store.leases("")
    assert held == lease
    breaking.arrive()
    breaking.held.clear()
    assert list(store.leases("")) == [lease]
    breaking.faults = 1
    longer = store.extend(lease, 60.0)
    assert longer.token == lease.token
    assert [one.expires for one in store.leases("")] == [longer.expires]
    breaking.faults = 1
    store.release(longer)
    breaking.arrive()
    assert list(store.leases("")) == []


def test_a_straggler_of_a_refused_write_never_lands(store, monkeypatch):
    other = open_metadata(f"zookeeper://{store.hosts}{store.root}")
    store.compare_and_set("k/below", b"keeps the folder of k there", None)
    revisions = []
    breaking = BreakingConnection(monkeypatch, "straggler")
    breaking.meanwhile = lambda: revisions.append(other.compare_and_set("k", b"other", None))
    with pytest.raises(Conflict):
        store.compare_and_set("k", b"mine", None)
    other.delete("k", revisions[-1])
    breaking.arrive()  # by now there is no k again, as this write expected
    assert store.get("k") is None
    other.close()


def test_a_key_made_anew_is_not_the_one_that_was_read(store, monkeypatch):
    old = store.compare_and_set("k", b"1", None)
    other = open_metadata(f"zookeeper://{store.hosts}{store.root}")
    read = Tree.read

    def read_then_lose_the_race(tree, folder, key):
        cell = read(tree, folder, key)
        monkeypatch.setattr(Tree, "read", read)
        other.delete("k", old)
        other.compare_and_set("k", b"other", None)  # the same key, the same number of changes
        return cell

    monkeypatch.setattr(Tree, "read", read_then_lose_the_race)
    with pytest.raises(Conflict):
        store.compare_and_set("k", b"2", old)
    assert store.get("k").value == b"other"
    other.close()


def write_counting(store: MetadataStore, key: str, stop: threading.Event, done: list[int], errors: list) -> None:
    """One writer counts up: a conflict would mean that a write which it thought lost had happened after all."""
    revision = store.compare_and_set(key, b"0", None)
    try:
        while not stop.is_set():
            revision = store.compare_and_set(key, b"%d" % (done[0] + 1), revision)
            done[0] += 1
    except Exception as error:
        errors.append(error)


def test_a_server_killed_under_writes_loses_and_doubles_none(store, zookeeper_server):
    lease = store.acquire("held/through", "me", 120.0)
    stop, errors = threading.Event(), []
    counts = {f"counter/{i}": [0] for i in range(3)}
    stores = {key: open_metadata(f"zookeeper://{store.hosts}{store.root}") for key in counts}
    writers = [
        threading.Thread(target=write_counting, args=(stores[key], key, stop, done, errors))
        for key, done in counts.items()
    ]
    for writer in writers:
        writer.start()
    reached = []
    for _ in range(3):
        time.sleep(0.3)
        zookeeper_server.restart()
        before = sum(done[0] for done in counts.values())
        while sum(done[0] for done in counts.values()) < before + 3 and not errors:
            time.sleep(0.02)
        reached.append(before)
    stop.set()
    for writer in writers:
        writer.join(60)
    assert not errors
    for key, done in counts.items():
        assert store.get(key).value == b"%d" % done[0]
    assert reached[0] < reached[-1], "writes went on between the kills"
    assert store.extend(lease, 1.0).token == lease.token, "a lease outlives the server's death"
    for opened in stores.values():
        opened.close()


def test_an_ensemble_that_loses_its_leaders_loses_no_write(tmp_path):
    members = servers.zookeeper_ensemble(tmp_path)
    stop, errors, done = threading.Event(), [], [0]
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(len(members)) as pool:
        for member in members:
            stack.callback(member.stop)
        list(pool.map(servers.Server.start, members))
        store = stack.enter_context(
            contextlib.closing(open_metadata(f"zookeeper://{','.join(member.address for member in members)}/test"))
        )
        lease = store.acquire("l", "me", 120.0)
        writer = threading.Thread(target=write_counting, args=(store, "k", stop, done, errors))
        writer.start()
        stack.callback(stop.set)
        for _ in range(2):
            (leader,) = [member for member in members if b"Mode: leader" in member.ask()]
            leader.kill()
            before, deadline = done[0], time.monotonic() + 30
            while done[0] < before + 5 and not errors:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            leader.start()
        stop.set()
        writer.join(60)
        assert not errors
        assert store.get("k").value == b"%d" % done[0]
        assert store.extend(lease, 1.0).token == lease.token


def expire_session(store: ZooKeeperMetadataStore) -> int:
    """End the session as the server does that has not heard of it for too long; returns its id."""
    session = store._tree._client.client_id
    thief = KazooClient(store.hosts, client_id=session)
    thief.start()
    thief.stop()  # which closes the session that both have
    thief.close()
    return session[0]


def test_a_lost_session_loses_no_lease_and_no_write(store):
    revision = store.compare_and_set("k", b"1", None)
    lease = store.acquire("l", "me", 30.0)
    for value in (b"2", b"3"):
        session = expire_session(store)
        revision = store.compare_and_set("k", value, revision)
        assert store._tree._client.client_id[0] != session
        assert store.get("k").value == value
        with pytest.raises(LeaseHeld):
            store.acquire("l", "you", 1.0)
        lease = store.extend(lease, 30.0)


def test_a_frozen_server_is_waited_for(store, zookeeper_server):
    revision = store.compare_and_set("k", b"1", None)
    lease = store.acquire("l", "me", 0.5)
    zookeeper_server.pause()
    thaw = threading.Timer(1.0, zookeeper_server.resume)
    thaw.start()
    try:
        assert store.compare_and_set("k", b"2", revision) > revision
    finally:
        thaw.join()
        zookeeper_server.resume()
    assert store.get("k").value == b"2"
    with pytest.raises(LeaseLost):
        store.extend(lease, 1.0)


def test_servers_that_do_not_answer_are_said_plainly_and_found_again(zookeeper_server):
    address = zookeeper_server.address
    store = ZooKeeperMetadataStore(address, f"/faults/{uuid.uuid4().hex}", wait_s=1.0)
    revision = store.compare_and_set("k", b"1", None)
    zookeeper_server.kill()
    try:
        for attempt in (
            lambda: store.get("k"),
            lambda: store.list(""),
            lambda: store.compare_and_set("k", b"2", revision),
            lambda: ZooKeeperMetadataStore(address, wait_s=0.5).get("k"),
        ):
            with pytest.raises(StoreUnavailable, match=f"{address} does not answer for"):
                attempt()
    finally:
        zookeeper_server.start()
    entry = store.get("k")
    assert entry.value in (b"1", b"2")
    store.compare_and_set("k", b"3", entry.revision)
    assert store.get("k").value == b"3"
    store.close()


def test_a_writers_znode_that_was_pruned_is_made_again(store):
    revision = store.compare_and_set("k", b"1", None)
    client = store._tree._client
    (own,) = client.get_children(f"{store.root}/clients")
    client.delete(f"{store.root}/clients/{own}")
    store.compare_and_set("k", b"2", revision)
    assert store.get("k").value == b"2"
    store.close()
    reader = ZooKeeperMetadataStore(store.hosts, store.root)
    reader.get("k")
    assert reader._tree._client.get_children(f"{store.root}/clients") == [], "who ends takes its znode along"
    assert reader._tree._client.get_children(f"{store.root}/entries") == ["k"]
    reader.close()


def test_nothing_is_left_of_what_was_removed(store):
    lease = store.acquire("a/b/c", "me", 30.0)
    revision = store.compare_and_set("a/b/c", b"1", None)
    store.release(lease)
    store.delete("a/b/c", revision)
    client = store._tree._client
    assert client.get_children(f"{store.root}/entries") == client.get_children(f"{store.root}/leases") == []


def test_a_folder_that_another_removes_while_a_key_is_made_in_it_is_made_again(store, monkeypatch):
    other = open_metadata(f"zookeeper://{store.hosts}{store.root}")
    create, removed = KazooClient.create_async, []

    def create_async(client, path, *args, **options):
        if path.endswith("/a/b") and not removed:
            removed.append(path.rpartition("/")[0])
            other._tree._client.delete(removed[0])  # as `remove` tidies it away: empty at this moment
        return create(client, path, *args, **options)

    other.get("a/b/c")
    monkeypatch.setattr(KazooClient, "create_async", create_async)
    store.compare_and_set("a/b/c", b"1", None)
    assert removed == [f"{store.root}/entries/a"]
    assert other.get("a/b/c").value == b"1"
    other.close()


@pytest.fixture
def scarred(store) -> ZooKeeperMetadataStore:
    """A store whose server has missed that a value of ``k`` was replaced, as ZooKeeper 3.8.0's do at times."""
    store.compare_and_set("k", b"1", None)
    cell = store._tree.read("entries", "k")
    store._tree._client.create(f"{store.root}/entries/k/=/former", b"former")
    store._tree.put("entries", "k", cell, b"2")
    return store


def test_of_two_values_the_one_written_last_counts(scarred, caplog):
    entry = scarred.get("k")
    assert entry.value == b"2"
    assert [found.value for found in scarred.list("")] == [b"2"]
    revision = scarred.compare_and_set("k", b"3", entry.revision)
    with pytest.raises(Conflict):
        scarred.compare_and_set("k", b"4", entry.revision)
    assert scarred.get("k").revision == revision
    (warning,) = [record.message for record in caplog.records if "former values of k" in record.message]
    assert scarred.hosts in warning


def test_a_key_with_a_former_value_can_be_removed(scarred):
    scarred.delete("k", scarred.get("k").revision)
    assert scarred.get("k") is None
    scarred.compare_and_set("k", b"again", None)
    assert len(scarred._tree._client.get_children(f"{scarred.root}/entries/k/=")) == 1
    assert scarred.get("k").value == b"again"


def test_a_leader_whose_former_values_nobody_shows_is_said_plainly(scarred, monkeypatch):
    cell = scarred._tree.read("entries", "k")
    # As of a server that has them not.
    monkeypatch.setattr("rayfm.snapshots.metadata.tree.read_cells", lambda *asked: read_cells(*asked)[-1:])
    with pytest.raises(StoreUnavailable, match=r"servers differ about .*/entries/k/= .*restart the one that leads"):
        scarred._tree.remove("entries", "k", cell)
    monkeypatch.undo()
    assert scarred.get("k").value == b"2"


def test_values_that_zookeeper_cannot_hold_are_refused(store):
    store.compare_and_set("k", b"x" * MAX_VALUE_BYTES, None)
    with pytest.raises(SnapshotError, match="ZooKeeper holds at most"):
        store.compare_and_set("l", b"x" * (MAX_VALUE_BYTES + 1), None)


def test_a_list_is_of_one_moment(store):
    other = open_metadata(f"zookeeper://{store.hosts}{store.root}")
    revision, stop = other.compare_and_set("m/0", b"", None), threading.Event()

    def swap() -> None:
        value, at = 0, revision
        while not stop.is_set():
            value += 1
            at = other.compare_and_set("m/0", b"%d" % value, at)
            second = other.compare_and_set("n", b"%d" % value, None)
            time.sleep(0.01)
            other.delete("n", second)

    mover = threading.Thread(target=swap)
    mover.start()
    try:
        seen = 0
        while seen < 10:
            found = {entry.key: entry.value for entry in store.list("")}
            seen += "n" in found
            assert found.get("n", found["m/0"]) == found["m/0"], "n was written after m/0 and removed before it changed"
    finally:
        stop.set()
        mover.join(60)
        other.close()
