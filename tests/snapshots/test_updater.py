"""`current`: who moves it, where it never goes, and what keeps a broken version out."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from rayfm.config import SnapshotError
from rayfm.snapshots import Collector, Conflict, Pointer, SnapshotStore, Updater, open_metadata, refusals
from rayfm.snapshots.current import TRIES, Current, pause_s, read_current, refuse
from rayfm.snapshots.manifest import MANIFEST
from rayfm.snapshots.publish import publish
from rayfm.snapshots.updater import verify_again


def publish_version(root: Path, version: str, fill: float = 1.0) -> None:
    publish(root, "fm", version, {"w": torch.full((3,), fill)})


def corrupt(root: Path, version: str) -> Path:
    (path,) = SnapshotStore(root).folder("fm", version).glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return path


def mend(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.fixture
def collector(tmp_path, metadata) -> Collector:
    return Collector(SnapshotStore(tmp_path), metadata, keep=1)


@pytest.fixture
def updater(collector) -> Updater:
    return Updater(collector, "fm", "task 1")


@pytest.fixture
def pointer(collector) -> Pointer:
    return Pointer(collector, "fm", "an operator")


def current(collector: Collector) -> str | None:
    found = read_current(collector.metadata, "fm")
    return None if found is None else found.version


def test_the_newest_version_becomes_current_and_older_ones_never_do(tmp_path, collector, updater):
    assert not updater.step()
    assert current(collector) is None
    for version in ("v1", "v3"):
        publish_version(tmp_path, version)
    assert updater.step()
    assert current(collector) == "v3"
    publish_version(tmp_path, "v2")  # late
    assert not updater.step()
    assert not Updater(collector, "fm", "task 2").step()
    publish_version(tmp_path, "v4")
    assert Updater(collector, "fm", "task 2").step()
    found = read_current(collector.metadata, "fm")
    assert (found.version, found.by, found.pinned) == ("v4", "task 2", False)


def end_pauses(collector: Collector, *updaters: Updater) -> None:
    """As when the time has passed until a version that failed is tried again, also by these."""
    for lease in collector.metadata.leases("snapshots/pauses/"):
        collector.metadata.release(lease)
    for updater in updaters:
        updater._turns = dict.fromkeys(updater._turns, 0.0)


def fail_for_all(collector: Collector) -> None:
    """As many updaters look as it takes to leave what fails."""
    for number in range(TRIES):
        Updater(collector, "fm", f"task {number + 1}").step()
        end_pauses(collector)


def watch_verify(monkeypatch) -> list[str]:
    """The versions whose files are read from now on."""
    verified: list[str] = []
    verify = SnapshotStore.verify
    monkeypatch.setattr(SnapshotStore, "verify", lambda self, m, v: (verified.append(v), verify(self, m, v))[1])
    return verified


def test_a_corrupt_version_is_refused_kept_out_and_reported(tmp_path, collector, caplog, monkeypatch):
    updaters = [Updater(collector, "fm", f"task {number + 1}") for number in range(TRIES)]
    publish_version(tmp_path, "v1")
    updaters[0].step()
    publish_version(tmp_path, "v2")
    path = corrupt(tmp_path, "v2")
    verified = watch_verify(monkeypatch)
    for attempt in range(2 * TRIES):
        with caplog.at_level(logging.ERROR):
            assert not updaters[attempt % TRIES].step()
            assert not updaters[(attempt + 1) % TRIES].step(), "it is left alone for a while"
        assert len(verified) == min(attempt + 1, TRIES)
        assert current(collector) == "v1"
        end_pauses(collector, *updaters)
    assert verified == ["v2"] * TRIES, "it must not be tried for ever"
    assert caplog.text.count("bytes differ") == TRIES
    (refusal,) = refusals(collector.metadata, "fm").values()
    assert (refusal.tries, refusal.times, refusal.by) == (TRIES, TRIES, f"task {TRIES}")
    assert path.name in refusal.reason

    publish_version(tmp_path, "v3")
    assert updaters[0].step()
    assert current(collector) == "v3"
    assert set(refusals(collector.metadata, "fm")) == {"v2"}
    with pytest.raises(SnapshotError, match="bytes differ"):
        verify_again(collector, "fm", "v2")
    mend(path)
    assert verify_again(collector, "fm", "v2")
    assert refusals(collector.metadata, "fm") == {}
    assert not verify_again(collector, "fm", "v2")


def test_one_updater_on_a_bad_machine_keeps_a_version_from_nobody(tmp_path, collector):
    class BadMount(SnapshotStore):
        def verify(self, model, version):
            raise SnapshotError("a file cannot be read (Input/output error)")

    bad = Updater(Collector(BadMount(tmp_path), collector.metadata), "fm", "bad")
    publish_version(tmp_path, "v1")
    for times in range(1, 2 * TRIES):
        assert not bad.step()
        (refusal,) = refusals(collector.metadata, "fm").values()
        assert (refusal.tries, refusal.times) == (1, times)
        end_pauses(collector, bad)
    good = Updater(collector, "fm", "good")
    assert good.step()
    assert current(collector) == "v1"
    assert refusals(collector.metadata, "fm") == {}


def test_the_stores_clock_ends_a_pause_and_others_come_first(tmp_path, collector, monkeypatch):
    publish_version(tmp_path, "v1")
    path = corrupt(tmp_path, "v1")
    first, other = (Updater(collector, "fm", by, pause_s=0.5) for by in ("first", "other"))
    monkeypatch.setattr("rayfm.snapshots.updater.OTHERS_FIRST", 1000.0)
    assert not first.step()
    mend(path)
    verified = watch_verify(monkeypatch)
    assert not other.step()
    assert verified == []
    time.sleep(0.7)
    assert not first.step()
    assert verified == []
    assert other.step()
    assert current(collector) == "v1"


def test_what_was_readmitted_is_tried_at_once(tmp_path, collector, updater):
    publish_version(tmp_path, "v1")
    path = corrupt(tmp_path, "v1")
    assert not updater.step()
    mend(path)
    assert not updater.step()
    assert verify_again(collector, "fm", "v1")
    assert updater.step()


def test_pauses_grow():
    assert [pause_s(times) for times in (1, 2, 3, 4, 5, 10**6)] == [30.0, 120.0, 480.0, 1920.0, 3600.0, 3600.0]


def test_a_mended_version_is_taken_before_it_is_given_up(tmp_path, collector, updater):
    publish_version(tmp_path, "v1")
    path = corrupt(tmp_path, "v1")
    assert not updater.step()
    mend(path)
    end_pauses(collector, updater)
    assert updater.step()
    assert current(collector) == "v1"
    assert refusals(collector.metadata, "fm") == {}


def test_a_version_that_is_deleted_while_it_is_read_is_not_refused(tmp_path, collector, updater, monkeypatch):
    publish_version(tmp_path, "v1")
    verify = SnapshotStore.verify

    def delete_first(self, model, version):
        shutil.rmtree(self.folder(model, version))
        return verify(self, model, version)

    monkeypatch.setattr(SnapshotStore, "verify", delete_first)
    assert not updater.step()
    assert refusals(collector.metadata, "fm") == {}


def test_of_several_newer_versions_the_newest_intact_one_is_taken(tmp_path, collector, updater):
    for version in ("v1", "v2", "v3", "v4"):
        publish_version(tmp_path, version)
    corrupt(tmp_path, "v4")
    (SnapshotStore(tmp_path).folder("fm", "v3") / MANIFEST).write_text("{}")
    assert updater.step()
    assert current(collector) == "v2"
    assert set(refusals(collector.metadata, "fm")) == {"v3", "v4"}


def test_a_version_that_this_code_cannot_use_is_left_to_others(tmp_path, collector, caplog, monkeypatch):
    publish_version(tmp_path, "v1")
    publish_version(tmp_path, "v2")

    def check(manifest):
        if manifest.version == "v2":
            raise ValueError("a model of the future")

    old = Updater(collector, "fm", "an old build", check)
    verified = watch_verify(monkeypatch)
    with caplog.at_level(logging.ERROR):
        assert old.step()
        assert current(collector) == "v1"
        for number in range(2 * TRIES):
            assert not old.step()
            assert not Updater(collector, "fm", f"old build {number}", check).step()
    assert verified == ["v1"]
    assert refusals(collector.metadata, "fm") == {}
    assert caplog.text.count("a model of the future") == 2 * TRIES + 1, "each says it once"
    assert Updater(collector, "fm", "a new build").step()
    assert current(collector) == "v2"


def test_a_rollback_bars_what_it_left_and_newer_versions_are_taken(tmp_path, collector, updater, pointer):
    for version in ("v1", "v2", "v3"):
        publish_version(tmp_path, version)
    with pytest.raises(SnapshotError, match="no current version"):
        pointer.rollback("bad")
    updater.step()
    assert pointer.rollback("calibration is off").version == "v2"
    assert not updater.step(), "v3 is barred"
    found = read_current(collector.metadata, "fm")
    assert (found.version, found.barred, found.by, found.reason) == (
        "v2",
        "v3",
        "an operator",
        "calibration is off",
    )
    assert pointer.rollback("worse", to="v1").version == "v1"
    assert not updater.step(), "v2 and v3 are barred"
    for to in ("v1", "v3"):
        with pytest.raises(SnapshotError, match="is not older"):
            pointer.rollback("again", to=to)
    with pytest.raises(SnapshotError, match="no intact version older than v1"):
        pointer.rollback("again")
    publish_version(tmp_path, "v4")
    assert updater.step()
    assert current(collector) == "v4"


def test_a_rollback_passes_over_a_broken_version(tmp_path, collector, updater, pointer):
    publish_version(tmp_path, "v1")
    publish_version(tmp_path, "v2")
    corrupt(tmp_path, "v2")
    publish_version(tmp_path, "v3")
    for _ in range(2):
        updater.step()
    assert current(collector) == "v3"
    with pytest.raises(SnapshotError, match="bytes differ"):
        pointer.rollback("bad", to="v2")
    with pytest.raises(SnapshotError, match="not published"):
        pointer.rollback("bad", to="v0")
    assert current(collector) == "v3"
    assert pointer.rollback("bad").version == "v1"


def test_a_pin_holds_until_it_is_taken_away(tmp_path, collector, updater, pointer):
    for version in ("v1", "v2"):
        publish_version(tmp_path, version)
    updater.step()
    with pytest.raises(SnapshotError, match="is not pinned"):
        pointer.unpin()
    assert pointer.pin("v1", "an experiment").pinned
    publish_version(tmp_path, "v3")
    assert not updater.step()
    assert current(collector) == "v1"
    with pytest.raises(SnapshotError, match="not published"):
        pointer.pin("v9", "?")
    corrupt(tmp_path, "v2")
    with pytest.raises(SnapshotError, match="bytes differ"):
        pointer.pin("v2", "?")
    assert pointer.unpin().version == "v1"
    assert updater.step()
    assert current(collector) == "v3"


def test_collection_spares_the_current_version_however_old(tmp_path, collector, updater, pointer):
    for version in ("v1", "v2", "v3"):
        publish_version(tmp_path, version)
    updater.step()
    pointer.rollback("bad", to="v1")
    assert collector.expire("fm") == ["v2"]
    assert collector.sweep("fm") == ["v2"]
    assert collector.store.versions("fm") == ["v1", "v3"]
    # `current` moved there between the look and the tombstone: the sweep sees it.
    collector.metadata.compare_and_set("snapshots/tombstones/fm/v1", b"", None)
    assert collector.sweep("fm") == []
    assert collector.tombstones("fm") == []
    collector.store.verify("fm", "v1")


def test_versions_that_were_given_up_do_not_push_out_intact_ones(tmp_path, collector, updater):
    for version in ("v1", "v2", "v3", "v4"):
        publish_version(tmp_path, version)
    for version in ("v2", "v4"):
        corrupt(tmp_path, version)
    fail_for_all(collector)
    assert current(collector) == "v3"
    assert collector.expire("fm") == ["v1", "v2"]
    corrupt(tmp_path, "v3")
    assert collector.expire("fm") == []


def test_a_version_that_was_refused_goes_no_earlier_than_an_intact_one(tmp_path, metadata):
    """Who can say that it is broken? A person may still mend it, or find it intact."""
    collector = Collector(SnapshotStore(tmp_path), metadata, keep=2)
    for number in range(1, 7):
        publish_version(tmp_path, f"v{number}")
    for version in ("v3", "v5", "v6"):
        refuse(metadata, "fm", version, "said to differ", "a bad machine", for_good=True)
    # Newer and intact than v3: v4 alone. v1 has v2 and v4.
    assert collector.expire("fm") == ["v1"]
    publish_version(tmp_path, "v7")
    assert collector.expire("fm") == ["v2", "v3"]
    for version in ("v4", "v7"):
        refuse(metadata, "fm", version, "said to differ", "a bad machine", for_good=True)
    assert collector.expire("fm") == [], "with nothing intact, everything stays"


def test_current_never_moves_to_what_is_being_deleted(tmp_path, collector, updater, pointer):
    publish_version(tmp_path, "v1")
    publish_version(tmp_path, "v2")
    collector.metadata.compare_and_set("snapshots/tombstones/fm/v2", b"", None)
    with pytest.raises(SnapshotError, match="being deleted"):
        pointer.pin("v2", "race")
    assert updater.step()
    assert current(collector) == "v1"


@pytest.mark.parametrize("first", [True, False])
def test_a_move_whose_hold_is_lost_is_undone(tmp_path, collector, pointer, monkeypatch, first):
    for version in ("v1", "v2"):
        publish_version(tmp_path, version)
    before = None if first else pointer.move(None, Current("v1", "me"))
    held = collector.hold

    def hold_and_lose(*arguments):
        lease = held(*arguments)
        collector.metadata.release(lease)  # as if this process had been paused for longer than the hold
        return lease

    monkeypatch.setattr(collector, "hold", hold_and_lose)
    with pytest.raises(SnapshotError, match="is lost"):
        pointer.move(before, Current("v2", "me"))
    assert current(collector) == (None if first else "v1")


def test_a_paused_updater_does_not_move_current_back(tmp_path, collector, url, monkeypatch):
    publish_version(tmp_path, "v1")
    verifying, go_on = threading.Event(), threading.Event()
    paused = Updater(collector, "fm", "paused", lease_s=60.0)
    check = paused._verified

    def pause(version):
        verified = check(version)
        verifying.set()
        assert go_on.wait(60)
        return verified

    monkeypatch.setattr(paused, "_verified", pause)
    moved = []
    thread = threading.Thread(target=lambda: moved.append(paused.step()))
    thread.start()
    assert verifying.wait(60)
    other = Updater(collector, "fm", "other")
    assert not other.step(), "one reads the files, the others leave it alone"
    (lease,) = collector.metadata.leases("snapshots/updating/")
    collector.metadata.release(lease)  # as when it has expired
    publish_version(tmp_path, "v2")
    assert other.step()
    go_on.set()
    thread.join(60)
    assert moved == [False]
    found = read_current(collector.metadata, "fm")
    assert (found.version, found.by) == ("v2", "other")


def update_until(root: Path, url: str, last: str, by: str) -> None:
    metadata = open_metadata(url)  # its own connection, as another process has
    updater = Updater(Collector(SnapshotStore(root), metadata), "fm", by)
    deadline = time.monotonic() + 60
    while (found := read_current(metadata, "fm")) is None or found.version != last:
        assert time.monotonic() < deadline
        updater.step()
    metadata.close()


def test_racing_updaters_move_forward_alone(tmp_path, collector, url):
    last = "v09"
    pool = ThreadPoolExecutor(3)
    racers = [pool.submit(update_until, tmp_path, url, last, f"task {i}") for i in range(3)]
    seen = []
    for number in range(1, 10):
        publish_version(tmp_path, f"v{number:02d}")
        for _ in range(4):
            seen.append(read_current(collector.metadata, "fm"))
            time.sleep(0.01)
    for racer in racers:
        racer.result(60)
    moves = [found for found in seen if found is not None] + [read_current(collector.metadata, "fm")]
    assert [found.version for found in moves] == sorted(found.version for found in moves)
    assert [found.revision for found in moves] == sorted(found.revision for found in moves)
    assert moves[-1].version == last


def test_a_stale_move_is_a_conflict(tmp_path, collector, pointer):
    for version in ("v1", "v2"):
        publish_version(tmp_path, version)
    old = pointer.move(None, Current("v1", "me"))
    pointer.move(old, Current("v2", "me"))
    with pytest.raises(Conflict):
        pointer.move(old, Current("v1", "me"))
    with pytest.raises(Conflict):
        pointer.move(None, Current("v1", "me"))


def test_a_broken_record_is_said_plainly(collector, updater):
    collector.metadata.compare_and_set("snapshots/current/fm", b"v1", None)
    with pytest.raises(SnapshotError, match="does not say which version is current"):
        updater.step()
