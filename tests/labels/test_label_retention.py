from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable
from stored_lanes import LANES, PERIOD, ROWS, all_lanes, check_complete, lane_labels, run_job, write

from rayfm.config import ConfigError, LabelError, validate
from rayfm.labels import LabelGroup, LabelLookup, LabelStore, Retention, compact, expire, retention
from rayfm.snapshots import SQLiteMetadataStore

A, B, C = "2022-04-23-aa", "2022-04-24-bb", "2022-04-25-cc"
NEXT = "2022-04-27"


@pytest.fixture
def store(tmp_path) -> LabelStore:
    return LabelStore(tmp_path, SQLiteMetadataStore(tmp_path / "meta.db"))


def what(expiries) -> list[tuple[str, str, str, int]]:
    return [(item.teacher, item.period, item.version, item.rows) for item in expiries]


def stored(store: LabelStore) -> set[tuple[str, str, str]]:
    return {(part.teacher, part.period, part.version) for part in store.list()}


def test_superseded_versions_go_in_one_commit(store):
    run_job(store.root, A)
    run_job(store.root, B)
    run_job(store.root, A, NEXT)
    store.commit([write(store.root, version=C)])
    store.commit([write(store.root, version=A, teacher="big")])
    before = store.open().version()
    gone = expire(store, Retention(keep_versions=1))
    assert what(gone) == [("fm", PERIOD, A, 2 * LANES * ROWS)], "C has one lane only: it supersedes nothing"
    assert store.open().version() == before + 1
    assert stored(store) == {("big", PERIOD, A), ("fm", PERIOD, B), ("fm", PERIOD, C), ("fm", NEXT, A)}
    check_complete(store.root, B)
    assert expire(store, Retention(keep_versions=1)) == []
    assert store.open().version() == before + 1, "nothing to do is no commit"


def test_as_many_superseding_versions_as_asked_for(store):
    for version in (A, B, C):
        run_job(store.root, version)
    assert what(expire(store, Retention(keep_versions=2)))[0][2] == A
    assert store.versions("fm") == [B, C]
    assert expire(store, Retention(keep_versions=2)) == []


class Period(str):
    """Counts how often one is compared to another."""

    compared = 0

    def __eq__(self, other):
        Period.compared += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def test_a_version_is_compared_to_those_of_its_period_alone():
    periods = [Period(f"p{number:04d}") for number in range(300)]
    stored = [
        LabelGroup("fm", period, version, "impression", lane, 10, 10)
        for period in periods
        for version in (A, B)
        for lane in range(2)
    ]
    chosen = retention._chosen(stored, Retention(keep_versions=1))
    assert chosen == {("fm", period, A): 20 for period in periods}
    assert Period.compared < 10 * len(stored), "and not one for each pair of periods"


def test_old_periods_go(store):
    for period in ("2022-03-31", "2022-04-01", PERIOD):
        store.commit([write(store.root, period=period, version=A, trained_through=None)])
        store.commit([write(store.root, period=period, version=A, trained_through=None, teacher="big")])
    assert what(expire(store, Retention(before="2022-04", teacher="fm"))) == [("fm", "2022-03-31", A, ROWS)]
    assert what(expire(store, Retention(before=PERIOD))) == [
        ("big", "2022-03-31", A, ROWS),
        ("big", "2022-04-01", A, ROWS),
        ("fm", "2022-04-01", A, ROWS),
    ]
    assert stored(store) == {("fm", PERIOD, A), ("big", PERIOD, A)}


def test_conditions_are_met_together(store):
    run_job(store.root, A)
    run_job(store.root, A, NEXT)
    run_job(store.root, B)
    assert what(expire(store, Retention(version=A, period=NEXT, keep_versions=1))) == []
    assert what(expire(store, Retention(version=A, period=PERIOD, keep_versions=1)))[0][1:3] == (PERIOD, A)
    assert stored(store) == {("fm", NEXT, A), ("fm", PERIOD, B)}


def test_what_is_pinned_stays_and_says_for_whom(store):
    run_job(store.root, A)
    run_job(store.root, B)
    pin = store.pin("fm", A, "students")
    (kept,) = expire(store, Retention(keep_versions=1))
    assert kept.kept_for == ("students",)
    check_complete(store.root, A)
    store.release(pin)
    (gone,) = expire(store, Retention(keep_versions=1))
    assert gone.kept_for == ()
    assert store.versions("fm") == [B]


def test_a_dry_run_changes_nothing(store):
    run_job(store.root, A)
    before = store.open().version()
    assert what(expire(store, Retention(version=A), dry_run=True)) == [("fm", PERIOD, A, 2 * LANES * ROWS)]
    assert store.open().version() == before


@pytest.mark.parametrize("lanes", [1, LANES])
def test_out_of_a_file_of_several_versions_one_goes(store, lanes):
    """Delta Lake's own compaction, by whatever program, mixes versions."""
    root = Path(store.root)
    for version, offset in ((A, 0.0), (B, 0.001), (C, 0.002)):
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(2 * ROWS, dtype=np.float32) + offset), 2)
        for lane in range(lanes):
            labels = lane_labels(lane, offset=offset).append_column("representation", vectors)
            store.commit([write(root, lane, labels, version=version, trained_through=None)])
    DeltaTable(str(root / "labels")).optimize.compact()
    assert len(DeltaTable(str(root / "labels")).file_uris()) == 1
    assert what(expire(store, Retention(version=B))) == [("fm", PERIOD, B, lanes * ROWS)]
    assert stored(store) == {("fm", PERIOD, A), ("fm", PERIOD, C)}
    for version, offset in ((A, 0.0), (C, 0.002)):
        found = LabelLookup((root, None), "fm", version, ("click",), 2)
        for lane in range(lanes):
            labels = lane_labels(lane, offset=offset)
            at = (PERIOD, "impression", lane, 0, ROWS, labels["example_id"].to_numpy())
            assert found.rows(*at)[0].tobytes() == labels["click"].to_numpy().tobytes()
            expected = (np.arange(2 * ROWS, dtype=np.float32) + np.float32(offset)).tobytes()
            assert found.vectors(*at)[0].tobytes() == expected


