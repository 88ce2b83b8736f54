"""Trainers that do not train on every period: a teacher that stopped, students that start late."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import training_runs as runs
from example_store import write_store

from rayfm.snapshots.load import SnapshotStore
from rayfm.training.loop import TrainingLoop
from rayfm.training.trainer import single_process_group


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    write_store(root, list(runs.PERIODS), impressions=300, considerations=100)
    return root


def test_a_trainer_that_stopped_still_predicts(store: Path, tmp_path: Path) -> None:
    whole = runs.spec(store, tmp_path / "whole", runs.learner("fm"))
    stopped = runs.spec(store, tmp_path / "stopped", runs.learner("fm")).model_copy(update={"trained": 2})
    runs.train_here(whole)
    done = runs.train_here(stopped).done
    versions = [version["fm.none.1"] for _, version in done]
    assert versions[1] == versions[2] != versions[0], "the version of the last trained period stays"
    snapshots = SnapshotStore(stopped.run_dir)
    assert snapshots.manifest("fm.none.1", versions[2]).trained_through == runs.PERIODS[1]
    assert len(snapshots.versions("fm.none.1")) == 2
    record = json.loads((stopped.folder / "periods" / f"{runs.PERIODS[2]}.json").read_text())
    assert record["examples"] == 0
    assert record["losses"] == {}
    # Up to there both are the same model, so that the next period is predicted alike.
    for period in runs.PERIODS[1:]:
        one, other = (runs.metric_sums(spec, period, "fm.none.1") for spec in (whole, stopped))
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)


def test_it_goes_on_from_its_last_checkpoint(store: Path, tmp_path: Path) -> None:
    spec = runs.spec(store, tmp_path, runs.learner("fm")).model_copy(update={"trained": 1})
    first = runs.train_here(spec).done
    (spec.folder / "periods" / f"{runs.PERIODS[2]}.json").unlink()
    again = runs.train_here(spec).done
    assert [version for _, version in again] == [first[-1][1]]
    assert (spec.folder / "periods" / f"{runs.PERIODS[2]}.json").exists()


def test_a_reader_is_not_planned_over_periods_that_are_only_predicted(store: Path, tmp_path: Path) -> None:
    whole = runs.spec(store, tmp_path, runs.learner("fm"), reader="ray_data", read_tasks=3)
    planned = []

    def keep(plan, encoder, periods, rank, world, start, tasks, nodes):
        assert tasks == 3
        planned.append(list(periods))
        return SimpleNamespace(periods=periods)

    with pytest.MonkeyPatch.context() as patch, single_process_group():
        patch.setattr("rayfm.training.reading.RayDataReader", keep)
        for trained, index in ((None, 0), (2, 0), (2, 1)):
            spec = whole.model_copy(update={"trained": trained})
            TrainingLoop(spec, runs.Free())._training_reader(index, 0, {})
    assert planned == [list(runs.PERIODS), list(runs.PERIODS[:2]), [runs.PERIODS[1]]]


def test_a_model_of_one_traffic_learns_its_rows_alone(store: Path, tmp_path: Path) -> None:
    every = runs.learner("fm")
    schema = runs.spec(store, tmp_path, every).schema_
    assert len(schema.traffics) > 1
    own = every.model_copy(update={"traffics": schema.traffics[:1]})
    one, both = (runs.spec(store, tmp_path / name, item) for name, item in (("one", own), ("both", every)))
    runs.train_here(one)
    runs.train_here(both)
    sums, whole = (
        runs.metric_sums(spec, runs.PERIODS[1], "fm.none.1")["impression/click/sums"] for spec in (one, both)
    )
    assert sums[0, 0] == whole[0, 0] > 0, "all rows of its own traffic are scored"
    assert float(sums[1:].abs().sum()) == 0, "and none of the others"
    assert runs.losses(one)[runs.PERIODS[0], "fm.none.1/supervised/click"] != pytest.approx(
        runs.losses(both)[runs.PERIODS[0], "fm.none.1/supervised/click"]
    )


def test_a_trainer_need_not_publish(store: Path, tmp_path: Path) -> None:
    spec = runs.spec(store, tmp_path, runs.learner("fm")).model_copy(update={"publish": False})
    assert runs.train_here(spec).done == [(period, {}) for period in runs.PERIODS]
    assert SnapshotStore(spec.run_dir).models() == []
    assert (spec.folder / "metrics" / runs.PERIODS[2] / "fm.none.1.npz").exists()
