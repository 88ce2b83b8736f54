"""Labelling through the service against a bare forward: ``python -m benchmarks.labelling STORE dlrm|dcnv2``.

Ours is a label job as the pipeline runs it: Ray Data tasks read the lanes, the Serve replica encodes and scores, the
label store commits; one replica with one thread. Theirs is the exported model's forward over batches in memory, in one
thread. The replica has loaded the snapshot before, as it has from a teacher's second request on.
"""

from __future__ import annotations

import sys
import tempfile
from itertools import count
from pathlib import Path

import ray
import torch

from benchmarks.data import LONG, SHORT, model_config, schema
from benchmarks.measure import Outcome, Spent, in_turns, rates, report, timed
from benchmarks.training import batches_in_memory
from rayfm.data.store import ExampleStore
from rayfm.labels.store import LabelStore
from rayfm.models.build import build_model
from rayfm.serving.application import start_teacher, stop_teacher
from rayfm.serving.labelling import label_period
from rayfm.serving.teacher import TeacherServiceConfig, load_version
from rayfm.snapshots.load import SnapshotStore
from rayfm.snapshots.publish import SnapshotWriter, TensorSlice

VERSION = "2024-12-31-bench"
PREDICT_ROWS = 4096


def publish(root: Path, name: str) -> None:
    """A snapshot of an untrained teacher; its weights do not matter for its speed."""
    model = build_model(model_config(name), schema(), ("click",), seed=1)
    writer = SnapshotWriter(root, name, VERSION)
    files = writer.write(0, [TensorSlice.whole(key, value) for key, value in model.state_dict().items()])
    writer.commit(
        [files],
        trained_through="2024-12-31",
        config=model_config(name).dump(),
        example_schema=schema().dump(),
        tasks=("click",),
    )


def compare(store: ExampleStore, name: str) -> Outcome:
    """Rows a second of both, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        return _compare(store, name, Path(folder))


def _compare(store: ExampleStore, name: str, folder: Path) -> Outcome:
    publish(folder, name)
    snapshots = SnapshotStore(folder)
    loaded = load_version(snapshots, name, VERSION)
    held = batches_in_memory(store, store.manifest(SHORT).rows("impression") // PREDICT_ROWS, PREDICT_ROWS)
    jobs = count()

    def theirs() -> float:
        with torch.inference_mode():
            return sum(len(loaded.model(batch)["click"]) for _ in range(3) for batch in held)

    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        service = TeacherServiceConfig(root=str(folder), model=name, predict_rows=PREDICT_ROWS)
        handle = start_teacher("bench", name, service)

        def label(period: str) -> Spent:
            # A label store of its own each time: the second commit of a label would be skipped.
            labels = LabelStore(folder / f"job{next(jobs)}")
            return timed(
                lambda: label_period(
                    labels, snapshots, store, name, name, VERSION, period, ("click",), handle, considerations=False
                )["rows"],
                children=True,
            )

        label(SHORT)
        pairs = in_turns(lambda: label(LONG), lambda: timed(theirs), repeats=2)
        stop_teacher("bench", name)
    finally:
        from ray import serve

        serve.shutdown()
        ray.shutdown()
    return rates(pairs, "rows")


if __name__ == "__main__":
    torch.set_num_threads(1)
    report(compare(ExampleStore(Path(sys.argv[1])), sys.argv[2]))
