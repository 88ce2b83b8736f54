"""A trainer whose ids get rows of their own: counted, kept, published, served with the same mapping."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from example_store import every_feature_schema, write_store
from training_runs import PERIODS, Free, IdLabels, learner, losses, spec, train_here, train_on

from rayfm.config import ConfigError, RayfmError
from rayfm.data.encode import Encoder
from rayfm.data.store import ExampleStore
from rayfm.data.vocabulary import Vocabulary
from rayfm.schema import Schema
from rayfm.serving.exported import load_exported
from rayfm.serving.gang.sharded import ShardedVersion
from rayfm.serving.teacher import load_version, score_table
from rayfm.snapshots.ids import load_vocabularies
from rayfm.snapshots.load import SnapshotStore
from rayfm.training.calibration import CountsCalibration
from rayfm.training.ids import Vocabularies, count_ids
from rayfm.training.loop import TrainingLoop
from rayfm.training.progress import progress_file
from rayfm.training.trainer import single_process_group

MIN_COUNT = 20


def schema() -> Schema:
    """Users and ads (single ids and sequences of strings) have vocabularies, tags and topics have none."""
    plain = every_feature_schema().dump()
    for name in ("user", "ad"):
        plain["tables"][name] |= {"id_policy": "vocabulary", "vocabulary": {"min_count": MIN_COUNT}}
    return Schema.model_validate(plain)


def trainer(store, run_dir, **training):
    return spec(store, run_dir, learner("dcnv2"), **training).model_copy(update={"schema_": schema()})


def records(trained):
    return [
        json.loads((trained.folder / "periods" / f"{period}.json").read_text())["ids"] for period in trained.periods
    ]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("store")
    write_store(root, list(PERIODS), impressions=300, considerations=100)
    return root


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory):
    found = trainer(store, tmp_path_factory.mktemp("unbroken"))
    train_here(found)
    return found


def impressions(store, period):
    examples = ExampleStore(store)
    lanes = [examples.open_lane(period, "impression", lane).read() for lane in range(4)]
    return pa.concat_tables(lanes)


def test_ids_are_counted_over_all_features_of_a_table(store):
    rows = impressions(store, PERIODS[0])
    features = [schema().feature("user")]
    ids, counts = count_ids(ExampleStore(store), PERIODS[0], features, range(4))
    expected = rows["user"].drop_null().value_counts().to_pylist()
    assert dict(zip(ids.tolist(), counts.tolist(), strict=True)) == {e["values"]: e["counts"] for e in expected}
    both = [schema().feature("ad"), schema().feature("history")]
    _, counts = count_ids(ExampleStore(store), PERIODS[0], both, range(4))
    assert counts.sum() == len(rows) + len(rows["history"].combine_chunks().flatten())
    parts = [count_ids(ExampleStore(store), PERIODS[0], both, [lane])[1].sum() for lane in range(4)]
    assert sum(parts) == counts.sum()


def test_the_vocabulary_grows_period_by_period_and_the_record_says_so(trained, store):
    found = records(trained)
    users = np.concatenate([impressions(store, p)["user"].drop_null().to_numpy() for p in PERIODS[:2]])
    _, counts = np.unique(users, return_counts=True)
    known = [record["user"]["known"] for record in found]
    assert known[1] == (counts >= MIN_COUNT).sum()
    assert 0 <= known[0] < known[1] <= known[2] <= 40
    assert [record["user"]["admitted"] for record in found] == np.diff([0, *known]).tolist()
    assert all(record["user"]["evicted"] == 0 for record in found)
    assert found[2]["user"]["coverage"] > found[0]["user"]["coverage"]
    assert set(found[0]) == {"user", "ad"}


def test_each_version_is_published_with_the_vocabulary_it_was_trained_with(trained):
    snapshots = SnapshotStore(trained.run_dir)
    versions = snapshots.versions("dcnv2.none.1")
    found = [load_vocabularies(snapshots, "dcnv2.none.1", version) for version in versions]
    assert [len(each["user"]) for each in found] == [record["user"]["known"] for record in records(trained)]
    assert [len(each["ad"]) for each in found] == [record["ad"]["known"] for record in records(trained)]
    for before, after in itertools.pairwise(found):
        assert after["user"].ids_V[: len(before["user"])].tolist() == before["user"].ids_V.tolist()


def test_what_is_served_predicts_what_was_trained_for_admitted_and_other_ids(store, tmp_path):
    """Raw rows in: the served teacher, the exported student and the weights under training give the same."""
    given = trainer(store, tmp_path)
    rows = impressions(store, PERIODS[2])
    strangers = pa.array(np.arange(len(rows)) + 1_000_000)
    columns = {name: rows[name] for name in rows.column_names} | {"user": strangers}
    for table in (rows, pa.table(columns)):
        with single_process_group():
            loop = TrainingLoop(given, Free(), IdLabels(), progress_file(given))
            loop.run()
            encoder = Encoder(schema(), given.features, labels=False, vocabularies=loop.ids.current)
            none = np.zeros((len(table), 0), np.float32)
            chunk = encoder.encode(table, np.zeros(len(table), np.int64), none, none.astype(bool))
            logits = loop.learners[0].predict(encoder.batch(chunk, 0, len(table))).logits["click"]
        snapshots = SnapshotStore(given.run_dir)
        version = snapshots.latest("dcnv2.none.1")
        expected = logits.sigmoid().numpy()
        loaded = load_version(snapshots, "dcnv2.none.1", version)
        served = score_table(loaded, table)["click"].to_numpy()
        np.testing.assert_allclose(served, expected, rtol=1e-5, atol=1e-6)
        student = score_table(load_exported(snapshots, "dcnv2.none.1", version), table)["click"].to_numpy()
        np.testing.assert_allclose(student, expected, atol=2e-3)  # the fastest form that passes may be in int8
        # With another mapping the predictions would be others.
        loaded.encoder.vocabularies = {
            name: Vocabulary(each.ids_V[::-1].copy(), each.shared_rows, each.salt)
            for name, each in loaded.encoder.vocabularies.items()
        }
        assert np.abs(score_table(loaded, table)["click"].to_numpy() - expected).max() > 1e-3


def test_an_admitted_id_alone_moves_its_row(store, tmp_path, trained):
    """The rows behind the newest vocabulary hold their first values still; those of admitted ids have learned."""
    snapshots = SnapshotStore(trained.run_dir)
    versions = snapshots.versions("dcnv2.none.1")
    tensors = [snapshots.load("dcnv2.none.1", version) for version in versions]
    name = next(name for name in tensors[0] if name.endswith(".user.weight"))
    known = [record["user"]["known"] for record in records(trained)]
    shared = schema().tables["user"].shared_rows
    first, second = tensors[0][name], tensors[1][name]
    assert (first[shared + known[1] :] == second[shared + known[1] :]).all()
    new = slice(shared + known[0], shared + known[1])
    assert (first[new] != second[new]).any(dim=1).all(), "what was admitted has learned before it was published"


class Broken(Exception):
    """Ends a training in the middle."""


def test_a_run_that_stopped_in_a_period_goes_on_with_its_vocabulary(store, tmp_path, trained, monkeypatch):
    broken = trainer(store, tmp_path, checkpoint_every=2, async_checkpoints=False)

    def progress(period: str, step: int, steps: int, phase: str) -> None:
        if (period, step, phase) == (PERIODS[1], 3, "train"):
            raise Broken

    monkeypatch.setattr("rayfm.training.loop.PROGRESS_EVERY_S", -1.0)
    with single_process_group(), pytest.raises(Broken):
        TrainingLoop(broken, Free(), IdLabels(), progress).run()
    train_here(broken)
    assert records(broken) == records(trained)
    ours, theirs = losses(broken), losses(trained)
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, rel=1e-6), key


def test_lost_or_changed_vocabularies_are_refused(store, tmp_path):
    given = trainer(store, tmp_path)
    train_here(given)
    files = sorted((given.folder / "ids").iterdir())
    assert len(files) == 3
    with single_process_group():

        def restored():
            Vocabularies(given.schema_, None, ExampleStore(store), given.folder / "ids", 3).restore(PERIODS[2])

        restored()
        files[-1].write_bytes(files[-1].read_bytes()[:-8] + b"\0" * 8)
        with pytest.raises(RayfmError, match="no vocabularies of this run"):
            restored()
        files[-1].unlink()
        with pytest.raises(RayfmError, match=f"the vocabularies through {PERIODS[2]} are gone"):
            restored()


def test_two_workers_admit_what_one_does(store, tmp_path, trained):
    given = trainer(store, tmp_path)
    train_on(given, 2)
    assert records(given) == records(trained)
    ours, theirs = SnapshotStore(given.run_dir), SnapshotStore(trained.run_dir)
    versions = theirs.versions("dcnv2.none.1")
    assert ours.versions("dcnv2.none.1") == versions
    for version in versions:
        found, expected = (load_vocabularies(each, "dcnv2.none.1", version) for each in (ours, theirs))
        assert {t: v.ids_V.tolist() for t, v in found.items()} == {t: v.ids_V.tolist() for t, v in expected.items()}


def test_a_gang_encodes_with_the_versions_vocabulary(store, trained):
    snapshots = SnapshotStore(trained.run_dir)
    version = snapshots.latest("dcnv2.none.1")
    rows = impressions(store, PERIODS[2])
    expected = score_table(load_version(snapshots, "dcnv2.none.1", version), rows)["click"].to_numpy()
    with single_process_group():
        member = ShardedVersion(snapshots, "dcnv2.none.1", version, torch.device("cpu"), dist.group.WORLD)
        none = np.zeros((len(rows), 0), np.float32)
        chunk = member.encoder.encode(rows, np.zeros(len(rows), np.int64), none, none.astype(bool))
        found = member.predict(member.encoder.batch(chunk, 0, len(rows)))[0]["click"].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_cells_of_a_calibrator_cannot_be_rows_that_are_given_away():
    with pytest.raises(ConfigError, match=r"calibrate\.by: the rows of 'user' are given away as ids come"):
        CountsCalibration(by="user").check(schema())
    CountsCalibration(by="user").check(every_feature_schema())
