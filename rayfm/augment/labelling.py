"""From a config to scored windows: which version of which teacher scores what the join wrote."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rayfm.augment.config import AugmentConfig
from rayfm.augment.shared import SharedDataset
from rayfm.augment.versions import Holds
from rayfm.augment.views import LabellingConfig, ScoringTeacherConfig, ViewConfig
from rayfm.augment.window import ScoringTeacher
from rayfm.config import ConfigError, SnapshotError, nearest
from rayfm.data.sources.base import Period
from rayfm.data.sources.parquet import LENGTHS
from rayfm.labels.columns import check_task
from rayfm.models.base import MODELS
from rayfm.schema import Schema
from rayfm.serving.teacher import TeacherHere
from rayfm.snapshots.load import SnapshotStore
from rayfm.snapshots.manifest import SnapshotManifest


def label_windows(
    config: AugmentConfig,
    handles: Callable[[str, ScoringTeacherConfig], Any] | None = None,
    watch: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Let each teacher score what the join wrote and it has not scored, once for all students that share it.

    Args:
        config: with ``labelling``.
        handles: the handle of a teacher's service, from its name and config; by default the teacher runs in this
            process.
        watch: called with each file's counts.

    Returns:
        The counts of each file that was scored, as `SharedDataset.label`.

    Raises:
        ConfigError: the config has no ``labelling``, or a view names what its teacher's examples lack.
        LabelError: every version of a teacher was trained on the period, or the one that is named was.
        SnapshotError: a teacher is not published, or every version that might score is being deleted; the metadata
            store cannot be opened, or does not answer.
        DataError: as `SharedDataset.label`.
    """
    labelling = config.labelling
    if labelling is None:
        raise ConfigError("the config has no 'labelling': name the snapshots, the teachers and the students")
    store, done = SnapshotStore(labelling.snapshots), []
    for name, teacher in labelling.teachers.items():
        students = {student: view for student, view in labelling.students.items() if view.teacher == name}
        if not students:
            continue
        handle = TeacherHere(labelling.snapshots, teacher.model) if handles is None else handles(name, teacher)
        shared = SharedDataset(config.root, name)
        with shared.lock(), Holds(store, labelling.metadata) as holds:
            for period, waiting in itertools.groupby(shared.waiting(), key=lambda place: place[0]):
                with holds.version(name, teacher, period) as manifest:
                    scoring = scoring_teacher(name, teacher, manifest, handle)
                    for student, view in students.items():
                        check_view(student, view, scoring.example_schema)
                    for _, file in waiting:
                        counts = shared.label(
                            _period(period, config.period), file, scoring, students, labelling.rows_per_request
                        )
                        done.append(counts)
                        if watch is not None:
                            watch(counts)
    return done


def scoring_teacher(name: str, config: ScoringTeacherConfig, manifest: SnapshotManifest, handle: Any) -> ScoringTeacher:
    """A version of a teacher as `rayfm.augment.window` wants it.

    Raises:
        LabelError: a task is not one of the teacher's.
    """
    tasks = manifest.tasks if config.tasks is None else config.tasks
    for task in tasks:
        check_task(task, manifest.tasks, f"{name}@{manifest.version}")
    model = MODELS[manifest.config["type"]].Config.model_validate(manifest.config)
    return ScoringTeacher(
        name=name,
        version=manifest.version,
        trained_through=manifest.trained_through,
        example_schema=Schema.model_validate(manifest.example_schema),
        features=model.features,
        tasks=tasks,
        handle=handle,
    )


def check_view(student: str, view: ViewConfig, schema: Schema) -> None:
    """Refuse a view of what the examples do not have.

    Raises:
        ConfigError: naming the feature, traffic or task.
    """
    features = [feature.name for feature in schema.features]
    tasks = [task.name for task in schema.tasks]
    for what, wanted, known in (
        ("features", view.features, features),
        ("traffics", view.traffics, list(schema.traffics)),
        ("tasks", view.tasks, tasks),
    ):
        for name in wanted or ():
            if name not in known:
                raise ConfigError(
                    f"labelling.students.{student}.{what}: the teacher's examples have no {name!r}"
                    f"{nearest(name, known)}"
                )


def student_view(config: AugmentConfig, student: str, period: str) -> Any:
    """One student's part of a period's shared data set (`SharedDataset.view`), as the config declares it.

    Several students of one period: read `SharedDataset.table` once and take the views of it.

    Raises:
        ConfigError: no such student.
        DataError: nothing of the period is scored.
    """
    labelling = config.labelling
    if labelling is None or student not in labelling.students:
        known = [] if labelling is None else list(labelling.students)
        raise ConfigError(f"no student {student!r} in the config's labelling{nearest(student, known)}")
    view = labelling.students[student]
    shared = SharedDataset(config.root, view.teacher)
    return shared.view(shared.table(period), student, view, _schema(labelling, view.teacher))


def _schema(labelling: LabellingConfig, teacher: str) -> Schema:
    config, store = labelling.teachers[teacher], SnapshotStore(Path(labelling.snapshots))
    version = config.version or store.latest(config.model)
    if version is None:
        raise SnapshotError(f"no version of {config.model!r} in {store.root}{nearest(config.model, store.models())}")
    return Schema.model_validate(store.manifest(config.model, version).example_schema)


def _period(name: str, length: str) -> Period:
    form = "%Y-%m-%d" if len(name) == len("2024-01-01") else "%Y-%m-%dT%H"
    start = datetime.datetime.strptime(name, form).replace(tzinfo=datetime.UTC)
    return Period(name=name, start=start, end=start + LENGTHS[length])
