"""`rayfm select`: semi-supervised feature selection (UKDSL section 4.2), on the warm-up periods, not on a test period.

The five steps: a teacher is trained on impressions (1) and labels considerations (2); a simplified student is trained
on impressions with their labels and considerations with these, on all candidate features (3); Algorithm 1 measures on
withheld impressions and considerations what each feature is worth to it (4); the two rankings are combined (5).

Steps 1 to 3 are a pipeline of their own, with the loops, services and stores of `rayfm run`::

    <runs>/<name>.select/select.yaml       what was asked for
                         training/         the run of the teacher and the simplified student
                         items/<digest>/   a file a work item of step 4
                         selection.json, selection.csv, selection.png, lists/<way>.yaml
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rayfm.config import ConfigError, DataError, nearest, validate
from rayfm.data.prepare import missing_periods
from rayfm.data.sources.base import SOURCES
from rayfm.models.base import MODELS, ModelConfig
from rayfm.models.embeddings import select_features
from rayfm.pipeline.config import PipelineConfig, TeacherConfig
from rayfm.pipeline.here import run_here
from rayfm.pipeline.plan import choose_periods
from rayfm.pipeline.session import ray_session
from rayfm.pipeline.stream import Pipeline
from rayfm.pipeline.take_up import take_up, write_down
from rayfm.pipeline.watch import Watch
from rayfm.schema import Kind
from rayfm.selection.config import SelectConfig
from rayfm.selection.job import score_here, score_on_ray, unscored
from rayfm.selection.result import (
    FILE,
    LISTS,
    Selection,
    feature_lists,
    measurement,
    read_selection,
    write_selection,
)
from rayfm.selection.scoring import Item, Measured, check_folder, gather, work_items
from rayfm.training.spec import PinnedLabels

STUDENT, VARIANT = "simplified", "mixed"
"""The simplified student's names in the run that trains it."""

KINDS: tuple[Kind, ...] = ("impression", "consideration")

Scored = Callable[[int, int], None]
"""Called with how many work items are scored, and how many there are."""


@dataclasses.dataclass(frozen=True)
class SelectResult:
    """What a selection leaves."""

    selection: Selection
    folder: Path
    seconds: float

    def list_file(self, way: str) -> Path:
        """The file of a way's features, for a config to include; there is none for a way without features."""
        return self.folder / LISTS / f"{way}.yaml"


def select(
    config: PipelineConfig,
    resume: bool = False,
    overwrite: bool = False,
    watch: Callable[[Watch], None] | None = None,
    scored: Scored | None = None,
    here: bool = False,
) -> SelectResult:
    """Select features as the config's ``select`` section says.

    Args:
        config: the pipeline's config.
        resume: go on with a selection that was stopped: trainers from their checkpoints, scoring with the work items
            that have no file.
        overwrite: forget an earlier selection of this name first.
        watch: told several times a second how far the training is.
        scored: told whenever a work item is scored.
        here: train and score in this process, for small data. Ray must be running where the warm-up periods are not
            prepared yet.

    Raises:
        ConfigError: a section that does not fit the pipeline, or an earlier selection stands.
        DataError: the withheld periods have no impressions, no considerations, or too few batches of them.
        RayfmError: as `rayfm.pipeline.stream.run`.
    """
    started = time.perf_counter()
    job = SelectJob(config, here)
    if job.open(resume, overwrite):
        return SelectResult(read_selection(job.folder), job.folder, time.perf_counter() - started)
    if here:
        job.train_here()
        job.score_here(scored)
    else:
        with ray_session(config.ray):
            job.train(watch)
            job.score(scored)
    return SelectResult(job.finish(), job.folder, time.perf_counter() - started)


def select_folder(config: PipelineConfig) -> Path:
    """Where a selection of a config's name lies."""
    return Path(config.runs).absolute() / f"{config.name}.select"


