"""Files of a join, scored by a teacher that is really published: versions, refusals, what students see of them."""

from __future__ import annotations

import datetime
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from counting_teacher import DAY, CountingTeacher
from example_store import DAY_US, every_feature_rows, every_feature_schema

from rayfm.augment.config import AugmentConfig
from rayfm.augment.join import FeedbackJoin
from rayfm.augment.labelling import label_windows, student_view
from rayfm.augment.versions import METADATA, Holds, fresh_versions
from rayfm.config import ConfigError, LabelError, SnapshotError, validate
from rayfm.data.prepare import prepare
from rayfm.data.sources.parquet import ParquetConfig, ParquetSource
from rayfm.data.store import ExampleStore
from rayfm.models import MODELS, build_model
from rayfm.pipeline.tickets import metadata_path
from rayfm.serving.teacher import TeacherHere, load_version, score_table
from rayfm.snapshots import Collector, SnapshotStore, SQLiteMetadataStore
from rayfm.snapshots.publish import publish

TASKS = ("click", "watch")
FEATURES = ("age", "user", "history", "topics")
MODEL = "dcnv2.teacher.0"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Logs of two days, and a teacher published after each of the day before and the first."""
    root = tmp_path_factory.mktemp("window")
    schema = every_feature_schema()
    config = MODELS["dcnv2"].Config(embedding_dim=8, hidden=(8,), features=FEATURES)
    for seed, through in enumerate(["2024-01-01", "2024-01-02"]):
        model = build_model(config, schema, TASKS, seed=seed)
        publish(
            root / "run", MODEL, f"{through}-aaaaaaaa", dict(model.state_dict()), trained_through=through,
            config=config.dump(), example_schema=schema.dump(), tasks=TASKS,
        )  # fmt: skip
    for day in (0, 1):
        rows = every_feature_rows(300, day + 1, start=DAY + day * DAY_US)
        ids, times = rows["example_id"].to_numpy(), rows["time"].to_numpy()
        shown = rows.drop_columns(["click", "watch", "logged/ranking/click"])
        events = pa.table({"event_id": ids, "example_id": ids, "time": times + 60_000_000, "task": ["click"] * 300})
        clicked = events.filter(pa.array(ids % 3 == 0))
        watched = events.set_column(3, "task", pa.array(["watch"] * 300))
        watched = watched.append_column("value", pa.array(ids % 50 / 1.0)).filter(pa.array(ids % 2 == 0))
        for name, table in (("impressions", shown), ("clicks", clicked), ("watches", watched)):
            path = root / "logs" / name / f"{day}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, path)
    return root


def config_of(root: Path, /, **changes) -> AugmentConfig:
    data = {
        "root": str(root / "joined"),
        "impressions": {"path": str(root / "logs/impressions")},
        "feedback": {
            "clicks": {"path": str(root / "logs/clicks"), "task": "click"},
            "watches": {"path": str(root / "logs/watches"), "value": "value"},
        },
        "tasks": {"click": {"window": "5m"}, "watch": {"window": "30m", "label": "max"}},
        "labelling": {
            "snapshots": str(root / "run"),
            "teachers": {"large": {"model": MODEL}},
            "students": {
                "feed": {"teacher": "large", "traffics": ["feed"], "features": ["age", "topics"], "tasks": ["click"]},
                "every": {"teacher": "large"},
            },
        },
    }
    return validate(AugmentConfig, data | changes, "augment.yaml")


def test_from_logs_to_views(root):
    config = config_of(root)
    with FeedbackJoin(config) as join:
        join.run(through=datetime.datetime(2024, 1, 5, tzinfo=datetime.UTC))
    done = label_windows(config)
    assert sum(counts["scored"] for counts in done) == 600
    assert {(counts["period"], counts["version"]) for counts in done} == {
        ("2024-01-02", "2024-01-01-aaaaaaaa"), ("2024-01-03", "2024-01-02-aaaaaaaa"),
    }, "the newest that was not trained on the period"  # fmt: skip
    assert label_windows(config) == []

    for period, version in (("2024-01-02", "2024-01-01-aaaaaaaa"), ("2024-01-03", "2024-01-02-aaaaaaaa")):
        every = student_view(config, "every", period)
        assert every.num_rows == 300
        loaded = load_version(SnapshotStore(root / "run"), MODEL, version)
        for task in TASKS:
            wanted = score_table(loaded, every.combine_chunks())[task].to_numpy()
            np.testing.assert_allclose(every[f"logged/large/{task}"].to_numpy(), wanted, rtol=1e-5, atol=1e-6)
        ids = every["example_id"].to_numpy()
        np.testing.assert_array_equal(every["click"].to_numpy(), ids % 3 == 0)
        np.testing.assert_array_equal(every["watch"].to_numpy(), np.where(ids % 2 == 0, ids % 50, 0))
        feed = student_view(config, "feed", period)
        assert set(feed["traffic"].to_pylist()) == {"feed"}
        assert set(feed.column_names) == {
            "example_id", "time", "kind", "traffic", "age", "topics", "topics__weights", "click",
            "logged/large/click", "version/large",
        }  # fmt: skip


@pytest.mark.ray
def test_prepare_reads_what_was_joined_and_scored(root, tmp_path, ray_session):
    config = config_of(root)
    with FeedbackJoin(config) as join:
        join.run(through=datetime.datetime(2024, 1, 5, tzinfo=datetime.UTC))
    label_windows(config)
    for folder, scored in (("examples", False), ("shared/large", True)):
        source = ParquetSource(
            ParquetConfig(
                path=str(root / "joined" / folder), example_id="example_id", traffic={"column": "traffic"},
                kind={"column": "kind"} if scored else "impression",
            ),
            every_feature_schema(),
        )  # fmt: skip
        store = ExampleStore(tmp_path / folder)
        manifests = prepare(source, every_feature_schema(), store, lanes=2)
        assert [(m.period, m.rows("impression"), m.rejected) for m in manifests] == [
            ("2024-01-02", 300, {}), ("2024-01-03", 300, {}),
        ]  # fmt: skip
        rows = store.open_lane("2024-01-02", "impression", 0).read()
        ids = rows["example_id"].to_numpy()
        np.testing.assert_array_equal(rows["click"].to_numpy(), ids % 3 == 0)
        assert ("logged/large/watch" in rows.column_names) == scored
        if scored:
            every = student_view(config, "every", "2024-01-02").to_pandas().set_index("example_id")
            np.testing.assert_array_equal(rows["logged/large/watch"], every["logged/large/watch"].loc[ids])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"students": {"a": {"teacher": "lage"}}}, ConfigError, "unknown teacher 'lage'; did you mean 'large'"),
        (
            {"students": {"a": {"teacher": "large", "tasks": ["clik"]}}}, ConfigError,
            "labelling.students.a: unknown task 'clik'; did you mean 'click'",
        ),
        ({"students": {"a": {"teacher": "large", "kinds": ["shown"]}}}, ConfigError, "Input should be 'impression'"),
        ({"students": {"a": {"teacher": "large", "traffics": []}}}, ConfigError, "traffics"),
        (
            {"students": {"a": {"teacher": "large", "traffics": ["fed"]}}}, ConfigError,
            "students.a.traffics: the teacher's examples have no 'fed'; did you mean 'feed'",
        ),
        (
            {"students": {"a": {"teacher": "large", "features": ["ages"]}}}, ConfigError,
            "students.a.features: the teacher's examples have no 'ages'; did you mean 'age'",
        ),
        ({"teachers": {"large": {"model": "dcn"}}}, SnapshotError, "no version of 'dcn'"),
        ({"teachers": {"large": {"model": MODEL, "version": "2024-01-02-aaaaaaaa"}}}, LabelError, "leak: large@"),
        (
            {"teachers": {"large": {"model": MODEL, "tasks": ["click"]}},
             "students": {"a": {"teacher": "large", "tasks": ["watch"]}}},
            ConfigError, "teacher 'large' gives no task 'watch'",
        ),
    ],
)  # fmt: skip
def test_labelling_that_is_refused(root, tmp_path, change, error, message):
    config = config_of(root)
    folder = tmp_path / "examples" / "period=2024-01-02"
    folder.mkdir(parents=True)
    rows = every_feature_rows(30, 1, start=DAY)
    pq.write_table(rows, folder / "batch-00000001.parquet")
    with pytest.raises(error, match=message):
        label_windows(config_of(root, root=str(tmp_path), labelling=config.labelling.dump() | change))
    assert not list((tmp_path / "shared").rglob("*.parquet"))


def test_a_period_that_every_version_saw(root):
    config = config_of(root).labelling.teachers["large"]
    store = SnapshotStore(root / "run")
    with pytest.raises(LabelError, match=r"every version .* was trained on period 2024-01-01 or a later one"):
        next(fresh_versions(store, config, "2024-01-01"))
    assert next(fresh_versions(store, config, "2024-01-02T07")).version == "2024-01-01-aaaaaaaa"
    with pytest.raises(ConfigError, match="no 'labelling'"):
        label_windows(config_of(root, labelling=None))
    with pytest.raises(ConfigError, match="labelling needs emit: complete"):
        config_of(root, emit="per_task")
    with pytest.raises(ConfigError, match="no student 'fed' in the config's labelling; did you mean 'feed'"):
        student_view(config_of(root), "fed", "2024-01-02")


def scored_root(root: Path, tmp_path: Path, files: int = 3) -> AugmentConfig:
    """Files of 2024-01-02 to score, and the versions of `root` with two older ones."""
    shutil.copytree(root / "run" / "snapshots", tmp_path / "run" / "snapshots")
    schema = every_feature_schema()
    config = MODELS["dcnv2"].Config(embedding_dim=8, hidden=(8,), features=FEATURES)
    model = build_model(config, schema, TASKS, seed=5)
    for through in ("2023-12-30", "2023-12-31"):
        publish(
            tmp_path / "run", MODEL, f"{through}-aaaaaaaa", dict(model.state_dict()), trained_through=through,
            config=config.dump(), example_schema=schema.dump(), tasks=TASKS,
        )  # fmt: skip
    folder = tmp_path / "examples" / "period=2024-01-02"
    folder.mkdir(parents=True)
    for number in range(files):
        rows = every_feature_rows(30, 1, start=DAY).set_column(0, "example_id", pa.array(np.arange(30) + 30 * number))
        pq.write_table(rows, folder / f"batch-{number:08d}.parquet")
    labelling = config_of(root).labelling.dump() | {"snapshots": str(tmp_path / "run")}
    return config_of(root, root=str(tmp_path), labelling=labelling)


def collector_of(config: AugmentConfig) -> Collector:
    run = Path(config.labelling.snapshots)
    return Collector(SnapshotStore(run), SQLiteMetadataStore(metadata_path(run)), keep=1)


def test_a_teacher_is_chosen_once_a_period(root, tmp_path, monkeypatch):
    config, read = scored_root(root, tmp_path), []
    manifest = SnapshotStore.manifest
    monkeypatch.setattr(
        SnapshotStore, "manifest", lambda self, model, version: read.append(version) or manifest(self, model, version)
    )
    handle = CountingTeacher("2024-01-01-aaaaaaaa")

    class Both(CountingTeacher):
        def remote(self, table, version):
            answer = handle.remote(table, version)
            answer.predictions = answer.predictions.rename_columns(list(TASKS))
            return answer

    assert [counts["scored"] for counts in label_windows(config, lambda name, teacher: Both())] == [30, 30, 30]
    assert read == ["2024-01-02-aaaaaaaa", *["2024-01-01-aaaaaaaa"] * 3], (
        "from the newest to the first that did not see the period, which is looked at again for its guard, and under "
        "its lease"
    )


def test_the_version_that_scores_is_not_collected(root, tmp_path):
    """Old versions are collected between the teacher's choice and its load, and with each request after it."""
    config = scored_root(root, tmp_path)
    held = []

    class Collected(TeacherHere):
        def remote(self, table, version, representation=False):
            collector = collector_of(config)
            collector.expire(MODEL)
            collector.sweep(MODEL)
            held.append([lease.owner for lease in collector.holders(MODEL, version)])
            return super().remote(table, version, representation)

    done = label_windows(config, lambda name, teacher: Collected(config.labelling.snapshots, teacher.model))
    assert [(counts["version"], counts["scored"]) for counts in done] == [("2024-01-01-aaaaaaaa", 30)] * 3
    assert held == [["augment: large scores 2024-01-02"]] * 3
    collector = collector_of(config)
    assert collector.store.versions(MODEL) == ["2024-01-01-aaaaaaaa", "2024-01-02-aaaaaaaa"]
    assert not collector.holders(MODEL, "2024-01-01-aaaaaaaa"), "given back"
    collector.expire(MODEL)
    assert collector.sweep(MODEL) == ["2024-01-01-aaaaaaaa"]


