"""The store in a bucket, on moto's S3 server: a real HTTP service with conditional writes."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
from buckets import BUCKET, ENVIRONMENT, ID, SECRET, objects, put, s3_service
from example_store import write_store
from stored_lanes import LANES, PERIOD, ROWS, TASKS, all_lanes, check_complete, lane_labels, run_job, write

from rayfm.config import ConfigError, LabelError, validate
from rayfm.labels import (
    LabelLookup,
    LabelStore,
    Retention,
    Storage,
    compact,
    coverage,
    expire,
)
from rayfm.labels.files import one_line
from rayfm.labels.history import HistorySpec, HistoryState, HistoryStore
from rayfm.snapshots import SQLiteMetadataStore

KEYS = {"access_key_id": ID, "secret_access_key": SECRET}
SPAWN = multiprocessing.get_context("spawn")
HISTORY = HistorySpec("fm", "user", 0.5, None, 2)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_service() as url:
        yield url


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def storage(endpoint, request) -> Storage:
    return Storage(
        root=f"s3://{BUCKET}/{request.node.name.replace('[', '-').replace(']', '')}", endpoint=endpoint, **KEYS
    )


@pytest.fixture
def guarded(storage, tmp_path) -> LabelStore:
    return LabelStore(storage, SQLiteMetadataStore(tmp_path / "meta.db"))


def test_a_job_run_twice_doubles_nothing(storage):
    first, second = run_job(storage), run_job(storage)
    assert (first.added, second.added, second.skipped) == (2 * LANES, 0, 2 * LANES)
    check_complete(storage)
    store = LabelStore(storage)
    assert store.labelled_lanes("fm", "2022-04-25-aa", PERIOD) == {(kind, lane) for kind, lane, _ in all_lanes()}
    record = write(storage, 9)
    assert store.commit([record], app_id="job", app_version=1).added == 1
    assert store.commit([write(storage, 10)], app_id="job", app_version=1).added == 0


def test_a_look_up_travels_to_another_process_with_its_storage(storage):
    run_job(storage)
    lookup = LabelLookup((storage, None), "fm", "2022-04-25-aa", ("click",))
    with SPAWN.Pool(1) as pool:
        ids = lane_labels(1)["example_id"].to_numpy()
        values, mask = pool.apply(lookup.rows, (PERIOD, "impression", 1, 0, ROWS, ids))
    assert mask.all()
    np.testing.assert_array_equal(values[:, 0], lane_labels(1)["click"].to_numpy())
    assert "a-secret" not in repr(storage) + repr(lookup.__getstate__())


def race(storage: Storage, start, results) -> None:
    store = LabelStore(storage)
    records = [write(storage, lane) for lane in range(LANES)]
    start.wait()
    results.put(sum(store.commit([record]).added for record in records))


def test_processes_that_commit_at_once_lose_and_double_nothing(storage):
    """Twins, lane by lane: a put that is not conditional would overwrite the other's commit."""
    start, results = SPAWN.Barrier(2), SPAWN.Queue()
    racers = [SPAWN.Process(target=race, args=(storage, start, results)) for _ in range(2)]
    for racer in racers:
        racer.start()
    added = [results.get(timeout=120) for _ in racers]
    for racer in racers:
        racer.join(60)
        assert racer.exitcode == 0
    assert sum(added) == LANES
    assert [(part.lane, part.rows) for part in LabelStore(storage).list()] == [(lane, ROWS) for lane in range(LANES)]


def test_pins_compaction_expiry_and_vacuum(guarded):
    storage = guarded.storage
    run_job(storage, "2022-04-24-aa")
    run_job(storage, "2022-04-25-aa")
    pin = pickle.loads(pickle.dumps(guarded.pin("fm", "2022-04-24-aa", "student")))
    ids = lane_labels(2)["example_id"].to_numpy()

    def read() -> bytes:
        lookup = LabelLookup(pin, "fm", "2022-04-24-aa", ("click", "watch_time"))
        values, mask = lookup.rows(PERIOD, "impression", 2, 0, ROWS, ids)
        assert mask.all()
        return values.tobytes()

    before = read()
    (done,) = compact(guarded)
    assert (done.files_before, done.files_after, done.rows) == (4 * LANES, 2, 4 * LANES * ROWS)
    check_complete(storage, "2022-04-24-aa")
    check_complete(storage, "2022-04-25-aa")
    (kept,) = expire(guarded, Retention(keep_versions=1))
    assert kept.kept_for == ("student",)
    expire(guarded, Retention(keep_versions=1), also_pinned=True)
    assert guarded.vacuum(retention_hours=0) == []
    assert read() == before
    guarded.release(pin)
    assert len(guarded.vacuum(retention_hours=0)) == 4 * LANES + 1
    check_complete(storage, "2022-04-25-aa")
    with pytest.raises(LabelError, match="missing label file"):
        read()
    with pytest.raises(LabelError, match="they were expired"):
        guarded.pin("fm", "2022-04-24-aa", "too late")


