from __future__ import annotations

import pytest
import torch
from small_pipeline import PERIODS, small_pipeline

from rayfm.config import ConfigError, DataError, RayfmError, SnapshotError
from rayfm.models import build_model
from rayfm.pipeline import parts
from rayfm.pipeline.stream import Pipeline
from rayfm.snapshots.publish import publish


@pytest.fixture
def no_ray(monkeypatch):
    """What is refused is refused before Ray starts."""

    def start(config):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(parts, "ray_session", start)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda c: parts.train(c, ["studens"]), "unknown trainer 'studens'; did you mean 'students'?"),
        (lambda c: parts.label(c, ["fmm"]), "unknown teacher 'fmm'; did you mean 'fm'?"),
        (lambda c: parts.label(c, None, ["2024-01-09"]), "unknown period '2024-01-09'; did you mean '2024-01-0"),
        (lambda c: parts.label(c, None, [PERIODS[0]]), "period 2024-01-01 is the first: no teacher can have been"),
        (lambda c: parts.evaluate(c, "fm.none.1", (PERIODS[1],)), "unknown published model 'fm.none.1'"),
    ],
)
def test_a_name_that_is_not_there_is_refused(tmp_path, no_ray, call, expected):
    with pytest.raises(ConfigError) as error:
        call(small_pipeline(tmp_path))
    assert expected in str(error.value)


def test_training_needs_somebody_to_train(tmp_path, no_ray):
    config = small_pipeline(tmp_path, students={"vm": {"variants": {"direct": []}}}).model_copy(update={"teachers": {}})
    with pytest.raises(ConfigError, match="the config has no teachers; name a group of students with --trainer"):
        parts.train(config)


def test_labelling_needs_a_snapshot_trained_through_the_period_before(tmp_path):
    pipeline = Pipeline(small_pipeline(tmp_path))
    with pytest.raises(DataError, match="no snapshot is trained through 2024-01-01, which labels of 2024-01-02 need"):
        pipeline.label("fm", handle=None, periods=(PERIODS[1],), timeout=0.0)


def test_a_version_is_not_scored_on_what_it_saw(tmp_path):
    config = small_pipeline(tmp_path)
    model_config = config.students["vm"].model
    model = build_model(model_config, config.schema_, ("click",), seed=1)
    publish(
        config.run_dir,
        "vm.none.1",
        "2024-01-02-0123abcd",
        {name: value.detach() for name, value in model.state_dict().items()},
        trained_through=PERIODS[1],
        config=model_config.dump(),
        example_schema=config.schema_.dump(),
        tasks=("click",),
    )
    for seen in (*PERIODS[:2], f"{PERIODS[1]}T23"):  # an hour of the last day too
        with pytest.raises(ConfigError, match=f"was trained through 2024-01-02: scoring {seen} would flatter it"):
            parts.evaluate(config, "vm.none.1", (seen,))
    with pytest.raises(DataError, match="period 2024-01-03 is not in the store; run `rayfm prepare`"):
        parts.evaluate(config, "vm.none.1", (PERIODS[2],))
    with pytest.raises(SnapshotError, match=r"vm\.none\.1@v9 is not published"):
        parts.evaluate(config, "vm.none.1", (PERIODS[2],), version="v9")


def test_verify_counts_versions_and_names_a_changed_file(tmp_path):
    publish(tmp_path, "fm", "v1", {"w": torch.ones(3)})
    publish(tmp_path, "fm", "v2", {"w": torch.zeros(3)})
    assert parts.verify_snapshots(tmp_path) == 2
    (file,) = (tmp_path / "snapshots" / "fm" / "v2").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(RayfmError, match=f"{file.name}: bytes differ"):
        parts.verify_snapshots(tmp_path)