def warmup_split(config: PipelineConfig, available: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(periods to train on, withheld periods), of those before the first test period.

    Raises:
        ConfigError: too few are left to train on: the first has no pseudo-labels, since no teacher came before it.
    """
    select = _section(config)
    periods = choose_periods(config, available)[: config.schedule.warmup]
    needed = select.withheld + 2
    if len(periods) < needed:
        raise ConfigError(
            f"schedule.warmup {config.schedule.warmup}: a selection needs {needed} before the first test period, "
            f"one for the teacher alone, one or more with its labels for the student, and {select.withheld} withheld; "
            "raise schedule.warmup, or lower select.withheld"
        )
    return periods[: -select.withheld], periods[-select.withheld :]


def choose_teacher(config: PipelineConfig) -> str:
    """The teacher that labels.

    Raises:
        ConfigError: it is not said which, there is none of that name, or it labels no considerations.
    """
    select, known = _section(config), list(config.teachers)
    name = select.teacher or (known[0] if len(known) == 1 else None)
    if name is None:
        which = f"which of {', '.join(known)}? Name it" if known else "the config has no teachers; add one"
        raise ConfigError(f"select.teacher: {which}")
    if name not in known:
        raise ConfigError(f"select.teacher: there is no teacher {name!r}{nearest(name, known)}")
    if not config.teachers[name].label_considerations:
        raise ConfigError(f"select.teacher: {name!r} labels no considerations; set its label_considerations: true")
    return name


def choose_candidates(config: PipelineConfig, teacher: TeacherConfig) -> tuple[str, ...]:
    """The candidate features, in the schema's order.

    Raises:
        ConfigError: one is not in the schema, or ``top_k`` is more than there are.
    """
    select = _section(config)
    try:
        found = select_features(config.schema_, select.candidates or teacher.model.features)
    except ConfigError as error:
        raise ConfigError(f"select.candidates: {error}") from None
    if select.top_k is not None and select.top_k > len(found):
        raise ConfigError(f"select.top_k: {select.top_k} of {len(found)} candidates; take fewer")
    return tuple(feature.name for feature in found)


def simplified_model(select: SelectConfig, candidates: tuple[str, ...]) -> ModelConfig:
    """The simplified student's model, which reads all candidates.

    Raises:
        ConfigError: it reads histories, which are no candidates.
    """
    model: ModelConfig = select.model or MODELS["deepfm"].Config(embedding_dim=8, hidden=(64, 32))
    if model.histories:
        raise ConfigError("select.model: histories are no candidates; leave them out")
    return model.model_copy(update={"features": candidates})


def training_config(config: PipelineConfig, available: list[str], here: bool = False) -> PipelineConfig:
    """The pipeline that trains the teacher and the simplified student (steps 1 to 3).

    The student's loss is that of the true labels on impressions plus that of the pseudo-labels on considerations. Both
    models stop before the withheld periods, whose labels come from the teacher as it then is.

    Args:
        config: the pipeline's config.
        available: the source's periods.
        here: for one process.

    Raises:
        ConfigError: the ``select`` section does not fit.
    """
    select = _section(config)
    name = choose_teacher(config)
    trained, withheld = warmup_split(config, available)
    teacher = config.teachers[name].model_copy(update={"reference": {}, "through": None, "near_line": None})
    taught = config.tasks_of(teacher)
    for task in select.tasks or ():
        if task not in taught:
            raise ConfigError(f"select.tasks: teacher {name!r} has no task {task!r}{nearest(task, list(taught))}")
    tasks = tuple(task for task in taught if select.tasks is None or task in select.tasks)
    group = select.group or next(iter(config.groups), "students")
    if group not in config.groups:
        raise ConfigError(f"select.group: no worker group {group!r}{nearest(group, list(config.groups))}")
    if select.first_labels >= len(trained):
        raise ConfigError(
            f"select.first_labels: {select.first_labels} leaves no period with pseudo-labels of the {len(trained)} "
            "that are trained on; lower it"
        )
    training = config.groups[group]
    teaching = teacher.dump()
    if here:
        training = training.model_copy(update={"workers": 1, "reader": "arrow"})
        teaching["training"] |= {"workers": 1, "reader": "arrow"}
    mixed = {"type": "direct", "teacher": name, "rows": "considerations", "weight": select.consideration_weight}
    model = simplified_model(select, choose_candidates(config, teacher))
    student = {
        "model": model.dump(),
        "tasks": list(tasks),
        "variants": {VARIANT: [mixed]},
        "group": "students",
        "labels": {"first": select.first_labels},
        # Scored against the pseudo-labels, so that the withheld periods get them.
        "reference": {task: f"{name}/{task}" for task in tasks},
    }
    schedule = {
        "first": trained[0], "last": withheld[-1], "warmup": len(trained),
        "teachers_through": trained[-1], "students_through": trained[-1],
    }  # fmt: skip
    mapping = config.dump() | {
        "name": "training",
        "runs": str(select_folder(config)),
        "storage": str(Path(config.storage).absolute()),
        "label_store": None,
        "seeds": [select.seed],
        "schedule": schedule,
        "teachers": {name: teaching},
        "students": {STUDENT: student},
        "groups": {"students": training.dump()},
        "consideration_share": select.consideration_share,
        "publish_students": True,
        "evaluation": {"replicates": 0, "consideration_share": 0.0, "reference_variant": VARIANT},
        "serving": config.serving.dump() | {"http_port": None},
        "endpoints": {},
        "tune": None,
        "select": None,
        "promotion": None,
    }
    return validate(PipelineConfig, mapping, "select")


class SelectJob:
    """One selection, in its folder.

    Args:
        config: the pipeline's config, with a ``select`` section.
        here: whether everything runs in this process.
    """

    def __init__(self, config: PipelineConfig, here: bool = False) -> None:
        self.config, self.select = config, _section(config)
        self.folder = select_folder(config)
        source = SOURCES.build(config.data.source, config.schema_)
        available = [period.name for period in source.periods()]
        self.trained, self.withheld = warmup_split(config, available)
        self.teacher = choose_teacher(config)
        self.training = training_config(config, available, here)
        model = self.training.students[STUDENT].model
        self.candidates = tuple(model.features or ())
        self.model_type = str(vars(model)["type"])
        self.tasks = self.training.tasks_of(self.training.students[STUDENT])
        self.top_k = self.select.top_k or -(-len(self.candidates) // 2)
        self._pipeline: Pipeline | None = None

    @property
    def pipeline(self) -> Pipeline:
        """The run that trains. Made late: it makes folders."""
        if self._pipeline is None:
            self._pipeline = Pipeline(self.training)
        return self._pipeline

    def open(self, resume: bool, overwrite: bool) -> bool:
        """Make the folder, or take up the one that stands; returns whether the selection is already done.

        Raises:
            ConfigError: it stands and neither ``resume`` nor ``overwrite`` is asked for, or it is another selection's.
        """
        saved, mine = self.folder / "select.yaml", self._described()
        if take_up(saved, mine, "selection", "the same config", resume=resume, overwrite=overwrite):
            return (self.folder / FILE).exists()
        check_folder(self.folder)
        write_down(saved, mine)
        return False

    def _described(self) -> dict[str, Any]:
        """What must not change when a selection resumes. Where it runs may."""
        training = self.training.dump()
        for key in ("ray", "serving", "endpoints", "runs", "storage"):
            del training[key]
        section = self.select.dump()
        for key in ("cpus", "features_per_item"):
            del section[key]
        described: dict[str, Any] = json.loads(json.dumps({"select": section, "training": training}))
        return described

    # -- steps 1 to 3 -------------------------------------------------------------------------------------------

    def train(self, watch: Callable[[Watch], None] | None = None) -> None:
        """Teacher, pseudo-labels, simplified student, as `rayfm run` does it. Ray must be running."""
        if not self._is_trained():
            self.pipeline.open(resume=True, overwrite=False)
            self.pipeline.run(watch)

    def train_here(self) -> None:
        """The same in this process. Ray must be running where periods are not prepared yet."""
        if not self._is_trained():
            if self._unprepared():
                self.pipeline.prepare()
            self._pipeline = run_here(self.training)

    def _unprepared(self) -> set[str]:
        """The periods that are not in the example store yet."""
        pipeline = self.pipeline
        missing = missing_periods(pipeline.source, self.training.schema_, pipeline.store, self.training.data.lanes)
        return {period.name for period in missing} & set(pipeline.periods)

    def _student(self) -> str:
        return f"{STUDENT}.{VARIANT}.{self.select.seed}"

    def _is_trained(self) -> bool:
        """Whether all that Algorithm 1 reads stands: the student, and the labels of the withheld periods."""
        if not (self.folder / "training" / "config.yaml").exists():
            return False
        pipeline = self.pipeline
        if self._unprepared():
            return False
        labelled = all(pipeline.tickets.get("labelled", self.teacher, period) for period in self.withheld)
        version = pipeline.snapshots.latest(self._student())
        if not labelled or version is None:
            return False
        return pipeline.snapshots.manifest(self._student(), version).trained_through == self.trained[-1]

    # -- step 4 -------------------------------------------------------------------------------------------------

    def measured(self) -> tuple[Measured, list[Item]]:
        """What the work items share, and the work items.

        Raises:
            DataError: the student is not trained, or labels are missing.
        """
        pipeline, student = self.pipeline, self._student()
        version = pipeline.snapshots.latest(student)
        if version is None:
            raise DataError(f"{pipeline.run_dir}: the simplified student is not trained; select with --resume")
        source, lookups, labels = pipeline.label_source("select"), {}, {}
        for period in self.withheld:
            ticket = pipeline.tickets.get("labelled", self.teacher, period)
            if ticket is None:
                raise DataError(f"{pipeline.run_dir}: {period} has no pseudo-labels; select with --resume")
            pinned = PinnedLabels(version=str(ticket["version"]), table_version=int(ticket["table_version"]))
            labels[period] = pinned.dump()
            lookups[period] = source.lookup(self.teacher, pinned, self.tasks)
        manifest = pipeline.snapshots.manifest(student, version)
        key = {
            "student": {name: file.sha256 for name, file in manifest.files.items()},
            "labels": labels,
            "candidates": self.candidates,
            "select": {
                name: getattr(self.select, name)
                for name in ("batch_size", "batches_per_lane", "shuffles", "seed", "features_per_item")
            },
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
        measured = Measured(
            store=pipeline.store,
            root=str(pipeline.run_dir),
            model=student,
            version=version,
            teacher=self.teacher,
            lookups=lookups,
            batch_size=self.select.batch_size,
            batches_per_lane=self.select.batches_per_lane,
            shuffles=self.select.shuffles,
            seed=self.select.seed,
            folder=self.folder / "items" / digest,
        )
        check_folder(measured.folder)
        return measured, work_items(pipeline.store, self.withheld, self.candidates, self.select.features_per_item)

    def score(self, scored: Scored | None = None) -> None:
        """Algorithm 1 on Ray Data; work items that have a file are not scored again. Ray must be running."""
        measured, items = self.measured()
        score_on_ray(measured, items, self.select.cpus, scored, self.config.ray.nodes.data)

    def score_here(self, scored: Scored | None = None) -> None:
        """The same in this process."""
        score_here(*self.measured(), scored)

    # -- step 5 -------------------------------------------------------------------------------------------------

    def finish(self) -> Selection:
        """Rankings, lists, files.

        Raises:
            DataError: items are missing, or too few batches are.
        """
        measured, items = self.measured()
        left = unscored(measured, items)
        if left:
            raise DataError(f"{len(left)} of {len(items)} work items are not scored; select with --resume")
        select = self.select
        impressions, considerations = (gather(items, measured.folder, self.candidates, kind) for kind in KINDS)
        arguments = (self.top_k, select.threshold, select.sigmas, select.average_weight)
        found = Selection(
            name=self.config.name,
            teacher=self.teacher,
            student=self.model_type,
            tasks=self.tasks,
            candidates=self.candidates,
            trained=self.trained,
            withheld=self.withheld,
            top_k=self.top_k,
            measured={
                "impression": measurement(impressions, select.threshold, select.sigmas),
                "consideration": measurement(considerations, select.threshold, select.sigmas),
            },
            lists=feature_lists(impressions, considerations, *arguments),
        )
        write_selection(found, self.folder)
        return found


def _section(config: PipelineConfig) -> SelectConfig:
    """The config's own section, or one of defaults."""
    return config.select if config.select is not None else SelectConfig()