def test_representations(storage):
    vectors = np.random.default_rng(0).standard_normal((ROWS, 4)).astype(np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), 4)
    store = LabelStore(storage)
    for lane in range(2):
        store.commit([write(storage, lane, lane_labels(lane).append_column("representation", column))])
    compact(store)
    ids = lane_labels(1)["example_id"].to_numpy()
    lookup = LabelLookup((storage, None), "fm", "2022-04-25-aa", (), 4)
    values, mask = lookup.vectors(PERIOD, "impression", 1, 0, ROWS, ids)
    assert mask.all()
    assert values.tobytes() == vectors.tobytes()


def test_coverage(storage, tmp_path):
    examples = write_store(tmp_path, [PERIOD], impressions=200, lanes=2)
    ids = examples.open_lane(PERIOD, "impression", 0).read(["example_id"])["example_id"].to_numpy()
    labels = pa.table({"example_id": ids, "click": np.full(len(ids), 0.5), "watch_time": np.ones(len(ids))})
    LabelStore(storage).label("fm", "v", None, PERIOD, [("impression", 0, labels)], TASKS)
    rows = coverage(LabelStore(storage), examples)
    assert sum(row.labelled for row in rows) == 100
    assert sum(row.total for row in rows) == 200


def test_keys_and_endpoint_come_from_the_environment(endpoint, storage, monkeypatch):
    run_job(storage)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "an-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret")
    check_complete(storage.root)
    assert run_job(storage.root).added == 0
    options = Storage(root=storage.root).delta_options()
    assert options["aws_conditional_put"] == "etag"
    assert (options["aws_access_key_id"], options["aws_region"], options["aws_allow_http"]) == (
        "an-id", "us-east-1", "true",
    )  # fmt: skip
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a-token")
    assert Storage(root=storage.root).delta_options()["aws_session_token"] == "a-token"
    assert Storage(root=storage.root).delta_options()["aws_region"] == "eu-west-1"
    own = Storage(root=storage.root, region="us-west-2", endpoint="https://s3.example.org", **KEYS).delta_options()
    assert "aws_session_token" not in own, "keys of two origins are not mixed"
    assert (own["aws_region"], own["aws_endpoint"]) == ("us-west-2", "https://s3.example.org")
    assert "aws_allow_http" not in own


def test_what_is_not_there_is_one_line(endpoint):
    empty = LabelStore(Storage(root=f"s3://{BUCKET}/nothing", endpoint=endpoint, **KEYS))
    assert empty.list() == []
    assert compact(empty) == []
    with pytest.raises(LabelError, match="no labels yet"):
        LabelLookup((empty.storage, None), "fm", "v", ("click",))
    nowhere = Storage(root="s3://no-such-bucket/labels", endpoint=endpoint, **KEYS)
    for use in (lambda: LabelStore(nowhere).list(), lambda: write(nowhere)):
        with pytest.raises(LabelError, match=r"s3://no-such-bucket/labels.*check bucket, endpoint and keys") as found:
            use()
        assert len(str(found.value).splitlines()) == 1
        assert "\x1b" not in str(found.value)