def test_after_a_compaction_too(store):
    run_job(store.root, A)
    run_job(store.root, B)
    compact(store)
    before = set(store.open().file_uris())
    expire(store, Retention(version=A))
    assert set(store.open().file_uris()) < before, "versions lie in files of their own: none is written anew"
    check_complete(store.root, B)


def test_an_expired_version_can_be_labelled_again(store):
    run_job(store.root, A)
    expire(store, Retention(version=A))
    assert store.labelled_lanes("fm", A, PERIOD) == set()
    assert run_job(store.root, A).added == 2 * LANES
    check_complete(store.root, A)


def test_an_expiry_and_other_writers_take_turns(store, monkeypatch):
    """A lane that is committed after the decision makes it be taken again, on the newer table."""
    from rayfm.labels import retention

    run_job(store.root, A)
    records = [write(store.root, lane, labels, kind=kind, version=B) for kind, lane, labels in all_lanes()]
    store.commit(records[:-1])
    real, calls = retention.apply, []

    def commit_first(table, change):
        if not calls:
            calls.append(LabelStore(store.root).commit(records[-1:]))
        return real(table, change)

    monkeypatch.setattr(retention, "apply", commit_first)
    expire(store, Retention(version=A))
    assert calls[0].added == 1
    assert store.versions("fm") == [B]
    check_complete(store.root, B)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({}, "say what to expire: version, period, before or keep_versions"),
        ({"teacher": "fm"}, "say what to expire"),
        ({"before": "../x"}, "before '../x': use letters"),
        ({"keep_versions": 0}, "greater than or equal to 1"),
        ({"verison": "v"}, "did you mean 'version'"),
    ],
)
def test_a_retention_that_says_nothing_or_nonsense_is_refused(values, complaint):
    with pytest.raises(ConfigError, match=complaint):
        validate(Retention, values)


def test_without_metadata_nothing_that_may_be_pinned_goes(store):
    run_job(store.root, A)
    with pytest.raises(LabelError, match="expiry needs the metadata store"):
        expire(LabelStore(store.root), Retention(version=A))
    check_complete(store.root, A)


def test_an_empty_store_has_nothing_to_expire(store):
    assert expire(store, Retention(version=A)) == []


# -- versions that a student cannot have -------------------------------------------------------------------------


def test_each_way_not_to_have_a_version_has_its_own_message(store):
    root = store.root
    run_job(root, A)
    with pytest.raises(
        LabelError, match=r"fm@v9 in version 1 of the table: it never labelled; .*versions: 2022-04-23-aa"
    ):
        store.pin("fm", "v9", "me")
    with pytest.raises(LabelError, match="unknown teacher; did you mean 'fm'"):
        store.pin("fmm", A, "me")
    early = store.open().version()
    run_job(root, B)
    with pytest.raises(
        LabelError, match=f"{B} in version {early} of the table: they came later; pin version {early + 1}"
    ):
        store.pin("fm", B, "me", table_version=early)
    with pytest.raises(LabelError, match="has no version 99, its newest is 2"):
        store.pin("fm", A, "me", table_version=99)
    expire(store, Retention(version=A))
    with pytest.raises(LabelError, match=f"{A} .* they were expired; its newest versions: {B}; ask for one of them"):
        store.pin("fm", A, "me")
    pin = store.pin("fm", A, "me", table_version=early)
    store.release(pin)
    store.vacuum(retention_hours=0)
    with pytest.raises(LabelError, match=f"version {early} of the label table is vacuumed .* is 3.*pin the newest"):
        store.pin("fm", A, "me", table_version=early)
    assert list(store.metadata.leases("labels/pins/")) == [], "who is refused holds nothing"


def test_a_training_worker_gets_the_same_message(store):
    from rayfm.serving.labelling import StoredLabels
    from rayfm.training.spec import PinnedLabels

    run_job(store.root, A)
    early = store.open().version()
    run_job(store.root, B)
    expire(store, Retention(version=A))
    labels = StoredLabels(store.root, store.metadata, "students")
    lookup = labels.lookup("fm", PinnedLabels(version=A, table_version=early), ("click",))
    ids = lane_labels(0)["example_id"].to_numpy()
    assert lookup.rows(PERIOD, "impression", 0, 0, ROWS, ids)[1].all(), "the ticket's table version has them"
    with pytest.raises(LabelError, match="they were expired"):
        labels.lookup("fm", PinnedLabels(version=A, table_version=early + 2), ("click",))
    with pytest.raises(LabelError, match="it never labelled"):
        labels.lookup("fm", PinnedLabels(version="v9", table_version=early), ("click",))
    labels.release()
    store.vacuum(retention_hours=0)
    with pytest.raises(LabelError, match=r"is vacuumed .* run `rayfm label` again"):
        labels.lookup("fm", PinnedLabels(version=A, table_version=early), ("click",))
