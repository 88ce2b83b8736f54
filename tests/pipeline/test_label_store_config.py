"""``label_store``: where a pipeline keeps its labels, checked with the config."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.fs
import pytest
import yaml
from small_pipeline import mapping, small_pipeline, write_config

from rayfm.cli.labels import _of_run
from rayfm.config import ConfigError, LabelError, validate
from rayfm.labels.history import HistorySpec, HistoryState, HistoryStore
from rayfm.labels.storage import Storage
from rayfm.pipeline.config import PipelineConfig, load_config
from rayfm.pipeline.stream import Pipeline

SPEC = HistorySpec("fm", "user", 0.5, None, 2)


def mark(storage: Storage) -> None:
    """Store something small."""
    HistoryStore(storage).write(SPEC, "2024-01-01", HistoryState.empty(2, pa.int64()), None)


def test_labels_lie_in_the_run_unless_said(tmp_path):
    config = small_pipeline(tmp_path)
    assert config.label_storage == Storage(root=str(config.run_dir))
    assert Pipeline(config).labels.root == str(config.run_dir)


@pytest.mark.parametrize("root", ["s3://bucket/prefix", "s3://bucket/prefix/"])
def test_a_text_alone_is_the_root(tmp_path, root):
    config = load_config(write_config(tmp_path), [f"label_store={root}"])
    assert config.label_storage == Storage(root="s3://bucket/prefix/small")
    assert config.label_storage.table == "s3://bucket/prefix/small/labels"
    assert PipelineConfig.model_validate(config.dump()) == config, "what a run saves is read back"
    full = {"root": root, "endpoint": "http://minio:9000", "region": "eu-west-1"}
    storage = small_pipeline(tmp_path, label_store=full).label_storage
    assert (storage.endpoint, storage.region, storage.access_key_id) == ("http://minio:9000", "eu-west-1", None)
    folder = small_pipeline(tmp_path, label_store=str(tmp_path / "shared")).label_storage
    assert folder == Storage(root=str(tmp_path / "shared" / "small"))


def test_a_relative_folder_means_the_same_to_workers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipeline = Pipeline(small_pipeline(tmp_path, label_store="shared"))
    assert pipeline.labels.root == str(tmp_path / "shared" / "small")
    assert Path(pipeline.config.dump()["label_store"]["root"]).is_absolute()


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ("gs://bucket/x", r"'label_store\.root': 'gs' is no storage; give a folder or s3://bucket/prefix"),
        ("s3://", r"'label_store\.root': is not s3://bucket/prefix; correct it"),
        ("", r"'label_store\.root': String should have at least 1 character"),
        ({"endpoint": "http://minio:9000"}, r"'label_store\.root' is missing; add it"),
        ({"root": "s3://bucket/p", "endpont": "x"}, r"unknown key 'label_store\.endpont'; did you mean 'endpoint'\?"),
        ({"root": "s3://bucket/p", "endpoint": "minio:9000"}, r"'label_store\.endpoint': is not an http or https URL"),
        ({"root": "here", "endpoint": "http://minio:9000"}, r"'label_store': 'endpoint' is for s3:// roots"),
        ({"root": "here", "region": "eu-west-1"}, r"'label_store': 'region' is for s3:// roots"),
        (
            {"root": "s3://bucket/p", "secret_access_key": "hunter2"},
            "label_store: 'secret_access_key' has no place in a config.*set AWS_SECRET_ACCESS_KEY in the environment",
        ),
        (7, "'label_store'"),
    ],
)
def test_what_cannot_be_is_refused_with_the_config(tmp_path, given, complaint):
    with pytest.raises(ConfigError, match=complaint) as found:
        validate(PipelineConfig, mapping(tmp_path) | {"label_store": given}, "here")
    assert len(str(found.value).splitlines()) == 1
    assert "hunter2" not in str(found.value)


def test_an_arrow_without_s3_is_refused_with_the_config(tmp_path, monkeypatch):
    monkeypatch.delattr(pyarrow.fs, "S3FileSystem")
    with pytest.raises(ConfigError, match="this build of pyarrow has no S3; install one that has, or use a folder"):
        validate(PipelineConfig, mapping(tmp_path) | {"label_store": "s3://bucket/prefix"}, "here")
    validate(PipelineConfig, mapping(tmp_path) | {"label_store": "a/folder"}, "here")


def test_editors_are_told_of_both_ways():
    schema = PipelineConfig.model_json_schema(by_alias=True)
    text, given = schema["$defs"]["LabelStoreConfig"]["anyOf"]
    assert text == {"type": "string"}
    assert given["properties"].keys() == {"root", "endpoint", "region"}
    assert {"$ref": "#/$defs/LabelStoreConfig"} in schema["properties"]["label_store"]["anyOf"]


def test_overwrite_clears_the_labels_of_this_run_alone(tmp_path):
    shared = tmp_path / "shared"
    config = small_pipeline(tmp_path, label_store=str(shared))
    Pipeline(config).open(resume=False, overwrite=False)
    other = config.model_copy(update={"name": "small-2"}).label_storage
    for storage in (config.label_storage, other):
        mark(storage)
    Pipeline(config).open(resume=True, overwrite=False)
    assert config.label_storage.stands()
    Pipeline(config).open(resume=False, overwrite=True)
    assert not config.label_storage.stands()
    assert other.stands()


def test_overwrite_clears_also_where_the_run_kept_its_labels_before(tmp_path):
    config = small_pipeline(tmp_path, label_store=str(tmp_path / "shared"))
    Pipeline(config).open(resume=False, overwrite=False)
    mark(config.label_storage)
    elsewhere = small_pipeline(tmp_path)
    Pipeline(elsewhere).open(resume=False, overwrite=True)
    assert not config.label_storage.stands()
    assert load_config(elsewhere.run_dir / "config.yaml").label_store is None


def test_labels_that_cannot_be_cleared_keep_the_runs_folder(tmp_path, monkeypatch):
    """Without its folder, what is left of the labels could be taken for a new run's."""
    config = small_pipeline(tmp_path, label_store=str(tmp_path / "shared"))
    Pipeline(config).open(resume=False, overwrite=False)
    mark(config.label_storage)

    def refuse(storage: Storage) -> None:
        raise LabelError("no access")

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "clear", refuse)
        with pytest.raises(LabelError, match="no access"):
            Pipeline(config).open(resume=False, overwrite=True)
    with pytest.raises(ConfigError, match="holds a run"):
        Pipeline(config).open(resume=False, overwrite=False)
    Pipeline(config).open(resume=False, overwrite=True)
    assert not config.label_storage.stands()