def test_a_data_file_that_went_is_noticed(storage):
    record = write(storage)
    with pytest.raises(LabelError, match="not what a worker wrote; label the lane again"):
        LabelStore(storage).commit([record.model_copy(update={"path": record.path.replace("lane", "lame")})])
    with pytest.raises(LabelError, match="not what a worker wrote"):
        LabelStore(storage).commit([record.model_copy(update={"bytes": record.bytes + 1})])


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"root": "gs://bucket/x"}, "'gs' is no storage; give a folder or s3://bucket/prefix"),
        ({"root": "s3://"}, "is not s3://bucket/prefix"),
        ({"root": "s3://bucket/a b"}, "is not s3://bucket/prefix"),
        ({"root": "runs/demo", "endpoint": "http://minio:9000"}, "'endpoint' is for s3:// roots"),
        ({"root": "s3://bucket", "endpoint": "minio:9000"}, "is not an http or https URL"),
        ({"root": "s3://bucket", "access_key_id": "x"}, "access_key_id and secret_access_key together"),
        ({"root": "s3://bucket", "acces_key_id": "x"}, "did you mean 'access_key_id'"),
    ],
)
def test_a_storage_that_cannot_be_is_refused(values, complaint):
    with pytest.raises(ConfigError, match=complaint) as found:
        validate(Storage, values)
    assert "'x'" not in str(found.value)


def test_a_store_opens_what_is_a_storage_only():
    with pytest.raises(ConfigError, match=r"label store: .*'ftp' is no storage"):
        LabelStore("ftp://somewhere")
    assert Storage(root="s3://bucket/a/b/").table == "s3://bucket/a/b/labels"
    assert Storage(root="runs/demo").table == "runs/demo/labels"


def test_messages_of_clients_become_one_line():
    page = "\x1b[31mGeneric\x1b[0m S3 error\n  ↳ 404\n<?xml version='1.0'?>\n<Error><Code>NoSuchKey</Code></Error>"
    assert one_line(page) == "Generic S3 error 404 (NoSuchKey)"
    assert len(one_line("x" * 1000)) == 300


def test_a_label_job_and_a_trainer_meet_in_a_bucket(storage, tmp_path):
    from served_models import publish_model

    from rayfm.serving.labelling import StoredLabels, label_period
    from rayfm.serving.teacher import TeacherHere
    from rayfm.snapshots import SnapshotStore
    from rayfm.training.spec import PinnedLabels

    version, period = "2024-01-01-0123abcd", "2024-01-02"
    publish_model(tmp_path, "fm.teacher.0", version, seed=1)
    examples = write_store(tmp_path, [period], impressions=120, considerations=40, lanes=2)
    job = (SnapshotStore(tmp_path), examples, "fm", "fm.teacher.0", version, period, ("click",))
    teacher = TeacherHere(str(tmp_path), "fm.teacher.0")
    metadata = SQLiteMetadataStore(tmp_path / "meta.db")
    first, second = (label_period(LabelStore(storage, metadata), *job, teacher) for _ in range(2))
    assert first["coverage"] == {"impression": 1.0, "consideration": 1.0}
    assert second["table_version"] == first["table_version"], "the second found its labels"
    pinned = PinnedLabels(version=version, table_version=first["table_version"])
    lookup = StoredLabels(storage, metadata).lookup("fm", pinned, ("click",))
    ids = examples.open_lane(period, "impression", 1).read(["example_id"])["example_id"].to_numpy()
    values, mask = lookup.rows(period, "impression", 1, 0, 60, ids)
    assert mask.all()
    assert len(np.unique(values)) > 10


def states() -> tuple[HistoryState, HistoryState]:
    """Two of one history."""
    one = HistoryState.empty(2, pa.int64()).then(0.5, [(pa.array([7, 3]), np.array([[1, 0], [1 / 3, 5]], np.float32))])
    return one, one.then(0.5, [(pa.array([7]), np.array([[6, 0.1]], np.float32))])


def test_a_history_is_read_back_bit_for_bit_and_replaced_whole(storage, tmp_path):
    histories, here = HistoryStore(storage), HistoryStore(tmp_path)
    for state in states():
        for store in (histories, here):
            store.write(HISTORY, PERIOD, state, "2022-04-24-aa")
            found = store.read(HISTORY, PERIOD)
            assert found.keys.equals(state.keys)
            assert (found.weight.tobytes(), found.vector.tobytes()) == (state.weight.tobytes(), state.vector.tobytes())
    assert histories.stands(HISTORY, PERIOD)
    assert not histories.stands(HISTORY, "2022-05-01")
    prefix = storage.root.removeprefix(f"s3://{BUCKET}/")
    key = f"{prefix}/histories/fm/user/{PERIOD}.parquet"
    written = (tmp_path / "histories" / histories.path(HISTORY, PERIOD)).read_bytes()
    assert objects(storage.endpoint, prefix) == {key: len(written)}, "the folder's bytes, and nothing beside them"
    with histories.files.read(histories.path(HISTORY, PERIOD)) as file:
        assert file.read() == written
    with pytest.raises(LabelError, match=r"made with decay 0\.5, asked with 0\.9; start a new run"):
        histories.read(HistorySpec("fm", "user", 0.9, None, 2), PERIOD)
    with pytest.raises(
        LabelError, match=r"s3://.*/histories/fm/user/2022-05-01.parquet: no history before this period"
    ):
        histories.read(HISTORY, "2022-05-01")
    put(storage.endpoint, key, b"PAR1")
    with pytest.raises(LabelError, match="corrupt history") as found:
        histories.read(HISTORY, PERIOD)
    assert len(str(found.value).splitlines()) == 1


