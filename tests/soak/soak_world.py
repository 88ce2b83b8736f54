"""The service under soak: ZooKeeper, Redis, the endpoints with two replicas, a teacher with two, a near-line consumer,
an updater and label jobs in processes of their own; and the publisher of new versions."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import ray
import servers
import torch
from example_store import write_store
from ray import serve
from served_models import publish_model
from soak_load import Predictor, predictor
from soak_processes import TEACHER, TEACHER_MODEL

from rayfm.export.config import CompileConfig
from rayfm.serving.endpoints import EndpointsPlan, TeacherPlan, endpoints_name, start_endpoints, stop_endpoints
from rayfm.serving.http.config import EndpointsConfig
from rayfm.serving.nearline.config import NearLineOptions
from rayfm.snapshots import SnapshotStore, StoreUnavailable, open_metadata
from rayfm.snapshots.collect import Collector

STUDENT = "vm.none.1"
PERIODS = ("2024-01-01", "2024-01-02", "2024-01-03")
LABELLED = PERIODS[1:]
HERE = Path(__file__).resolve().parent
JOB_TRIES = 5
"""Errors of a label job in a row that end the soak."""
REPLICAS = {"teacher": 2, "endpoints": 2, "consumer": 1}


class Child:
    """A process of its own that can be killed and started again.

    Args:
        arguments: of ``soak_processes.py``.
        log: where its output goes.
    """

    def __init__(self, arguments: list[str], log: Path) -> None:
        self._arguments, self._log = arguments, log
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Child:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "soak_processes.py"), *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "RAY_AUTH_MODE": "token"},
            )
        return self

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def said(self) -> str:
        """The end of its output."""
        return self._log.read_text()[-3000:] if self._log.exists() else ""


class World:
    """Everything under soak; Ray runs already.

    Args:
        folder: for data, snapshots, labels and logs.
        seed: of the models.
        impressions, considerations: rows of each period that label jobs label.
    """

    def __init__(self, folder: Path, seed: int, impressions: int, considerations: int) -> None:
        self.folder, self._draw = folder, random.Random(seed)
        self.root = folder / "run"
        self.students: dict[str, Predictor] = {}
        self.teachers: dict[str, Predictor] = {}
        self.models: dict[str, torch.nn.Module] = {}
        """The teacher's versions."""
        self.corrupt: set[str] = set()
        self.newest = ""
        """The newest intact version."""
        self._published = 0
        self.zookeeper = servers.zookeeper(folder / "zookeeper").start()
        self.redis = servers.redis(folder / "redis").start()
        self.metadata = f"zookeeper://{self.zookeeper.address}/soak"
        self.store = write_store(folder / "data", list(PERIODS), impressions, considerations)
        self.publish()
        self.run = f"soak{os.getpid()}"
        self.plan = EndpointsPlan(
            run=self.run,
            root=str(self.root),
            students=(STUDENT,),
            teachers=(TeacherPlan(name=TEACHER, model=TEACHER_MODEL, replicas=REPLICAS["teacher"], cpus=0.2),),
            endpoints=EndpointsConfig(
                http_port=servers.free_port(),
                replicas=REPLICAS["endpoints"],
                cpus=0.2,
                poll_s=0.3,
                metadata=self.metadata,
                compile=CompileConfig(compile="torchscript"),
                near_line=NearLineOptions.model_validate(
                    {
                        "redis": f"redis://{self.redis.address}/0",
                        "consumer": {"sweep_s": 2.0, "health_s": 0.5, "cpus": 0.1, "tickets": 8},
                    }
                ),
            ),
        )
        start_endpoints(self.plan, None)
        self.url = f"http://127.0.0.1:{self.plan.endpoints.http_port}"
        self.heartbeat = folder / "updater.alive"
        updater = ["updater", str(self.root), self.metadata, str(self.heartbeat), STUDENT, TEACHER_MODEL]
        self.updater = Child(updater, folder / "updater.log").start()
        self.jobs: list[tuple[str, str, str]] = []
        """Label jobs that ended: (version, period, what they said)."""
        self.labels: Child | None = None
        self._job: tuple[str, str] | None = None
        self._ended = 0.0
        self._failed_in_a_row = 0
        self.failures: list[str] = []
        """What label jobs said that ended by themselves with an error."""
        self.restarts = 0
        """Of label jobs, after they were killed."""

    # -- the publisher ------------------------------------------------------------------------------------------

    def publish(self, corrupt: bool = False) -> str:
        """A new version of the student and of the teacher; ``corrupt``: with one wrong byte, never to be served."""
        self._published += 1
        version = f"v{self._published:05d}"
        staging = self.folder / "staging"
        models = {
            model: publish_model(staging if corrupt else self.root, model, version, self._draw.randrange(10**6))
            for model in (STUDENT, TEACHER_MODEL)
        }
        if corrupt:
            self.corrupt.add(version)
            for model in models:
                source, target = (base / "snapshots" / model / version for base in (staging, self.root))
                file = sorted(source.glob("*.safetensors"))[0]
                data = bytearray(file.read_bytes())
                data[-1] ^= 1
                file.write_bytes(data)
                shutil.move(source, target)
        else:
            self.students[version] = predictor(models[STUDENT])
            self.teachers[version] = predictor(models[TEACHER_MODEL])
            self.models[version] = models[TEACHER_MODEL]
            self.newest = version
        return version

    def sweep(self) -> int:
        """Delete the files of expired versions, as the publisher does; how many."""
        collector = Collector(SnapshotStore(self.root), open_metadata(self.metadata))
        try:
            return sum(len(collector.sweep(model)) for model in (STUDENT, TEACHER_MODEL))
        except StoreUnavailable:
            return 0

    # -- label jobs ---------------------------------------------------------------------------------------------

    def next_job(self, pause_s: float = 0.0) -> None:
        """Start the next label job where none is under way, ``pause_s`` after the one before it ended; one that was
        killed goes on at once, with its version."""
        if self.labels is not None and self.labels.running():
            return
        self._note_end()
        if self._job is None:
            if time.monotonic() < self._ended + pause_s:
                return
            self._job = (self.newest, LABELLED[len(self.jobs) % len(LABELLED)])
        address = ray.get_runtime_context().gcs_address
        arguments = ["labels", address, f"{self.run}-serve", str(self.folder), self.metadata, *self._job]
        self.labels = Child(arguments, self.folder / "labels.log").start()

    def finish_jobs(self, seconds: float) -> None:
        """Wait until the job that is under way has ended."""
        deadline = time.monotonic() + seconds
        while self._job is not None:
            assert time.monotonic() < deadline, f"the label job of {self._job} does not end"
            time.sleep(0.2)
            if self.labels is None or not self.labels.running():
                self._note_end()
                if self._job is not None:
                    self.next_job()

    def _note_end(self) -> None:
        if self.labels is None or self._job is None:
            return
        assert self.labels.process is not None
        code = self.labels.process.returncode
        if code == 0:
            self.jobs.append((*self._job, self.labels.said()))
            self._job, self._ended = None, time.monotonic()
            self._failed_in_a_row = 0
        elif code > 0:  # it gave up, as on a metadata store that is away for long: it is started again, as by hand
            said = self.labels.said().strip().replace(str(self.folder), "FOLDER")
            self.failures.append(said.splitlines()[-1][:200] if said else f"exit code {code}")
            self._failed_in_a_row += 1
            if "is not published" in said or "is being deleted" in said:
                self._job = None  # away for longer than its lease: another version labels
            assert self._failed_in_a_row < JOB_TRIES, f"the label job of {self._job} fails each time:\n{said}"
        else:
            self.restarts += 1
        self.labels = None

    # -- what can be killed -------------------------------------------------------------------------------------

    def pids(self, kind: str) -> list[int]:
        """Processes of the replicas of one kind, by the titles that Ray gives them."""
        application = {
            "teacher": f"rayfm-{self.run}-serve-{TEACHER}:",
            "endpoints": f"{endpoints_name(self.run)}:",
            "consumer": f"rayfm-{self.run}-serve-{TEACHER}-nearline:",
        }[kind]
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                title = " ".join(process.cmdline())
                if title.startswith(f"ray::ServeReplica:{application}"):
                    found.append(process.pid)
        return sorted(found)

    def running(self, kind: str) -> bool:
        """Whether all processes of a kind are there and answer."""
        if kind in ("zookeeper", "redis"):
            server: servers.Server = getattr(self, kind)
            return server.running() and server.answers()
        if kind == "updater":
            return self.updater.running() and self.updated_by() == self.updater.process.pid  # type: ignore[union-attr]
        if kind == "labels":
            return self.labels is not None and self.labels.running()
        return len(self.pids(kind)) == REPLICAS[kind] and self._served(kind) == REPLICAS[kind]

    def updated_by(self) -> int:
        """The process that last updated."""
        text = self.heartbeat.read_text() if self.heartbeat.exists() else ""
        return int(text) if text else 0

    def _served(self, kind: str) -> int:
        name = {
            "teacher": f"rayfm-{self.run}-serve-{TEACHER}",
            "endpoints": endpoints_name(self.run),
            "consumer": f"rayfm-{self.run}-serve-{TEACHER}-nearline",
        }[kind]
        application = serve.status().applications.get(name)
        if application is None:
            return 0
        states: list[dict[Any, int]] = [found.replica_states for found in application.deployments.values()]
        return sum(count for found in states for state, count in found.items() if str(state).endswith("RUNNING"))

    def stop(self) -> None:
        """End everything that was started here."""
        for child in (self.updater, self.labels):
            if child is not None:
                child.kill()
        try:
            stop_endpoints(self.plan)
        finally:
            self.redis.stop()
            self.zookeeper.stop()


class Background(threading.Thread):
    """Does something again and again until it is stopped."""

    def __init__(self, work: Any, every_s: float) -> None:
        super().__init__(daemon=True)
        self._work, self._every_s = work, every_s
        self._stop_it = threading.Event()
        self.crash: BaseException | None = None

    def run(self) -> None:
        try:
            while not self._stop_it.wait(self._every_s):
                self._work()
        except BaseException as error:
            self.crash = error

    def stop(self) -> None:
        """Tell it to stop."""
        self._stop_it.set()

    def end(self) -> None:
        """Stop; what went wrong in the thread is raised here."""
        self.stop()
        self.join(60)
        if self.crash is not None:
            raise self.crash


def until(condition: Any, what: str, seconds: float = 120.0) -> float:
    """Wait for a condition; the seconds it took.

    Raises:
        AssertionError: it did not come.
    """
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds, f"{what}: not within {seconds:g} s"
        time.sleep(0.1)
    return time.monotonic() - begin