def test_labels_of_a_run_whose_folder_is_elsewhere_are_not_taken_up(tmp_path):
    config = small_pipeline(tmp_path, label_store=str(tmp_path / "shared"))
    mark(config.label_storage)
    for resume in (False, True):
        with pytest.raises(ConfigError, match=r"shared/small holds labels of a run whose folder is not .*--overwrite"):
            Pipeline(config).open(resume=resume, overwrite=False)
    assert not (config.run_dir / "config.yaml").exists()
    Pipeline(config).open(resume=False, overwrite=True)
    assert not config.label_storage.stands()
    assert (config.run_dir / "config.yaml").exists()


def test_a_resumed_run_finds_its_labels_where_they_were(tmp_path):
    config = small_pipeline(tmp_path, label_store=str(tmp_path / "shared"))
    Pipeline(config).open(resume=False, overwrite=False)
    moved = small_pipeline(tmp_path, label_store=str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="'label_store' differs from the config given"):
        Pipeline(moved).open(resume=True, overwrite=False)
    saved = config.run_dir / "config.yaml"
    old = yaml.safe_load(saved.read_text())
    del old["label_store"]  # as a run saved it before there was this key
    saved.write_text(yaml.safe_dump(old))
    Pipeline(small_pipeline(tmp_path)).open(resume=True, overwrite=False)


def test_a_label_store_that_cannot_be_written_is_refused_before_the_run_starts(tmp_path):
    (tmp_path / "file").write_text("")
    config = small_pipeline(tmp_path, label_store=str(tmp_path / "file"))
    with pytest.raises(LabelError, match="cannot write") as found:
        Pipeline(config).open(resume=False, overwrite=False)
    assert len(str(found.value).splitlines()) == 1
    assert not (config.run_dir / "config.yaml").exists()


def test_commands_find_the_labels_of_a_run_by_its_folder(tmp_path):
    config = small_pipeline(tmp_path, label_store={"root": "s3://bucket/prefix", "endpoint": "http://minio:9000"})
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(yaml.safe_dump(config.dump()))
    moved = tmp_path / "moved"
    os.rename(config.run_dir, moved)
    assert _of_run(moved) == Storage(root="s3://bucket/prefix/small", endpoint="http://minio:9000")
    assert _of_run(tmp_path) == Storage(root=str(tmp_path)), "a store without a run"
