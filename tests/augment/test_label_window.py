"""Scoring in the window: each example once for all students, each student its own part."""

from __future__ import annotations

import datetime
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from example_store import DAY_US, every_feature_rows, every_feature_schema

from rayfm.augment.config import AugmentConfig
from rayfm.augment.join import FeedbackJoin
from rayfm.augment.labelling import label_windows, student_view
from rayfm.augment.shared import SharedDataset
from rayfm.augment.versions import METADATA, Holds, fresh_versions
from rayfm.augment.views import ViewConfig, with_clusters
from rayfm.augment.window import ScoringTeacher, label_window
from rayfm.config import ConfigError, DataError, LabelError, SnapshotError, validate
from rayfm.data.prepare import prepare
from rayfm.data.sources.base import Period
from rayfm.data.sources.parquet import ParquetConfig, ParquetSource
from rayfm.data.store import ExampleStore
from rayfm.models import MODELS, build_model
from rayfm.pipeline.tickets import metadata_path
from rayfm.schema import Schema
from rayfm.serving.teacher import TeacherHere, load_version, score_table
from rayfm.snapshots import Collector, SnapshotStore, SQLiteMetadataStore
from rayfm.snapshots.publish import publish

SCHEMA = Schema.model_validate(
    {
        "tables": {"item": {"rows": 100}},
        "features": [
            {"name": "price", "kind": "dense"},
            {"name": "item", "kind": "sparse"},
            {"name": "tags", "kind": "weighted", "table": "item"},
        ],
        "tasks": [{"name": "click"}, {"name": "buy"}],
        "traffics": ["feed", "search", "video"],
    }
)
VERSION = "2024-01-01-aaaaaaaa"
DAY = 19_724 * DAY_US
"""2024-01-02."""


def period_of(day: int) -> Period:
    start = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(days=day - 1)
    return Period(name=start.strftime("%Y-%m-%d"), start=start, end=start + datetime.timedelta(days=1))


class CountingTeacher:
    """Predicts from the example id, and counts how often it is asked for one."""

    def __init__(self, version: str = VERSION) -> None:
        self.asked: Counter[int] = Counter()
        self.sizes: list[int] = []
        self.columns: set[str] = set()
        self.version, self.fail_at = version, 0
        self.score = self

    def remote(self, table: pa.Table, version: str) -> CountingTeacher:
        if len(self.sizes) + 1 == self.fail_at:
            raise LabelError("the service is gone")
        ids = table["example_id"].to_numpy()
        self.asked.update(ids.tolist())
        self.sizes.append(len(ids))
        self.columns |= set(table.column_names)
        answer = CountingTeacher(self.version)
        answer.predictions = pa.table(
            {"click": (ids % 97 / 97).astype(np.float32), "buy": (ids % 89 / 89).astype(np.float32)}
        )
        return answer

    def result(self) -> tuple[str, pa.Table]:
        return self.version, self.predictions


def teacher(handle: CountingTeacher, **changes) -> ScoringTeacher:
    known = {
        "name": "large", "version": VERSION, "trained_through": "2024-01-01", "example_schema": SCHEMA,
        "features": ("price", "tags"), "tasks": ("click", "buy"), "handle": handle,
    }  # fmt: skip
    return ScoringTeacher(**(known | changes))


def examples(rows: int = 400, seed: int = 0) -> pa.Table:
    """Rows of 2024-01-02 in three traffics and two stages, a tenth of them considerations."""
    rng = np.random.default_rng(seed)
    kind = np.where(rng.random(rows) < 0.1, "consideration", "impression")
    offsets = np.arange(rows + 1, dtype=np.int32)
    label = pa.array((rng.random(rows) < 0.3).astype(np.float32), mask=kind == "consideration")
    return pa.table(
        {
            "example_id": pa.array(rng.permutation(rows * 10)[:rows]),
            "time": pa.array(DAY + rng.integers(0, DAY_US, rows)),
            "traffic": rng.choice(["feed", "search", "video"], rows).tolist(),
            "kind": kind.tolist(),
            "stage_reached": rng.choice(["ranking", "early"], rows).tolist(),
            "price": pa.array(rng.random(rows)),  # float64: the store's type is float32
            "item": pa.array(rng.integers(0, 50, rows).astype(np.int32)),
            "tags": pa.ListArray.from_arrays(offsets, pa.array(rng.integers(0, 50, rows))),
            "tags__weights": pa.ListArray.from_arrays(offsets, pa.array(rng.random(rows, dtype=np.float32))),
            "click": label,
            "buy": label,
            "request_id": pa.array(np.arange(rows)),
        }
    )


STUDENTS = {
    "feed": ViewConfig(teacher="large", traffics=("feed",), features=("price", "item"), tasks=("click",)),
    "two": ViewConfig(teacher="large", traffics=("feed", "search"), kinds=("impression", "consideration")),
    "early": ViewConfig(teacher="large", stages=("early",), traffics=("feed", "search"), features=("tags",)),
    "another": ViewConfig(teacher="small"),
}


