"""Labelling whole lanes: Ray Data reads, the teacher service scores through its handle, the label store commits.

No row passes the driver: tasks write their lanes' data files and hand back small records, which one commit makes
visible together.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayfm.config import LabelError
from rayfm.config.nodes import NodeLabels
from rayfm.data.reader import quiet_ray_data
from rayfm.data.steps import Lookup, RepresentationLookup
from rayfm.data.store import ExampleStore
from rayfm.labels.columns import check_leak
from rayfm.labels.history import HistoryLookup, HistorySpec
from rayfm.labels.kept_pins import KeptPins
from rayfm.labels.lane_file import LaneRecord
from rayfm.labels.lookup import LabelLookup
from rayfm.labels.pins import Pin
from rayfm.labels.storage import Storage
from rayfm.labels.store import LabelStore
from rayfm.models.base import MODELS
from rayfm.models.histories import HistoryFeature
from rayfm.schema import EXAMPLE_ID, TRAFFIC, WEIGHTS_SUFFIX, Kind, Schema
from rayfm.serving.lane_task import LaneTask, raise_refused
from rayfm.serving.nearline.supervision import FilledLookup
from rayfm.serving.teacher import TeacherHere
from rayfm.snapshots.load import SnapshotStore
from rayfm.snapshots.metadata.base import MetadataStore
from rayfm.training.spec import PinnedLabels


def teacher_columns(schema: Schema, features: Sequence[str] | None) -> list[str]:
    """Columns of the example store that a teacher with these features reads."""
    wanted = [feature for feature in schema.features if features is None or feature.name in features]
    weights = [feature.name + WEIGHTS_SUFFIX for feature in wanted if feature.kind == "weighted"]
    return list(dict.fromkeys([EXAMPLE_ID, TRAFFIC, *(feature.name for feature in wanted), *weights]))


def label_period(
    labels: LabelStore,
    snapshots: SnapshotStore,
    store: ExampleStore,
    teacher: str,
    model: str,
    version: str,
    period: str,
    tasks: tuple[str, ...],
    handle: Any,
    considerations: bool = True,
    rows_per_request: int = 8192,
    cpus_per_task: float = 0.25,
    store_representation: bool = False,
    nodes: NodeLabels | None = None,
) -> dict[str, Any]:
    """Label one period with one snapshot, exactly once: a job that runs again finds its commit and changes nothing.

    Args:
        labels, snapshots, store: the stores.
        teacher: name of the teacher in the label store.
        model, version: its snapshot.
        period: a complete period, after the last one that the snapshot was trained on.
        tasks: what to label.
        handle: the teacher service's handle, or a `TeacherHere`, which scores in this process and needs no Ray.
        considerations: whether considerations are labelled too.
        rows_per_request: rows of one call to the service.
        cpus_per_task: CPUs of a reading task.
        nodes: labels of the nodes that reading tasks run on.
        store_representation: store the teacher's representation beside its predictions.

    Returns:
        The period's ticket: teacher, version, trained_through, rows, labelled, coverage by kind, table_version,
        seconds.

    Raises:
        LabelError: the snapshot saw the period (a leak), or the label store refuses.
        SnapshotError: the service cannot use the snapshot.
        DataError: a lane cannot be read.
    """
    import ray.data

    started = time.perf_counter()
    manifest = store.manifest(period)
    snapshot = snapshots.manifest(model, version)
    schema = Schema.model_validate(snapshot.example_schema)
    config = MODELS[snapshot.config["type"]].Config.model_validate(snapshot.config)
    check_leak(teacher, version, snapshot.trained_through, period)
    kinds: tuple[Kind, ...] = ("impression", "consideration") if considerations else ("impression",)
    lanes = [(kind, lane) for kind in kinds for lane in range(manifest.lanes) if manifest.lane_rows(kind, lane)]
    columns = teacher_columns(schema, config.features)
    task = LaneTask(
        store=store,
        storage=labels.storage,
        handle=handle,
        teacher=teacher,
        version=version,
        trained_through=snapshot.trained_through,
        period=period,
        columns=tuple(columns),
        tasks=tuple(schema.task(task) for task in tasks),
        rows_per_request=rows_per_request,
        store_representation=store_representation,
    )

    # What an earlier try of the job committed is not scored again.
    done = labels.labelled_lanes(teacher, version, period)
    lanes = [lane for lane in lanes if lane not in done]
    # A task is worth its start-up only for a fair number of rows; two tasks keep reading and scoring overlapped.
    tasks_wanted = max(2, min(8, sum(manifest.rows(kind) for kind in kinds) // 200_000))
    share = max(1, -(-len(lanes) // tasks_wanted))
    work = [lanes[start : start + share] for start in range(0, len(lanes), share)]
    records: list[LaneRecord] = []
    if work and isinstance(handle, TeacherHere):
        texts = [record for part in work for record in task.write(part)]
        records = [LaneRecord.model_validate_json(text) for text in texts]
    elif work:
        with quiet_ray_data(nodes=nodes):
            # from_items, not from_arrow: that one runs a task of a whole CPU, which a small machine never has free.
            dataset = ray.data.from_items(
                [{"kinds": [kind for kind, _ in part], "lanes": [lane for _, lane in part]} for part in work],
                override_num_blocks=len(work),
            ).map_batches(task.__call__, batch_size=None, batch_format="pyarrow", num_cpus=cpus_per_task)
            found = dataset.take_all()
        for row in found:
            raise_refused(row)
        records = [LaneRecord.model_validate_json(row["record"]) for row in found]
    committed = labels.commit(records)
    rows = {kind: manifest.rows(kind) for kind in kinds if manifest.rows(kind)}
    coverage = labels.coverage(teacher, version, period, rows)
    return {
        "teacher": teacher,
        "version": version,
        "trained_through": snapshot.trained_through,
        "period": period,
        "rows": sum(rows.values()),
        "labelled": round(sum(coverage[kind] * rows[kind] for kind in rows)),
        "coverage": coverage,
        "table_version": committed.table_version,
        "seconds": time.perf_counter() - started,
    }


def history_spec(history: HistoryFeature) -> HistorySpec:
    """What the label store is told of a model's history, whose width is known."""
    assert history.width is not None
    return HistorySpec(history.teacher, history.key, history.decay, history.positives_of, history.width)


