"""Models with experts, dependent heads and a scale train, and are published, as others are."""

from __future__ import annotations

from pathlib import Path

import pytest
import training_runs as runs
from example_store import every_feature_schema, write_store

from rayfm.export.served import export_model
from rayfm.models.base import MODELS
from rayfm.snapshots.load import SnapshotStore
from rayfm.training.learner import LearnerConfig


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    write_store(root, list(runs.PERIODS), impressions=400, considerations=150)
    return root


def learner(kind: str, **changes: object) -> LearnerConfig:
    """A learner whose click head also reads the watch time, through a mixture of experts."""
    sharing = {"type": "mmoe", "experts": 3, "expert_hidden": [6], "depends_on": {"click": "watch"}, "detach": False}
    plain = runs.learner(kind, "adapter")
    given = {**plain.model.dump(), "scale": 2.0, "head": [5], "multi_task": sharing, **changes}
    return plain.model_copy(update={"model": MODELS[kind].Config.model_validate(given)})


def test_one_and_two_workers_agree_and_publish_the_scaled_model(store: Path, tmp_path: Path) -> None:
    """As for other models: losses of a period agree to 1e-4 relative after 3 periods of steps."""
    learners = [learner("deepfm"), learner("two_tower", top="mlp")]
    found = {}
    for world in (1, 2):
        spec = runs.spec(store, tmp_path / str(world), *learners)
        runs.train_on(spec, world)
        found[world] = runs.losses(spec)
    assert found[1].keys() == found[2].keys()
    for key, value in found[1].items():
        assert found[2][key] == pytest.approx(value, rel=1e-4), key
    snapshots = SnapshotStore(spec.run_dir)
    for item in learners:
        version = snapshots.latest(item.key)
        manifest = snapshots.verify(item.key, version)
        config = MODELS[item.model_name].Config.model_validate(manifest.config)
        assert config == item.model
        served = export_model(config, every_feature_schema(), manifest.tasks, snapshots.load(item.key, version))
        assert served.model.config.embedding_dim == 16
        assert any(name.startswith("heads.mixture.experts.2") for name in manifest.tensors)
