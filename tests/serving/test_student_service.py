from __future__ import annotations

import asyncio
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from served_models import SCHEMA, as_examples, candidate_rows, predictions, publish_model, user_row

from rayfm.client.wire import ARROW, write_streams
from rayfm.config import DataError, SnapshotError
from rayfm.export.config import CompileConfig
from rayfm.serving.http.codecs import Payload
from rayfm.serving.http.config import EndpointsConfig, LimitsConfig
from rayfm.serving.http.problems import Problem
from rayfm.serving.http.queue import Deadline
from rayfm.serving.student import Students
from rayfm.serving.teacher import load_version
from rayfm.serving.versions import NewestFollower, Shelf, warm
from rayfm.snapshots import SnapshotStore

CONFIG = EndpointsConfig(poll_s=0.02, max_loaded=2, compile=CompileConfig(compile="torchscript"))
USER, CANDIDATES = user_row(), candidate_rows(30)
BODY = write_streams([USER, CANDIDATES])


def payload(body: bytes = BODY) -> Payload:
    return Payload(body, ARROW, LimitsConfig())


def score(students: Students, model: str, body: bytes = BODY, seconds: float = 30.0):
    return asyncio.run(students.score(model, payload(body), Deadline(seconds)))


def until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def models(root):
    return {name: publish_model(root, name, "v1", seed) for seed, name in enumerate(("a.none.1", "b.none.1", "c.x.1"))}


@pytest.fixture
def students(root, models):
    service = Students(str(root), tuple(models), CONFIG)
    yield service
    service.close()


def test_every_candidate_gets_the_models_own_predictions(students, models):
    for name, model in models.items():
        scored = score(students, name)
        assert scored.version == "v1"
        assert scored.predictions.column_names == ["click", "watch"]
        for task, values in predictions(model, as_examples(USER, CANDIDATES)).items():
            np.testing.assert_allclose(scored.predictions[task].to_numpy(), values, rtol=1e-5, atol=1e-6)


def test_only_so_many_models_stay_in_memory(students):
    for name in ("a.none.1", "b.none.1", "c.x.1", "c.x.1"):
        score(students, name)
    assert students.versions() == {"a.none.1": None, "b.none.1": "v1", "c.x.1": "v1"}
    assert students.ready
    score(students, "a.none.1")
    assert students.versions() == {"a.none.1": "v1", "b.none.1": None, "c.x.1": "v1"}


class Held:
    """A follower of a version that is there at once, or once the gate opens; closing it takes as long as it is told."""

    def __init__(self, gate: threading.Event | None = None, leave: threading.Event | None = None) -> None:
        self.leave, self.closed_by = leave, None
        if gate is not None:
            assert gate.wait(20)

    def current(self):
        return SimpleNamespace(version="v1")

    def close(self) -> None:
        if self.leave is not None:
            self.leave.wait(5)
        self.closed_by = threading.current_thread()


def test_who_asks_for_a_model_does_not_wait_for_the_one_that_leaves():
    leave, made = threading.Event(), []

    def follow(model):
        made.append(Held(leave=leave))
        return made[-1]

    shelf = Shelf(follow, 1)
    shelf.get("a").result(20)
    assert shelf.get("b").result(20) is made[1]
    assert made[0].closed_by is None, "it is still closing"
    leave.set()
    until(lambda: made[0].closed_by is not None)
    assert made[0].closed_by is not threading.current_thread()
    shelf.close()
    assert made[1].closed_by is not None


def test_a_model_that_takes_anothers_place_leaves_the_process_ready(tmp_path):
    gates = {model: threading.Event() for model in "abc"}
    students = Students(str(tmp_path), tuple(gates), CONFIG, follow=lambda model: Held(gates[model]))
    assert not students.ready
    gates["a"].set()
    until(lambda: students.versions()["a"] is not None)
    assert not students.ready, "two are kept in memory"
    gates["b"].set()
    until(lambda: students.ready)
    with pytest.raises(Problem) as late:
        score(students, "c", seconds=0.05)
    assert late.value.status == 504
    assert students.versions() == {"a": None, "b": "v1", "c": None}
    assert students.ready
    gates["c"].set()
    until(lambda: students.versions()["c"] is not None)
    assert students.ready
    students.close()


