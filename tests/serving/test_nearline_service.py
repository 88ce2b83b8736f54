"""Near-line labelling as it runs: Ray Serve, Celery, a real Redis, HTTP; and what is killed meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
import urllib.request

import numpy as np
import pytest
import servers
from nearline_cases import MODEL, TASKS, TEACHER, V1, as_arrow, config, publish_teacher, rows

from rayfm.serving.application import start_teacher, stop_teacher
from rayfm.serving.nearline.application import start_consumers, start_intake, stop_nearline
from rayfm.serving.nearline.labels import NearLineLabels
from rayfm.serving.nearline.spool import Spool
from rayfm.serving.replicas import Replicas
from rayfm.serving.teacher import TeacherServiceConfig, load_version, score_table
from rayfm.snapshots import SnapshotStore

HEADERS = {"content-type": "application/vnd.apache.arrow.stream"}


class Client:
    """Posts and asks, over HTTP."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.posted: dict[str, list[int]] = {}
        """Ticket -> example ids."""

    def post(self, table) -> str:
        request = urllib.request.Request(f"{self.url}/v1/teachers/{TEACHER}/label", as_arrow(table), HEADERS)
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert answer.status == 202
            accepted = json.loads(answer.read())
        assert (accepted["rows"], accepted["rejected"]) == (table.num_rows, 0)
        self.posted[accepted["ticket"]] = table["example_id"].to_pylist()
        return str(accepted["ticket"])

    def state(self, ticket: str) -> str:
        with urllib.request.urlopen(f"{self.url}/v1/labels/{ticket}", timeout=30) as answer:
            return str(json.loads(answer.read())["state"])

    def wait(self, seconds: float = 90.0) -> None:
        """Until every posted ticket is committed."""
        deadline = time.monotonic() + seconds
        for ticket in self.posted:
            while (state := self.state(ticket)) != "committed":
                assert time.monotonic() < deadline, f"{ticket} is still {state}"
                time.sleep(0.1)


def pid_of(handle) -> int:
    """The process of the one consumer; waits for it where it is being replaced."""
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(Exception):
            return int(handle.pid.remote().result(timeout_s=5))
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.ray
def test_every_accepted_row_is_labelled_once_whatever_is_killed(fresh_ray, redis_server, tmp_path):
    publish_teacher(tmp_path, V1)
    settings = config(
        tmp_path,
        run="nearline",
        redis=f"redis://{redis_server.address}/0",
        consumer={"sweep_s": 2.0, "health_s": 0.5, "cpus": 0.1, "stall_s": 61, "tickets": 8},
    )
    client = Client(start_intake([settings], servers.free_port(), cpus=0.1))
    try:
        service = TeacherServiceConfig(root=str(tmp_path), model=MODEL)
        start_teacher("nearline", TEACHER, service, Replicas(cpus=0.1))
        consumer = start_consumers(settings)
        client.post(rows(30))
        client.wait()

        # The consumer, in the middle of its work.
        first = pid_of(consumer)
        for number in range(10):
            client.post(rows(20, 1000 + 100 * number, day=number % 2))
        os.kill(first, signal.SIGKILL)
        for number in range(5):
            client.post(rows(20, 3000 + 100 * number))
        # Redis, and rows are accepted without it.
        redis_server.kill()
        for number in range(5):
            client.post(rows(20, 4000 + 100 * number))
        redis_server.start()
        client.post(rows(20, 5000))
        client.wait()
        second = pid_of(consumer)
        assert second != first

        # The consumer's thread, which Ray alone does not notice: Celery's own shutdown ends it.
        from rayfm.serving.nearline.doorbell import Doorbell

        doorbell = Doorbell(settings)
        doorbell._adapter._app.control.broadcast("shutdown")
        deadline = time.monotonic() + 60
        while pid_of(consumer) == second:
            assert time.monotonic() < deadline, "the dead consumer was not noticed"
            time.sleep(0.2)
        client.post(rows(20, 6000))
        client.wait()
        assert doorbell.waiting() == 0
        doorbell.close()
    finally:
        redis_server.start()
        stop_nearline(settings)
        stop_teacher("nearline", TEACHER)

    spool = Spool(tmp_path, TEACHER)
    assert list(spool.waiting()) == []
    assert spool.dead_letters() == []
    stored = NearLineLabels(tmp_path).rows(TEACHER)
    found = list(zip(stored["ticket"].to_pylist(), stored["example_id"].to_pylist(), strict=True))
    assert sorted(found) == sorted((ticket, row) for ticket, ids in client.posted.items() for row in ids)
    assert set(stored["version"].to_pylist()) == {V1}
    # And what stands there is what the model says of each row.
    loaded = load_version(SnapshotStore(tmp_path), MODEL, V1)
    ids = stored["example_id"].to_numpy()
    for task in TASKS:
        expected = {}
        for posted in client.posted.values():
            scores = score_table(loaded, rows(len(posted), posted[0]))[task].to_pylist()
            expected |= dict(zip(posted, scores, strict=True))
        np.testing.assert_allclose(
            stored[f"task_{task}"].to_numpy(), [expected[int(row)] for row in ids], rtol=1e-5, atol=1e-6
        )