def break_off(file) -> None:
    file.write(b"half of it")
    raise KeyError("broken off")


@pytest.mark.parametrize("bucket", [True, False])
def test_a_file_that_is_broken_off_leaves_the_one_before(storage, tmp_path, bucket):
    """Closing a stream of Arrow's completes its upload, so nothing may be sent before all is there."""
    files = (storage if bucket else Storage(root=str(tmp_path))).files("histories")
    with pytest.raises(KeyError):
        files.put("a/b", break_off)
    assert not files.stand()
    files.put("a/b", lambda file: file.write(b"whole"))
    with pytest.raises(KeyError):
        files.put("a/b", break_off)
    with files.read("a/b") as file:
        assert file.read() == b"whole"
    assert files.sizes(["a/b", "a/c"]) == [5, None]
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ([] if bucket else ["b"])


@pytest.mark.parametrize("bucket", [True, False])
def test_a_store_is_cleared_and_its_neighbours_stay(endpoint, tmp_path, request, bucket):
    """Beside it lie a store whose name begins alike, one below it, and what is not the store's."""
    top = request.node.name.partition("[")[0]
    base = f"s3://{BUCKET}/{top}" if bucket else str(tmp_path)
    options = {"endpoint": endpoint, **KEYS} if bucket else {}
    store, other, inner = (Storage(root=f"{base}/{name}", **options) for name in ("run", "run-2", "run/inner"))

    def kept() -> list[str]:
        found = objects(endpoint, f"{top}/run") if bucket else (tmp_path / "run").rglob("*.txt")
        return [key for key in map(str, found) if key.endswith(".txt")]

    for one in (store, other, inner):
        assert not one.stands()
        one.clear()  # nothing is there, and that is no error
        run_job(one)
        HistoryStore(one).write(HISTORY, PERIOD, states()[0], None)
        assert one.stands()
    for name in ("run/notes.txt", "run/labels.txt"):
        if bucket:
            put(endpoint, f"{top}/{name}", b"mine")
        else:
            (tmp_path / name).write_text("mine")
    store.clear()
    assert not store.stands()
    assert LabelStore(store).list() == []
    assert not HistoryStore(store).stands(HISTORY, PERIOD)
    assert len(kept()) == 2
    for one in (other, inner):
        check_complete(one)
        assert HistoryStore(one).stands(HISTORY, PERIOD)
    assert run_job(store).added == 2 * LANES, "a cleared place is as good as new"
    check_complete(store)
    store.clear()
    HistoryStore(store).write(HISTORY, PERIOD, states()[0], None)
    assert store.stands(), "histories alone are something"


def test_access_is_tried_out_before_there_is_something_to_store(storage, tmp_path):
    storage.check_access()
    assert objects(storage.endpoint, storage.root.removeprefix(f"s3://{BUCKET}/")) == {}
    assert not storage.stands()
    Storage(root=str(tmp_path)).check_access()
    assert not Storage(root=str(tmp_path)).stands()
    nowhere = Storage(root="s3://no-such-bucket/labels", endpoint=storage.endpoint, **KEYS)
    gone = Storage(root=f"s3://{BUCKET}/labels", endpoint="http://127.0.0.1:1", **KEYS)
    for use in (nowhere.check_access, gone.stands, gone.clear):
        with pytest.raises(LabelError, match=r"s3://[\w-]+/labels/histories.*check bucket, endpoint and keys") as found:
            use()
        assert len(str(found.value).splitlines()) == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(LabelError, match="cannot write"):
        Storage(root=str(tmp_path / "file")).check_access()