def test_only_the_given_models_are_looked_up(students, root):
    publish_model(root, "other.none.1", "v1", 9)
    for name in ("other.none.1", "a.none", "../a.none.1", "", "a.none.1/v1"):
        with pytest.raises(Problem) as unknown:
            score(students, name)
        assert unknown.value.status == 404
    with pytest.raises(SnapshotError, match="use letters"):
        Students(str(root), ("../a",), CONFIG)


def test_a_bad_request_is_the_callers(students):
    with pytest.raises(DataError, match="cut off"):
        score(students, "a.none.1", BODY[:-8])
    with pytest.raises(DataError, match="lacks column 'tags'"):
        score(students, "a.none.1", write_streams([USER, CANDIDATES.drop_columns(["tags"])]))
    assert students.queue.taken == 0


def test_a_model_without_a_version_is_not_there_yet(tmp_path):
    students = Students(str(tmp_path), ("new.none.1",), CONFIG)
    with pytest.raises(Problem, match="no version that can be served yet") as missing:
        score(students, "new.none.1")
    assert missing.value.status == 503
    assert not students.ready
    publish_model(tmp_path, "new.none.1", "v1", 1)
    until(lambda: students.ready)
    assert score(students, "new.none.1").version == "v1"
    students.close()


def test_a_model_that_loads_too_long_passes_the_deadline(tmp_path):
    gate = threading.Event()

    def slow(model):
        gate.wait()
        raise SnapshotError("gone")

    students = Students(str(tmp_path), ("m",), CONFIG, follow=slow)
    with pytest.raises(Problem) as late:
        score(students, "m", seconds=0.05)
    assert late.value.status == 504
    gate.set()
    until(lambda: students._shelf.get("m").done())
    with pytest.raises(Problem) as failed:
        score(students, "m")
    assert failed.value.status == 503


def test_swaps_fail_no_request_and_mix_no_versions(tmp_path):
    """Threads ask all the time while versions are published; each reply is wholly the version's that it names."""
    name, versions = "s.none.1", 6
    expected = {}
    for number in range(versions):
        model = publish_model(tmp_path / "all", name, f"v{number}", number)
        expected[f"v{number}"] = predictions(model, as_examples(USER, CANDIDATES))["click"]
    publish_model(tmp_path, name, "v0", 0)
    students = Students(str(tmp_path), (name,), CONFIG)
    score(students, name)
    replies, errors, stop = [], [], threading.Event()

    def ask():
        while not stop.is_set():
            try:
                replies.append(score(students, name))
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(1, versions):
        publish_model(tmp_path, name, f"v{number}", number)
        until(lambda number=number: students.versions()[name] == f"v{number}")
        seen = len(replies)
        until(lambda seen=seen: len(replies) > seen + 3)
    stop.set()
    for thread in threads:
        thread.join()
    students.close()
    assert not errors
    assert {reply.version for reply in replies} == set(expected)
    for reply in replies:
        found = reply.predictions["click"].to_numpy()
        np.testing.assert_allclose(found, expected[reply.version], rtol=1e-5, atol=1e-6)
    spread = min(np.abs(expected[a] - expected[b]).max() for a in expected for b in expected if a < b)
    assert spread > 0.01, "the versions must differ to tell them apart"


def test_a_version_that_cannot_be_used_is_kept_out(tmp_path, caplog):
    publish_model(tmp_path, "m", "v1", 1)
    follower = NewestFollower(SnapshotStore(tmp_path), "m", poll_s=60)
    publish_model(tmp_path, "m", "v2", 2)
    (file,) = (tmp_path / "snapshots" / "m" / "v2").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert not follower.refresh()
    assert follower.current().version == "v1"
    assert "m@v2 is kept out" in caplog.text
    caplog.clear()
    assert not follower.refresh(), "it is not read again and again"
    assert not caplog.text
    publish_model(tmp_path, "m", "v3", 3)
    assert follower.refresh()
    assert follower.current().version == "v3"
    assert not follower.refresh()
    follower.close()


def test_a_model_that_predicts_no_number_is_kept_out(tmp_path):
    publish_model(tmp_path, "m", "v1", 1)
    loaded = load_version(SnapshotStore(tmp_path), "m", "v1")
    warm(loaded)
    for value in loaded.model.state_dict().values():
        value.fill_(float("nan"))
    with pytest.raises(SnapshotError, match="prediction of 'click' is not finite"):
        warm(loaded)
    assert loaded.encoder.schema == SCHEMA
