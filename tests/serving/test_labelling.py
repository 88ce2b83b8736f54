from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from example_store import every_feature_schema, write_store
from ray.exceptions import ActorDiedError

from rayfm.config import CapacityError, DataError, LabelError, SnapshotError
from rayfm.data.encode import Encoder
from rayfm.data.reader import ArrowReader
from rayfm.data.steps import ReadPlan
from rayfm.labels.store import LabelStore
from rayfm.models import MODELS, build_model
from rayfm.schema import Schema
from rayfm.serving.application import start_teacher, stop_teacher, teacher_handle
from rayfm.serving.labelling import StoredLabels, label_period, teacher_columns
from rayfm.serving.lane_task import score_lane
from rayfm.serving.replicas import Replicas
from rayfm.serving.teacher import TeacherServiceConfig, load_version, score_table
from rayfm.snapshots import SnapshotStore, SQLiteMetadataStore
from rayfm.snapshots.publish import publish
from rayfm.training.spec import PinnedLabels

PERIODS = ["2024-01-01", "2024-01-02", "2024-01-03"]
MODEL, VERSION, BROKEN = "fm.teacher.0", "2024-01-01-aaaaaaaa", "2024-01-01-bbbbbbbb"
TASKS = ("click", "watch")
FEATURES = ("age", "user", "history", "topics")


def test_a_teacher_reads_its_own_columns():
    schema = every_feature_schema()
    assert teacher_columns(schema, FEATURES) == [
        "example_id", "traffic", "age", "user", "history", "topics", "topics__weights",
    ]  # fmt: skip
    assert set(teacher_columns(schema, None)) == {
        *("example_id", "traffic", "topics__weights"),
        *(feature.name for feature in schema.features),
    }
    clash = Schema.model_validate(
        {"features": [{"name": "a", "kind": "dense"}], "tables": {}, "tasks": [{"name": "y"}]}
    )
    assert teacher_columns(clash, ()) == ["example_id", "traffic"]


class Answers:
    """A handle that answers at once."""

    def __init__(self, version: str, score) -> None:
        self.version, self._score, self.sizes = version, score, []
        self.score = self

    def remote(self, table, version):
        self.sizes.append(len(table))
        found = self._score(table)
        answered = self.version

        class Response:
            def result(self):
                return answered, found

        return Response()


class Dying(Answers):
    """A handle whose replicas die under the first requests."""

    def __init__(self, version: str, score, deaths: int) -> None:
        super().__init__(version, score)
        self.deaths = deaths

    def remote(self, table, version):
        response = super().remote(table, version)
        answer = response.result

        def result():
            self.deaths -= 1
            if self.deaths >= 0:
                raise ActorDiedError
            return answer()

        response.result = result
        return response


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr("rayfm.serving.lane_task.ASK_AGAIN_S", (0.0, 0.0))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A run's folder with a published teacher, one with a changed byte, and a store of three periods beside it."""
    root = tmp_path_factory.mktemp("labelling")
    schema = every_feature_schema()
    config = MODELS["dcnv2"].Config(embedding_dim=8, hidden=(8,), features=FEATURES)
    for version in (VERSION, BROKEN):
        model = build_model(config, schema, TASKS, seed=1)
        publish(
            root / "run", MODEL, version, dict(model.state_dict()), trained_through=PERIODS[0], config=config.dump(),
            example_schema=schema.dump(), tasks=TASKS,
        )  # fmt: skip
    (file,) = (root / "run" / "snapshots" / MODEL / BROKEN).glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    write_store(root / "data", PERIODS, impressions=203, considerations=90)
    return root


@pytest.fixture(scope="module")
def store(root):
    return write_store(root / "data", PERIODS, impressions=203, considerations=90)


@pytest.fixture(scope="module")
def loaded(root):
    return load_version(SnapshotStore(root / "run"), MODEL, VERSION)


def test_a_lane_is_scored_in_requests_and_keeps_its_order(store, loaded):
    handle = Answers(VERSION, lambda table: score_table(loaded, table))
    path = str(store.lane_path(PERIODS[1], "impression", 1))
    whole = store.open_lane(PERIODS[1], "impression", 1).read()
    found = score_lane(handle, path, teacher_columns(every_feature_schema(), FEATURES), 20, VERSION)
    assert handle.sizes == [20, 20, 11]
    assert found.column_names == ["example_id", *TASKS]
    assert found["example_id"].to_pylist() == whole["example_id"].to_pylist()
    np.testing.assert_allclose(found["click"].to_numpy(), score_table(loaded, whole)["click"].to_numpy(), rtol=1e-5)


