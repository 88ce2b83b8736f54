"""One period prepared, trained on, predicted or labelled in a process of its own: its CPU-seconds and its peak memory.

`benchmarks.cost` and `benchmarks.memory` start one for each point of their plots, so that no point inherits another's
memory, compiled kernels or caches.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
TEACHER = "teacher"
SAMPLED_S = 0.05
"""Between two looks at the anonymous memory."""


@dataclasses.dataclass(frozen=True)
class Labels:
    """One teacher version's labels in a label store."""

    root: str
    version: str
    table_version: int


@dataclasses.dataclass(frozen=True)
class Task:
    """What a process does."""

    store: str
    period: str
    model: str = "dlrm"
    precision: str = "fp32"
    reader: str = "arrow"
    sparse: int = 26
    students: int = 1
    """Learners of the one group, which share a reader; each has its own seed."""
    what: Literal["train", "predict", "label", "prepare"] = "train"
    """Train on the period; or predict it and compute its metrics; or label it with the newest snapshot; or write it
    anew as `prepare` does."""
    labels: Labels | None = None
    """Labels to learn from, by an auxiliary head."""
    snapshots: str | None = None
    """Folder to publish a snapshot into, or to label from."""
    label_store: str | None = None
    """Where to label."""
    checkpoint_every: int | None = None


@dataclasses.dataclass(frozen=True)
class Result:
    """What it took."""

    rows: int
    cpu: float
    """CPU-seconds of all threads: of training or predicting the period, start-up left out."""
    whole: float
    """The same of the whole process, imports and all."""
    peak: int
    """Peak resident bytes of the process."""
    anonymous: int
    """Peak of what is resident and no file's page, which the system cannot take back."""
    after: int
    """Anonymous bytes once the period is done."""
    parts: dict[str, float]
    """Wall seconds by the loop's own parts."""
    labels: Labels | None = None
    """Where they are, of a process that labelled."""


