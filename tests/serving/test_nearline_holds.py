from __future__ import annotations

import time

import pyarrow as pa
import pytest
from nearline_cases import MODEL, TEACHER, V1, V2, Oracle, config, publish_teacher, rows

from rayfm.config import ConfigError, SnapshotError, validate
from rayfm.serving.nearline.application import make_intake
from rayfm.serving.nearline.config import NearLineConfig
from rayfm.serving.nearline.consumer import NearLineConsumer
from rayfm.serving.nearline.holds import VersionHolds
from rayfm.serving.nearline.rows import Versions
from rayfm.serving.nearline.spool import ROW, Spool
from rayfm.snapshots import SnapshotStore
from rayfm.snapshots.collect import Collector
from rayfm.snapshots.current import Pointer
from rayfm.snapshots.metadata import SQLiteMetadataStore, StoreUnavailable


@pytest.fixture
def root(tmp_path):
    for version in (V1, V2):
        publish_teacher(tmp_path, version)
    return tmp_path


@pytest.fixture
def collector(root):
    return Collector(SnapshotStore(root), SQLiteMetadataStore(root / "metadata.sqlite"), keep=1)


def held(collector) -> dict[str, int]:
    return {version: len(collector.holders(MODEL, version)) for version in (V1, V2)}


def test_what_is_current_labels(root, collector, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("rayfm.serving.nearline.rows.time.monotonic", lambda: clock[0])
    versions = Versions(collector.store, MODEL, None, collector.metadata)
    assert versions.current().version == V2, "the newest, where nothing was ever current"
    Pointer(collector, MODEL, "test").pin(V1, "a test")
    clock[0] += 60
    assert versions.current().version == V1
    assert Versions(collector.store, MODEL, V2, collector.metadata).current().version == V2

    def down(key: str) -> None:
        raise StoreUnavailable("the metadata store does not answer")

    monkeypatch.setattr(collector.metadata, "get", down)
    clock[0] += 60
    assert versions.current().version == V1, "what was current goes on labelling"
    with pytest.raises(StoreUnavailable):
        Versions(collector.store, MODEL, None, collector.metadata).current()


def test_a_version_is_held_once_and_given_back(collector):
    holds = VersionHolds(collector, MODEL, 60.0)
    holds.keep(V1)
    holds.keep(V1)
    assert held(collector) == {V1: 1, V2: 0}
    holds.only({V1, V2, "2020-01-01-gone"})
    assert held(collector) == {V1: 1, V2: 1}
    holds.only({V2})
    assert held(collector) == {V1: 0, V2: 1}
    with pytest.raises(SnapshotError, match="is not published"):
        holds.keep("2020-01-01-gone")


def test_a_hold_that_was_lost_is_taken_anew(collector, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("rayfm.serving.nearline.holds.time.monotonic", lambda: clock[0])
    holds = VersionHolds(collector, MODEL, 60.0)
    holds.keep(V1)
    collector.metadata.release(collector.holders(MODEL, V1)[0])
    holds.keep(V1)
    assert held(collector)[V1] == 0, "asked for again at once, it is taken for held"
    clock[0] += 20
    holds.keep(V1)
    assert held(collector)[V1] == 1
    before = collector.holders(MODEL, V1)[0]
    clock[0] += 20
    time.sleep(0.01)  # the store's clock counts milliseconds
    holds.keep(V1)
    (after,) = collector.holders(MODEL, V1)
    assert after.token == before.token
    assert after.expires > before.expires


def test_the_snapshot_of_accepted_rows_stays_until_they_are_labelled(root, collector, redis_server):
    settings = config(
        root,
        run="holds",
        redis=f"redis://{redis_server.address}/0",
        version=V1,
        metadata=f"sqlite://{root / 'metadata.sqlite'}",
        consumer={"sweep_s": 0.2},
    )
    intake = make_intake(settings)
    accepted = intake.accept(rows(3))
    assert accepted.version == V1
    assert held(collector)[V1] == 1, "the intake's"
    consumer = NearLineConsumer(settings.dump(), "none", Oracle())
    try:
        # V1 is neither the newest nor current: without holds it would go.
        Pointer(collector, MODEL, "test").pin(V2, "a test")
        until(lambda: held(collector)[V1] == 2)
        collector.expire(MODEL)
        assert collector.sweep(MODEL) == []
        assert V1 in collector.store.versions(MODEL)
        consumer.label(accepted.ticket)
        assert consumer.spool.status(accepted.ticket).state == "committed"
        until(lambda: held(collector)[V1] == 1)
        intake._holds.only(set())
        collector.expire(MODEL)
        collector.sweep(MODEL)
        assert V1 not in collector.store.versions(MODEL), "nothing holds it any more"
    finally:
        consumer.stop()


def test_damaged_tickets_name_no_version(tmp_path):
    spool = Spool(tmp_path, TEACHER)
    tickets = [spool.accept(pa.table({"example_id": [1], ROW: [0]}), version) for version in (V1, V2, V2)]
    assert spool.versions() == {V1, V2}
    spool.bury(tickets[0], "test")
    assert spool.versions() == {V2}
    (spool.folder / "queued" / f"{tickets[1]}.arrow").write_bytes(b"x")
    assert Spool(tmp_path, TEACHER).versions() == {V2}
    (spool.folder / "queued" / f"{tickets[2]}.arrow").write_bytes(b"x")
    assert Spool(tmp_path, TEACHER).versions() == set()


def test_the_metadata_store_is_a_url(root):
    with pytest.raises(ConfigError, match="write sqlite:///absolute/path or zookeeper"):
        validate(NearLineConfig, config(root).dump() | {"metadata": "etcd://host:1"}, "near.yaml")


def until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


@pytest.mark.parametrize(("sweep_s", "hold_s"), [(2.0, 600.0), (60.0, 600.0), (300.0, 1200.0)])
def test_a_hold_outlives_consumers_that_wait_for_a_machine(root, sweep_s, hold_s):
    settings = config(root).model_copy(
        update={"consumer": config(root).consumer.model_copy(update={"sweep_s": sweep_s})}
    )
    assert settings.hold_s == hold_s