def view_of(shared: SharedDataset, table: pa.Table, student: str) -> pa.Table:
    return shared.view(table, student, STUDENTS[student], SCHEMA)


def test_an_example_is_scored_once_for_all_students():
    handle, table = CountingTeacher(), examples()
    window = label_window(table, teacher(handle), period_of(2), STUDENTS, rows_per_request=100)
    wanted = {row["example_id"] for row in table.to_pylist() if row["traffic"] != "video"}
    assert set(handle.asked) == wanted
    assert set(handle.asked.values()) == {1}, "three students want most of these"
    assert max(handle.sizes) == 100
    assert handle.columns == {"example_id", "traffic", "price", "tags", "tags__weights"}
    assert window.unwanted == 400 - len(wanted)
    shared = window.shared
    assert set(shared["example_id"].to_pylist()) == wanted
    ids = shared["example_id"].to_numpy()
    np.testing.assert_array_equal(shared["logged/large/click"].to_numpy(), (ids % 97 / 97).astype(np.float32))
    np.testing.assert_array_equal(shared["logged/large/buy"].to_numpy(), (ids % 89 / 89).astype(np.float32))
    assert set(shared["version/large"].to_pylist()) == {VERSION}
    assert shared.schema.field("price").type == pa.float32(), "the example store's types"


def test_a_student_sees_its_own_rows_and_columns(tmp_path):
    table = examples()
    shared = label_window(table, teacher(CountingTeacher()), period_of(2), STUDENTS).shared
    rows = table.to_pylist()
    found = {name: view_of(SharedDataset(tmp_path, "large"), shared, name) for name in ("feed", "two", "early")}
    assert found["feed"].column_names == [
        "example_id", "time", "kind", "traffic", "stage_reached", "price", "item", "click", "logged/large/click",
        "version/large",
    ]  # fmt: skip
    assert set(found["early"].column_names) - set(found["feed"].column_names) == {
        "tags", "tags__weights", "buy", "logged/large/buy",
    }  # fmt: skip
    wanted = {
        "feed": [r for r in rows if r["traffic"] == "feed" and r["kind"] == "impression"],
        "two": [r for r in rows if r["traffic"] != "video"],
        "early": [
            r for r in rows
            if r["traffic"] != "video" and r["stage_reached"] == "early" and r["kind"] == "impression"
        ],
    }  # fmt: skip
    for name, part in wanted.items():
        assert sorted(found[name]["example_id"].to_pylist()) == sorted(row["example_id"] for row in part)
        prices = {row["example_id"]: row["click"] for row in part}
        for row in found[name].to_pylist():
            assert row["click"] == prices[row["example_id"]]


def test_a_view_copies_nothing(tmp_path):
    shared = label_window(examples(), teacher(CountingTeacher()), period_of(2), STUDENTS).shared

    def buffers(table: pa.Table, name: str) -> set[tuple[int, int]]:
        return {(b.address, b.size) for chunk in table[name].chunks for b in chunk.buffers() if b is not None}

    view = view_of(SharedDataset(tmp_path, "large"), shared, "early")
    assert 0 < view.num_rows < shared.num_rows
    assert view["price" if "price" in view.column_names else "tags"].num_chunks <= 5, "one slice a run of rows"
    for name in view.column_names:
        assert buffers(view, name) <= buffers(shared, name), name


def test_rows_of_a_run_are_in_time_order():
    table = with_clusters(examples())
    runs = {}
    for row in table.to_pylist():
        runs.setdefault((row["kind"], row["traffic"], row["stage_reached"]), []).append(row["time"])
    assert len(runs) == 12
    assert all(times == sorted(times) for times in runs.values())
    assert table.column("kind").num_chunks == 1
    changes = sum(
        one != other
        for one, other in zip(
            zip(*(table[name].to_pylist()[1:] for name in ("kind", "traffic", "stage_reached")), strict=True),
            zip(*(table[name].to_pylist()[:-1] for name in ("kind", "traffic", "stage_reached")), strict=True),
            strict=True,
        )
    )
    assert changes == 11


@pytest.mark.parametrize(
    ("trained", "period", "leaks"),
    [
        ("2024-01-01", "2024-01-02", False),
        ("2024-01-02", "2024-01-02", True),
        ("2024-01-03", "2024-01-02", True),
        ("2024-01-02", "2024-01-02T05", True),
        ("2024-01-01", "2024-01-02T05", False),
        ("2024-01-02T04", "2024-01-02T05", False),
        ("2024-01-02T05", "2024-01-02T05", True),
        ("2024-01-02T05", "2024-01-02", True),
        (None, "2024-01-02", False),
    ],
)
def test_a_teacher_that_saw_the_period_scores_nothing(trained, period, leaks):
    handle = CountingTeacher()
    scoring = teacher(handle, trained_through=trained)
    span = period_of(2).model_copy(update={"name": period})
    if leaks:
        with pytest.raises(LabelError, match=f"leak: large@{VERSION} was trained through {trained}"):
            label_window(examples(), scoring, span, STUDENTS)
        assert not handle.asked
    else:
        assert label_window(examples(), scoring, span, STUDENTS).shared.num_rows