def test_an_answer_of_another_version_is_no_label(store, loaded):
    handle = Answers("another", lambda table: score_table(loaded, table))
    path = str(store.lane_path(PERIODS[1], "impression", 1))
    with pytest.raises(LabelError, match=f"asked {VERSION}, the service answered with another"):
        score_lane(handle, path, teacher_columns(every_feature_schema(), FEATURES), 20, VERSION)


@pytest.mark.usefixtures("no_pauses")
def test_a_request_whose_replica_died_is_asked_again(store, loaded):
    path = str(store.lane_path(PERIODS[1], "impression", 1))
    columns = teacher_columns(every_feature_schema(), FEATURES)
    expected = score_lane(Answers(VERSION, lambda table: score_table(loaded, table)), path, columns, 20, VERSION)
    dying = Dying(VERSION, lambda table: score_table(loaded, table), deaths=2)
    assert score_lane(dying, path, columns, 20, VERSION).equals(expected)
    assert dying.sizes == [20, 20, 20, 20, 11]
    dying = Dying(VERSION, lambda table: score_table(loaded, table), deaths=99)
    with pytest.raises(CapacityError, match="was asked 3 times, and its replica died each time"):
        score_lane(dying, path, columns, 20, VERSION)


@pytest.mark.parametrize("damage", ["missing", "cut off", "overwritten"])
def test_a_lane_that_cannot_be_read_is_named(tmp_path, store, loaded, damage):
    data = store.lane_path(PERIODS[1], "impression", 1).read_bytes()
    path = tmp_path / "lane-1.parquet"
    if damage == "cut off":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "overwritten":
        path.write_bytes(data[:4] + bytes(len(data) // 2) + data[4 + len(data) // 2 :])
    handle = Answers(VERSION, lambda table: score_table(loaded, table))
    with pytest.raises(DataError, match=r"lane-1\.parquet: corrupt or missing Parquet file"):
        score_lane(handle, str(path), teacher_columns(every_feature_schema(), FEATURES), 20, VERSION)


def test_a_teacher_that_saw_the_period_labels_nothing(root, store):
    """The rule holds before anything is asked of a service."""
    labels = LabelStore(root / "leak")
    with pytest.raises(LabelError, match=f"leak: fm@{VERSION} was trained through {PERIODS[0]}"):
        label_period(labels, SnapshotStore(root / "run"), store, "fm", MODEL, VERSION, PERIODS[0], TASKS, handle=None)
    assert not labels.list()


@pytest.fixture(scope="module")
def handle(ray_session, root):
    config = TeacherServiceConfig(root=str(root / "run"), model=MODEL)
    with ThreadPoolExecutor() as pool:  # a pipeline starts its teachers side by side; the first call starts Serve
        handles = [pool.submit(start_teacher, "test", name, config, Replicas(cpus=0.1)) for name in ("fm", "other")]
    yield handles[0].result()
    for name, started in zip(("fm", "other"), handles, strict=True):
        assert started.exception() is None
        stop_teacher("test", name)


def label(root, store, handle, period: str, version: str = VERSION, labels: LabelStore | None = None, **options):
    labels = labels or LabelStore(root / "run")
    snapshots = SnapshotStore(root / "run")
    return label_period(labels, snapshots, store, "fm", MODEL, version, period, TASKS, handle, **options)


@pytest.mark.ray
def test_a_period_is_labelled_whole_and_exactly_once(root, store, handle, loaded):
    ticket = label(root, store, handle, PERIODS[1], rows_per_request=32)
    assert ticket["coverage"] == {"impression": 1.0, "consideration": 1.0}
    assert (ticket["rows"], ticket["labelled"]) == (293, 293)
    assert (ticket["teacher"], ticket["version"], ticket["trained_through"]) == ("fm", VERSION, PERIODS[0])

    labels = LabelStore(root / "run")
    stored = labels.list()
    again = label(root, store, teacher_handle("test", "fm"), PERIODS[1])
    assert labels.list() == stored
    assert sum(part.rows for part in stored) == 293
    assert again["table_version"] == ticket["table_version"], "nothing was committed"
    assert {key: again[key] for key in again if key != "seconds"} == {
        key: ticket[key] for key in ticket if key != "seconds"
    }

    # What a reader gives a student are the model's own predictions, row by row.
    metadata = SQLiteMetadataStore(root / "run" / "metadata.sqlite")
    pinned = PinnedLabels(version=VERSION, table_version=ticket["table_version"])
    lookup = StoredLabels(str(root / "run"), metadata).lookup("fm", pinned, ("click",))
    encoder = Encoder(every_feature_schema(), supervision=("fm/click",))
    plan = ReadPlan(store, tuple(encoder.columns), 64, ("fm/click",), (lookup,), consideration_share=1.0)
    rows = 0
    for batch in ArrowReader(plan, encoder).batches(PERIODS[1]):
        values, mask = batch.supervised("fm/click")
        assert mask.all()
        expected = loaded.model(batch)["click"]
        np.testing.assert_allclose(values.numpy(), expected.numpy(), rtol=1e-5, atol=1e-6)
        rows += len(batch)
    assert rows == 293


@pytest.mark.ray
def test_the_representation_is_stored_and_read_by_a_student(root, store, handle, loaded):
    labels = LabelStore(root / "represented")
    ticket = label(root, store, handle, PERIODS[1], labels=labels, store_representation=True, rows_per_request=32)
    assert ticket["coverage"] == {"impression": 1.0, "consideration": 1.0}
    again = label(root, store, handle, PERIODS[1], labels=labels, store_representation=True)
    assert again["table_version"] == ticket["table_version"], "nothing was committed"
    pinned = PinnedLabels(version=VERSION, table_version=ticket["table_version"])
    source = StoredLabels(str(root / "represented"), SQLiteMetadataStore(root / "represented" / "metadata.sqlite"))
    width = loaded.model.model.representation_dim
    encoder = Encoder(every_feature_schema(), supervision=("fm/watch",), representations=(("fm", width),))
    plan = ReadPlan(
        store, tuple(encoder.columns), 64, ("fm/watch",), (source.lookup("fm", pinned, ("watch",)),), 1.0,
        (("fm", width),), (source.representation("fm", pinned, width),),
    )  # fmt: skip
    rows = 0
    for batch in ArrowReader(plan, encoder).batches(PERIODS[1]):
        values, mask = batch.represented("fm")
        assert mask.all()
        predictions, expected = loaded.model.predict(batch)
        np.testing.assert_allclose(values.numpy(), expected.numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(batch.supervised("fm/watch")[0], predictions["watch"], rtol=1e-5, atol=1e-6)
        rows += len(batch)
    assert rows == 293


@pytest.mark.ray
def test_considerations_may_be_left_unlabelled(root, store, handle):
    labels = LabelStore(root / "impressions")
    ticket = label(root, store, handle, PERIODS[2], labels=labels, considerations=False)
    assert ticket["coverage"] == {"impression": 1.0}
    assert {part.kind for part in labels.list()} == {"impression"}


@pytest.mark.ray
def test_a_job_that_was_cut_short_labels_the_rest(root, store, handle, loaded):
    """Lanes that stand are not scored again: these stand with other predictions, which stay."""
    labels = LabelStore(root / "rest")
    schema = every_feature_schema()
    lanes = []
    for lane in (0, 2):
        table = store.open_lane(PERIODS[1], "impression", lane).read()
        scored = score_table(loaded, table).set_column(0, "click", [np.full(len(table), 0.125, np.float32)])
        lanes.append(("impression", lane, scored.add_column(0, "example_id", table["example_id"])))
    labels.label("fm", VERSION, PERIODS[0], PERIODS[1], lanes, [schema.task(task) for task in TASKS])
    ticket = label(root, store, handle, PERIODS[1], labels=labels)
    assert ticket["coverage"] == {"impression": 1.0, "consideration": 1.0}
    places = [(part.kind, part.lane) for part in labels.list()]
    assert len(set(places)) == len(places) == 8
    lookup = StoredLabels(str(root / "rest")).lookup(
        "fm", PinnedLabels(version=VERSION, table_version=ticket["table_version"]), ("click",)
    )
    ids = {lane: store.open_lane(PERIODS[1], "impression", lane).read()["example_id"].to_numpy() for lane in (0, 1)}
    kept = lookup.rows(PERIODS[1], "impression", 0, 0, len(ids[0]), ids[0])[0]
    made = lookup.rows(PERIODS[1], "impression", 1, 0, len(ids[1]), ids[1])[0]
    assert (kept == 0.125).all()
    assert not (made == 0.125).any()


@pytest.mark.ray
def test_a_snapshot_that_cannot_be_used_is_one_clear_line(root, store, handle):
    labels = LabelStore(root / "broken")
    with pytest.raises(SnapshotError) as error:
        label(root, store, handle, PERIODS[1], version=BROKEN, labels=labels)
    assert "bytes differ from the manifest" in str(error.value)
    assert "\n" not in str(error.value)
    assert not labels.list()
