"""What the publisher deletes where services follow `current` in a store that is not the run's own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_pipeline import small_pipeline

from rayfm.pipeline.stream import Pipeline
from rayfm.snapshots import Pointer, StoreUnavailable, Updater
from rayfm.snapshots.publish import publish

VERSIONS = [f"v{number}" for number in range(1, 7)]


@pytest.fixture
def pipeline(tmp_path) -> Pipeline:
    pipeline = Pipeline(small_pipeline(tmp_path, endpoints={"metadata": f"sqlite://{tmp_path}/cluster.sqlite"}))
    pipeline.open(resume=False, overwrite=False)
    return pipeline


def publish_all(pipeline: Pipeline) -> tuple[str, SimpleNamespace]:
    """A student's versions, and what the trainer says of the last one."""
    (spec,) = pipeline.student_specs
    model = "vm.none.1"
    for version in VERSIONS:
        publish(pipeline.run_dir, model, version, {"w": torch.ones(2)})
    return model, SimpleNamespace(trainer=spec.name, versions={model: VERSIONS[-1]})


def test_versions_that_are_current_held_or_kept_there_stay(pipeline, tmp_path):
    model, record = publish_all(pipeline)
    followed = pipeline.collector.metadata
    assert followed.path == tmp_path / "cluster.sqlite"
    Updater(pipeline.collector, model, "a replica").step()
    Pointer(pipeline.collector, model, "an operator").rollback("calibration is off", to="v1")
    pipeline.collector.hold(model, "v2", "a replica", 60.0)
    assert pipeline.collector.keep == 3
    pipeline._collect(record)
    assert pipeline.snapshots.versions(model) == ["v1", "v2", "v4", "v5", "v6"]


@pytest.mark.parametrize("error", [StoreUnavailable("the servers do not answer"), OSError(39, "Directory not empty")])
def test_a_run_goes_on_where_nothing_can_be_deleted(pipeline, monkeypatch, caplog, error):
    model, record = publish_all(pipeline)

    def away(_model: str) -> list[str]:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.collector, "sweep", away)
        pipeline._collect(record)
    assert "stay for now" in caplog.text
    pipeline._collect(record)
    assert pipeline.snapshots.versions(model) == VERSIONS[3:]


def test_a_tombstone_of_an_overwritten_run_deletes_nothing_of_the_new_one(pipeline):
    model, _ = publish_all(pipeline)
    pipeline.collector.expire(model)
    again = Pipeline(pipeline.config)
    again.open(resume=False, overwrite=True)
    assert not again.snapshots.models()
    publish_all(again)
    assert again.collector.sweep(model) == []
    assert again.snapshots.versions(model) == VERSIONS


def test_without_such_a_store_the_runs_own_is_asked(tmp_path: Path):
    pipeline = Pipeline(small_pipeline(tmp_path))
    assert pipeline.collector.metadata is pipeline.metadata