def test_answers_that_are_no_supervision():
    with pytest.raises(LabelError, match=f"asked large@{VERSION}, the service answered with another"):
        label_window(examples(), teacher(CountingTeacher("another")), period_of(2), STUDENTS)
    with pytest.raises(LabelError, match=f"large@{VERSION} has no labels of task 'bui'; did you mean 'buy'"):
        label_window(examples(), teacher(CountingTeacher(), tasks=("bui",)), period_of(2), STUDENTS)

    class Short(CountingTeacher):
        def remote(self, table, version):
            return super().remote(table.slice(1), version)

    with pytest.raises(LabelError, match="rows were asked and"):
        label_window(examples(), teacher(Short()), period_of(2), STUDENTS)
    with pytest.raises(DataError, match="no student takes teacher 'huge'"):
        label_window(examples(), teacher(CountingTeacher(), name="huge"), period_of(2), STUDENTS)
    with pytest.raises(DataError, match="lack column 'price'"):
        label_window(examples().drop_columns("price"), teacher(CountingTeacher()), period_of(2), STUDENTS)
    with pytest.raises(DataError, match="a view chooses by 'stage_reached', which the examples lack"):
        label_window(examples().drop_columns("stage_reached"), teacher(CountingTeacher()), period_of(2), STUDENTS)


def test_rows_that_no_store_would_take_are_rejected_not_scored():
    table = examples(20)
    bad = table.slice(0, 2).set_column(5, "price", pa.array([float("nan"), 1.0]))
    bad = bad.set_column(2, "traffic", pa.array(["feed", "lift"]))
    outside = table.slice(3, 1).set_column(1, "time", pa.array([DAY + DAY_US]))
    rows = pa.concat_tables([table.slice(2), bad, outside, table.slice(4, 1)])
    handle = CountingTeacher()
    every = {"all": ViewConfig(teacher="large", kinds=("impression", "consideration"))}
    window = label_window(rows, teacher(handle), period_of(2), every)
    assert sorted(window.rejected["reason"].to_pylist()) == [
        "dense 'price' is not finite", "example_id twice in its period", "time outside every period",
        "unknown traffic",
    ]  # fmt: skip
    assert window.shared.num_rows == 18
    assert set(handle.asked.values()) == {1}


def test_examples_of_one_traffic_without_kind_and_tasks():
    schema = Schema.model_validate(SCHEMA.dump() | {"traffics": ["all"]})
    rows = examples(10).drop_columns(["traffic", "kind", "buy"])
    window = label_window(
        rows, teacher(CountingTeacher(), example_schema=schema), period_of(2), {"all": ViewConfig(teacher="large")}
    )
    assert window.shared.num_rows == 10
    assert window.shared["buy"].null_count == 10
    assert set(window.shared["kind"].to_pylist()) == {"impression"}
    assert set(window.shared["traffic"].to_pylist()) == {"all"}


def test_what_is_scored_stays_scored(tmp_path):
    """A labeller that dies goes on with what is left; nothing is scored twice, or by two processes at once."""
    folder = tmp_path / "examples" / "period=2024-01-02"
    folder.mkdir(parents=True)
    table = examples(300)
    for number in range(3):
        pq.write_table(table.slice(number * 100, 100), folder / f"batch-{number:08d}.parquet")
    shared, handle = SharedDataset(tmp_path, "large"), CountingTeacher()
    handle.fail_at = 2

    def label_all() -> list[int]:
        with shared.lock():
            return [
                shared.label(period_of(2), file, teacher(handle), STUDENTS)["scored"] for _, file in shared.waiting()
            ]

    with pytest.raises(LabelError, match="the service is gone"):
        label_all()
    assert [file for _, file in shared.waiting()] == ["batch-00000001.parquet", "batch-00000002.parquet"]
    handle.fail_at = 0
    assert len(label_all()) == 2
    assert label_all() == []
    assert set(handle.asked.values()) == {1}
    assert shared.periods() == ["2024-01-02"]
    whole = shared.table("2024-01-02")
    assert set(whole["example_id"].to_pylist()) == set(handle.asked)
    assert view_of(shared, whole, "feed")["item"].num_chunks <= 4
    with shared.lock(), pytest.raises(DataError, match="another process scores for teacher 'large'"), shared.lock():
        pass
    with pytest.raises(DataError, match="nothing of period 2024-01-03 is scored"):
        shared.table("2024-01-03")


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (ViewConfig(teacher="small"), "no supervision of teacher 'small'"),
        (ViewConfig(teacher="large", features=("prize",)), "no feature 'prize'; did you mean 'price'"),
        (ViewConfig(teacher="large", tasks=("bui",)), "no label and supervision of task 'bui'; did you mean 'buy'"),
    ],
)
def test_views_of_what_is_not_there(tmp_path, view, message):
    shared = label_window(examples(50), teacher(CountingTeacher()), period_of(2), STUDENTS).shared
    with pytest.raises(DataError, match=message):
        SharedDataset(tmp_path, "large").view(shared, "mine", view, SCHEMA)


# From logs to views, with a teacher that is really published.

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