class StoredLabels:
    """Makes look-ups for training workers, each at a pinned table version. Pins are extended until `release`.

    Travels to workers without the pins that it holds.

    Args:
        root: the label store's root, as `LabelStore`'s.
        metadata: where pins live.
        owner: who holds the pins.
        near_line: folder that holds ``nearline/``, the run's.
    """

    def __init__(
        self,
        root: str | Storage,
        metadata: MetadataStore | None = None,
        owner: str = "trainer",
        near_line: str | Path | None = None,
    ) -> None:
        self.storage, self.near_line = Storage.of(root), near_line
        self._pins = KeptPins(self.storage, metadata, owner)

    def lookup(self, teacher: str, labels: PinnedLabels, tasks: tuple[str, ...]) -> Lookup:
        """Supervision columns ``<teacher>/<task>`` from one version's labels.

        Raises:
            LabelError: the version has no labels, or a pinned table version is gone.
        """
        bulk = LabelLookup(self._pin(teacher, labels), teacher, labels.version, tasks)
        if labels.near_line is None:
            return bulk
        if self.near_line is None:
            raise LabelError(f"labels of {teacher}@{labels.version} are filled from near-line ones; name their folder")
        return FilledLookup(bulk, self.near_line, teacher, labels.version, tasks, labels.near_line)

    def representation(self, teacher: str, labels: PinnedLabels, width: int) -> RepresentationLookup:
        """The representations that the same version stored beside its labels.

        Raises:
            LabelError: as `lookup`; while reading, if none are stored or their width is another.
        """
        return LabelLookup(self._pin(teacher, labels), teacher, labels.version, (), width)

    def history(self, history: HistoryFeature, store: ExampleStore, period: str) -> RepresentationLookup:
        """What the teacher thought of the entities' past, as of just before ``period``.

        Raises:
            LabelError: there is no such state, or it was made by another config.
        """
        return HistoryLookup(self.storage, history_spec(history), store, period)

    def release(self) -> None:
        """Let go of the pins of all look-ups made so far, once nobody reads from them any more."""
        self._pins.release()

    def _pin(self, teacher: str, labels: PinnedLabels) -> Pin:
        return self._pins.pin(teacher, labels.version, labels.table_version)