def test_a_version_that_is_being_deleted_is_passed_over(root, tmp_path):
    config = scored_root(root, tmp_path, files=1)
    collector, teacher = collector_of(config), config.labelling.teachers["large"]
    another = collector.metadata.acquire(f"snapshots/holds/{MODEL}/2024-01-01-aaaaaaaa/replica:a", "a replica", 60.0)
    for version in ("2024-01-01-aaaaaaaa", "2023-12-30-aaaaaaaa"):
        collector.metadata.compare_and_set(f"snapshots/tombstones/{MODEL}/{version}", b"", None)
    (counts,) = label_windows(config)
    assert counts["version"] == "2023-12-31-aaaaaaaa"
    collector.expire(MODEL)
    assert collector.sweep(MODEL) == ["2023-12-30-aaaaaaaa", "2023-12-31-aaaaaaaa"]
    store = SnapshotStore(config.labelling.snapshots)
    with Holds(store, None) as holds:
        with (
            pytest.raises(SnapshotError, match="every version that was not trained on period 2024-01-02 is being del"),
            holds.version("large", teacher, "2024-01-02"),
        ):
            pass
        named = teacher.model_copy(update={"version": "2024-01-01-aaaaaaaa"})
        with pytest.raises(SnapshotError, match="is being deleted"), holds.version("large", named, "2024-01-02"):
            pass
    collector.metadata.release(another)


def test_versions_are_held_in_the_metadata_store_that_is_named(root, tmp_path):
    config = scored_root(root, tmp_path, files=1)
    labelling = config.labelling.dump() | {"metadata": f"sqlite://{tmp_path}/elsewhere.sqlite"}
    label_windows(config_of(root, root=str(tmp_path), labelling=labelling))
    assert (tmp_path / "elsewhere.sqlite").exists()
    assert not (tmp_path / "run" / METADATA).exists()
    with pytest.raises(ConfigError, match=r"labelling\.metadata.*zookeeper://host:port"):
        config_of(root, labelling=labelling | {"metadata": "redis://localhost"})
