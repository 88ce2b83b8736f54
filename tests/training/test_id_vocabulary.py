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
from rayfm.training.sharding import local_shards
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


# -- rows that change hands --------------------------------------------------------------------------------


def managed_schema() -> Schema:
    """14 rows of their own for 40 users; counts fade fast, so that rows change hands in each period."""
    plain = every_feature_schema().dump()
    settings = {"min_count": 3, "shared_rows": 6, "decay": 0.3}
    plain["tables"]["user"] |= {"rows": 20, "id_policy": "managed", "vocabulary": settings}
    return Schema.model_validate(plain)


def managed_trainer(store, run_dir, **training):
    return spec(store, run_dir, learner("dcnv2"), **training).model_copy(update={"schema_": managed_schema()})


USER_STATE = {
    "rowwise_adagrad": {},
    "adagrad": {"table_overrides": {"user": {"type": "adagrad"}}},
    "adam": {"table_overrides": {"user": {"type": "adam"}}},
    "row_wise": {"row_wise_from": 10},
    "column_wise": {"sharding_overrides": {"user": "column_wise"}},
}


@pytest.mark.parametrize("kind", USER_STATE)
def test_a_row_that_changes_hands_starts_anew(store, tmp_path, kind):
    """First values and no optimiser state in the rows named, all else as it was; and so its next step is its first."""
    given = managed_trainer(store, tmp_path, **USER_STATE[kind])
    with single_process_group():
        loop = TrainingLoop(given, Free(), IdLabels())
        fresh = {name: _whole(value) for name, value in _tables(loop.learners[0])}
        loop.run()
        trained = loop.learners[0]
        name = next(name for name in fresh if name.endswith(".user.weight"))
        before, remembered = _whole(trained.dmp.state_dict()[name]), _remembered(trained, name)
        assert remembered
        assert all((state[7:9] != 0).any() for state in remembered)
        trained.reset_rows("user", np.array([7, 8, 19]))
        after = _whole(trained.dmp.state_dict()[name])
        kept = [row for row in range(20) if row not in (7, 8, 19)]
        assert (after[[7, 8, 19]] == fresh[name][[7, 8, 19]]).all()
        assert (after[kept] == before[kept]).all()
        assert (before[[7, 8]] != fresh[name][[7, 8]]).any(dim=1).all()
        for old, new in zip(remembered, _remembered(trained, name), strict=True):
            assert (new[[7, 8, 19]] == 0).all()
            assert (new[kept] == old[kept]).all()
        if kind == "rowwise_adagrad":  # w -= lr * g / sqrt(mean(g^2)): the first step's length is lr * sqrt(width)
            batch = next(iter(loop._training_reader(2, 0, {}).batches(PERIODS[2])))
            rows = batch.sparse["user"].values()
            row = next(r for r in (7, 8, 19) if r in rows)
            trained.train_step(batch, 1000)
            step = (_whole(trained.dmp.state_dict()[name])[row] - after[row]).norm()
            assert step == pytest.approx(given.training.optimizer_of("user").lr * 8**0.5, rel=1e-3)


def _tables(learner):
    return [(name, value) for name, value in learner.dmp.state_dict().items() if ".embedding_bags." in name]


def _whole(value) -> torch.Tensor:
    """A table on one rank, whole."""
    parts = list(local_shards(value))
    return torch.cat([part for part, _, _ in sorted(parts, key=lambda part: (part[1], part[2]))], dim=1).clone()


def _remembered(learner, name: str) -> list[torch.Tensor]:
    """What optimisers remember of the rows of a table: a tensor with a row (or a number) a row for each part."""
    found = []
    for key, values in learner.optimizers.combined().state_dict()["state"].items():
        if key.endswith(name):
            for value in values.values():
                shards = [s.tensor for s in value.local_shards()] if hasattr(value, "local_shards") else [value]
                found += [shard.clone() for shard in shards if shard.ndim]
    return found


def test_evicted_ids_are_served_from_the_shared_part_and_the_row_is_anothers(store, tmp_path):
    given = managed_trainer(store, tmp_path)
    train_here(given)
    found = records(given)
    assert all(record["user"]["known"] == 14 for record in found)
    assert found[0]["user"]["evicted"] == 0
    assert found[1]["user"]["evicted"] > 0
    assert found[1]["user"]["admitted"] == found[1]["user"]["evicted"]
    snapshots = SnapshotStore(given.run_dir)
    versions = snapshots.versions("dcnv2.none.1")
    before, after = (load_vocabularies(snapshots, "dcnv2.none.1", version)["user"] for version in versions[:2])
    places = np.flatnonzero(before.ids_V != after.ids_V)
    assert len(places) == found[1]["user"]["evicted"]
    evicted = before.ids_V[places]
    assert (before.rows(evicted) == 6 + places).all()
    back = np.isin(evicted, after.ids_V)
    assert not back.any()
    assert (after.rows(evicted) < 6).all()
    rows = impressions(store, PERIODS[2])
    rows = rows.set_column(
        rows.schema.get_field_index("user"),
        "user",
        pa.array(np.resize(np.concatenate([evicted, after.ids_V]), len(rows))),
    )
    loaded = load_version(snapshots, "dcnv2.none.1", versions[1])
    student = load_exported(snapshots, "dcnv2.none.1", versions[1])
    one, other = (score_table(each, rows)["click"].to_numpy() for each in (loaded, student))
    np.testing.assert_allclose(other, one, atol=2e-3)


def test_a_stop_after_rows_changed_hands_changes_nothing(store, tmp_path, monkeypatch):
    unbroken = managed_trainer(store, tmp_path / "unbroken")
    train_here(unbroken)
    broken = managed_trainer(store, tmp_path / "broken", checkpoint_every=2, async_checkpoints=False)
    monkeypatch.setattr("rayfm.training.loop.PROGRESS_EVERY_S", -1.0)
    for stop in ((PERIODS[1], 1), (PERIODS[1], 3), (PERIODS[2], 0)):

        def progress(period: str, step: int, steps: int, phase: str, stop=stop) -> None:
            if (period, step) == stop and phase == "train":
                raise Broken

        with single_process_group(), pytest.raises(Broken):
            TrainingLoop(broken, Free(), IdLabels(), progress).run()
    train_here(broken)
    assert records(broken) == records(unbroken)
    ours, theirs = losses(broken), losses(unbroken)
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, rel=1e-6), key


def test_two_workers_admit_evict_and_learn_as_one_does(store, tmp_path):
    one = managed_trainer(store, tmp_path / "one")
    train_here(one)
    two = managed_trainer(store, tmp_path / "two", row_wise_from=10)  # the rows lie on both
    train_on(two, 2)
    assert records(two) == records(one)
    assert records(one)[1]["user"]["evicted"] > 0
    theirs = losses(one)
    for key, value in losses(two).items():
        assert value == pytest.approx(theirs[key], rel=1e-4), key
    snapshots = [SnapshotStore(trainer.run_dir) for trainer in (one, two)]
    for version in snapshots[0].versions("dcnv2.none.1"):
        found, expected = (load_vocabularies(each, "dcnv2.none.1", version)["user"] for each in snapshots)
        assert found.ids_V.tolist() == expected.ids_V.tolist()
