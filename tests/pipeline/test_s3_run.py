"""A whole pipeline whose labels and histories lie in a bucket: the same numbers as with a folder, to the last bit."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from buckets import BUCKET, ENVIRONMENT, KEYS, objects, put, s3_service
from small_pipeline import PERIODS, small_pipeline

from rayfm.cli.main import main
from rayfm.config import ConfigError
from rayfm.labels import LabelStore
from rayfm.labels.history import HistoryStore
from rayfm.labels.show import sample
from rayfm.pipeline.config import PipelineConfig
from rayfm.pipeline.here import run_here
from rayfm.pipeline.plan import histories
from rayfm.pipeline.stream import Pipeline, RunResult, run
from rayfm.serving.labelling import history_spec

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

CHANGES: dict[str, Any] = {
    "teachers": {"fm": {"store_representation": True}},
    "students": {
        "vm": {
            "model": {"histories": [{"teacher": "fm", "key": "user"}]},
            "variants": {"none": [], "direct": [{"type": "direct", "teacher": "fm"}]},
            "labels": {"wait": 120},
        }
    },
}
"""Students that read labels, representations' histories, and nothing that a folder would do better."""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_service() as url:
        yield url


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    """The main job has the keys where its workers have them (tests/conftest.py), and the endpoint from its config."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ENVIRONMENT:
            patch.delenv(name, raising=False)
        for name, value in KEYS.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    """The run of the pipeline with its labels in its folder. In one process: worker groups would only take time."""
    config = small_pipeline(tmp_path_factory.mktemp("local"), **CHANGES)
    Pipeline(config).prepare()
    pipeline = run_here(config)
    pipeline.finish()
    return pipeline.run_dir


def in_bucket(folder: Path, endpoint: str, local: Path) -> PipelineConfig:
    """The same, with its labels in a bucket and the examples that the other prepared."""
    return small_pipeline(
        folder,
        **CHANGES,
        storage=str(local.parents[1] / "data"),
        data={"source": {"path": str(local.parents[1] / "log")}},
        label_store={"root": f"s3://{BUCKET}/runs", "endpoint": endpoint},
    )


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory, endpoint: str, local: Path) -> tuple[PipelineConfig, RunResult]:
    config = in_bucket(tmp_path_factory.mktemp("bucket"), endpoint, local)
    return config, run(config)


def metrics(run_dir: Path) -> list[str]:
    return sorted((run_dir / "metrics.jsonl").read_text().splitlines())


def test_the_students_of_a_bucket_are_those_of_a_folder_to_the_last_bit(bucket, local, endpoint):
    config, result = bucket
    ours, theirs = metrics(result.run_dir), metrics(local)
    assert len(ours) > 50
    assert {json.loads(line)["variant"] for line in ours} == {"teacher", "none", "direct"}
    assert ours == theirs
    here, there = LabelStore(local), LabelStore(config.label_storage)
    (version,) = {part.version for part in here.list("fm", PERIODS[2])}
    rows = [sample(store, "fm", version, PERIODS[2], 10**6) for store in (here, there)]
    assert len(rows[0]) > 30
    assert rows[0].equals(rows[1])
    (history,) = map(history_spec, histories(config))
    states = [HistoryStore(place).read(history, PERIODS[2]) for place in (local, config.label_storage)]
    assert len(states[0].keys) > 3
    assert states[0].vector.tobytes() == states[1].vector.tobytes()

    for folder in ("labels", "histories"):
        assert not (result.run_dir / folder).exists(), "nothing of it lies in the run's folder"
        assert objects(endpoint, f"runs/small/{folder}")
    assert all(key.startswith("runs/small/") for key in objects(endpoint))
    assert "an-id" not in (result.run_dir / "config.yaml").read_text()


@pytest.fixture
def rayfm(monkeypatch, capsys) -> Callable[..., str]:
    """``rayfm labels`` in this process: what it prints."""

    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["rayfm", "labels", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        assert not stop.value.code, err
        return out

    return call


def test_commands_read_and_keep_a_buckets_labels_by_the_runs_folder(bucket, rayfm, endpoint):
    config, result = bucket
    assert all(period in rayfm("list", result.run_dir) for period in PERIODS[1:])
    assert "100.0%" in rayfm("coverage", result.run_dir)
    before = len(objects(endpoint, "runs/small/labels"))
    assert "4 -> 1" in rayfm("compact", result.run_dir)
    assert "nothing to expire" in rayfm("expire", result.run_dir, "--keep-versions", "1")
    assert "0 files deleted" in rayfm("vacuum", result.run_dir), "files of the last day stay"
    assert len(objects(endpoint, "runs/small/labels")) > before
    store = LabelStore(config.label_storage)
    assert sum(part.rows for part in store.list("fm")) == 80


def test_overwrite_clears_the_runs_prefix_and_no_other(bucket, endpoint, local):
    config, _ = bucket
    for key in ("runs/small-2/labels/a", "runs/small/mine.txt", "runs/notes.txt"):
        put(endpoint, key, b"mine")
    with pytest.raises(ConfigError, match="holds a run; --resume goes on with it, --overwrite starts anew"):
        Pipeline(config).open(resume=False, overwrite=False)
    Pipeline(config).open(resume=True, overwrite=False)
    assert len(objects(endpoint, "runs/small")) > 10
    Pipeline(config).open(resume=False, overwrite=True)
    assert objects(endpoint).keys() == {"runs/small-2/labels/a", "runs/small/mine.txt", "runs/notes.txt"}


def test_a_bucket_that_is_not_there_is_one_line_before_the_run_starts(tmp_path, endpoint):
    config = small_pipeline(tmp_path, label_store={"root": "s3://no-such-bucket/runs", "endpoint": endpoint})
    with pytest.raises(Exception, match=r"s3://no-such-bucket/runs/small.*check bucket, endpoint and keys") as found:
        Pipeline(config).open(resume=False, overwrite=False)
    assert len(str(found.value).splitlines()) == 1
    assert not (config.run_dir / "config.yaml").exists()