def run(task: Task, under: str = "") -> Result:
    """Do it in a fresh process with one thread.

    Args:
        task: what to do.
        under: a command that runs the process, such as ``taskset -c 0``.

    Raises:
        RuntimeError: it failed, with what it said last.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [*shlex.split(under), sys.executable, "-m", "benchmarks.period", json.dumps(dataclasses.asdict(task))]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(f"{task}: {said[-1] if said else done.returncode}")
    found = json.loads(done.stdout.splitlines()[-1])
    return Result(**found | {"labels": found["labels"] and Labels(**found["labels"])})


def status_bytes(name: str, text: str | None = None) -> int:
    """A figure of ``/proc/self/status`` in bytes: ``VmHWM`` is the peak of what was resident.

    Not ``ru_maxrss``, which a process inherits from the one that started it.
    """
    for line in (text or Path("/proc/self/status").read_text()).splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(name)


class Anonymous:
    """Peak anonymous memory of this process, sampled by a thread: the kernel keeps no peak of it."""

    def __init__(self) -> None:
        self.peak, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLED_S):
            self.peak = max(self.peak, status_bytes("RssAnon"))

    def done(self) -> int:
        self._stop.set()
        self._thread.join()
        return max(self.peak, status_bytes("RssAnon"))


def train(task: Task, folder: Path) -> Result:
    """Train on the period, or predict it, here."""
    import torch

    from benchmarks.data import BATCH, model_config, schema
    from benchmarks.training import Free
    from rayfm.distill.base import OBJECTIVES
    from rayfm.serving.labelling import StoredLabels
    from rayfm.training.config import TrainingConfig
    from rayfm.training.learner import LearnerConfig
    from rayfm.training.loop import TrainingLoop
    from rayfm.training.spec import PinnedLabels, TrainerSpec
    from rayfm.training.trainer import single_process_group

    torch.set_num_threads(1)
    labels = task.labels
    objectives: tuple[Any, ...] = ()
    if labels is not None:
        objectives = (
            OBJECTIVES["auxiliary_head"].Config.model_validate({"type": "auxiliary_head", "teacher": TEACHER}),
        )
    spec = TrainerSpec(
        name="bench",
        role="teacher" if labels is None else "students",
        learners=tuple(
            LearnerConfig(
                model_name=task.model,
                variant="none" if labels is None else "taught",
                seed=seed,
                model=model_config(task.model),
                tasks=("click",),
                objectives=objectives,
            )
            for seed in range(1, 1 + task.students)
        ),
        training=TrainingConfig.model_validate(
            {
                "batch_size": BATCH,
                "precision": task.precision,
                "reader": task.reader,
                "checkpoint_every": task.checkpoint_every,
                "checkpoint_seconds": None,
            }
        ),
        schema_=schema(task.sparse),
        periods=(task.period,),
        trained=0 if task.what == "predict" else None,
        first_predicted=0 if task.what == "predict" else 1,
        publish=task.snapshots is not None,
        export_tolerance=None,
        store=task.store,
        run_dir=task.snapshots or str(folder),
        teachers=() if labels is None else (TEACHER,),
    )

    class Labelled(Free):
        def wait_labels(self, period: str) -> dict[str, PinnedLabels]:
            if labels is None:
                return {}
            return {TEACHER: PinnedLabels(version=labels.version, table_version=labels.table_version)}

    with single_process_group():
        memory = Anonymous()
        loop = TrainingLoop(spec, Labelled(), StoredLabels(labels.root) if labels else None)
        before = time.process_time()
        loop.run()
        cpu = time.process_time() - before
        anonymous = memory.done()
    record = json.loads((spec.folder / "periods" / f"{task.period}.json").read_text())
    return Result(
        rows=loop.store.manifest(task.period).rows("impression"),
        cpu=cpu if task.what == "predict" else record["cpu_seconds"],
        whole=time.process_time(),
        peak=status_bytes("VmHWM"),
        anonymous=anonymous,
        after=status_bytes("RssAnon"),
        parts=record["parts"],
    )


def label(task: Task) -> Result:
    """Label the period here, without a service."""
    import ray.data  # noqa: F401  (what labels imports it; that is not counted)
    import torch

    from rayfm.data.store import ExampleStore
    from rayfm.labels.store import LabelStore
    from rayfm.serving.labelling import label_period
    from rayfm.serving.teacher import TeacherHere
    from rayfm.snapshots.load import SnapshotStore

    torch.set_num_threads(1)
    assert task.snapshots is not None
    assert task.label_store is not None
    snapshots, key = SnapshotStore(task.snapshots), f"{task.model}.none.1"
    version = max(snapshots.versions(key))
    memory, before = Anonymous(), time.process_time()
    ticket = label_period(
        LabelStore(task.label_store),
        snapshots,
        ExampleStore(task.store),
        TEACHER,
        key,
        version,
        task.period,
        ("click",),
        TeacherHere(task.snapshots, key),
        considerations=False,
    )
    cpu = time.process_time() - before
    return Result(
        rows=ticket["labelled"],
        cpu=cpu,
        whole=time.process_time(),
        anonymous=memory.done(),
        peak=status_bytes("VmHWM"),
        after=status_bytes("RssAnon"),
        parts={},
        labels=Labels(task.label_store, version, ticket["table_version"]),
    )


def prepare(task: Task, folder: Path) -> Result:
    """Write the period's rows anew here, from blocks out of time order: what `prepare`'s tasks do, without Ray."""
    import datetime

    import pyarrow as pa

    from benchmarks.data import LANES, schema
    from rayfm.data.prepare import write_period
    from rayfm.data.sources.base import KIND_COLUMN, Period
    from rayfm.data.staging import stage_rows
    from rayfm.data.store import ExampleStore

    store, examples = ExampleStore(task.store), schema(task.sparse)
    manifest = store.manifest(task.period)
    start, end = (datetime.datetime.fromisoformat(text) for text in (manifest.start, manifest.end))
    period = Period(name=task.period, start=start, end=end)
    memory, before = Anonymous(), time.process_time()
    fragments = []
    for lane in range(manifest.lanes):
        file = store.open_lane(task.period, "impression", lane)
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group, use_threads=False)
            rows = rows.append_column(KIND_COLUMN, pa.repeat("impression", rows.num_rows))
            fragments += stage_rows(rows, examples, [period], frozenset([task.period]), folder / "staging")
    written = write_period(period, fragments, examples, ExampleStore(folder / "store"), LANES, "benchmark")
    cpu = time.process_time() - before
    return Result(
        rows=written.rows("impression"),
        cpu=cpu,
        whole=time.process_time(),
        anonymous=memory.done(),
        peak=status_bytes("VmHWM"),
        after=status_bytes("RssAnon"),
        parts={},
    )


def main() -> None:
    given = json.loads(sys.argv[1])
    task = Task(**given | {"labels": given["labels"] and Labels(**given["labels"])})
    with tempfile.TemporaryDirectory() as folder:
        result = (
            label(task) if task.what == "label" else (prepare if task.what == "prepare" else train)(task, Path(folder))
        )
    print(json.dumps(dataclasses.asdict(result)))


if __name__ == "__main__":
    main()
