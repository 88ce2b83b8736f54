"""The one YAML file of a pipeline."""

from __future__ import annotations

import graphlib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from rayfm.config import Config, ConfigError, apply_override, nearest, read_yaml, validate
from rayfm.config.nodes import NodeLabels, NodesConfig
from rayfm.data.config import DataConfig
from rayfm.data.sampling import ConsiderationShare
from rayfm.data.sources.base import SOURCES
from rayfm.distill.base import OBJECTIVES, ObjectiveConfig
from rayfm.distill.build import check_objectives
from rayfm.labels.config import LabelStoreConfig
from rayfm.labels.storage import Storage
from rayfm.models.base import MODELS, ModelConfig
from rayfm.models.histories import HistoryFeature
from rayfm.operations.alerts import AlertsConfig
from rayfm.operations.logs import LoggingConfig
from rayfm.operations.promotion import OF_REGRESSIONS, PromotionConfig
from rayfm.operations.tracking import TrackingConfig
from rayfm.pipeline.follow_config import FollowConfig
from rayfm.pipeline.tune_config import TuneConfig
from rayfm.schema import LOGGED_PREFIX, Schema
from rayfm.selection.config import SelectConfig
from rayfm.serving.gang.gpus import check_member_gpus
from rayfm.serving.http.config import EndpointsConfig
from rayfm.serving.nearline.config import NearLineSupervisionConfig
from rayfm.serving.replicas import Replicas
from rayfm.training.calibration import CountsCalibration
from rayfm.training.config import TrainingConfig
from rayfm.training.lost_labels import LostLabels

Stage = Literal["retrieval", "early", "ranking"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class LabelsConfig(Config):
    """What a student asks of its teacher's labels."""

    min_coverage: float = Field(0.99, ge=0, le=1)
    """Share of the impressions that must have a label."""
    wait: float = Field(3600.0, ge=0)
    """Seconds to wait for a period's labels."""
    on_missing: Literal["fail", "train_without"] = "fail"
    """What to do when they do not come, or cover too little."""
    first: int = Field(1, ge=1)
    """Position (from 0) of the first period whose labels are used. A teacher that saw one period may know less than
    its students; the first period itself can have no labels."""


class TeacherConfig(Config):
    """A teacher (ExFM's FM)."""

    model: Annotated[ModelConfig, MODELS]
    tasks: tuple[str, ...] | None = None
    """Tasks to learn and to label; by default all of the schema's."""
    objectives: tuple[Annotated[ObjectiveConfig, OBJECTIVES], ...] = ()
    """Its objectives besides the tasks' own loss. They may read logged predictions, and other teachers' labels: a stage
    of a cascade that learns from the next one, and teaches the one before it."""
    consideration_share: ConsiderationShare = 0.0
    """Which considerations are in its training batches, for objectives that learn without true labels: a share of them
    all, from 0 to 1, or a policy."""
    labels: LabelsConfig = LabelsConfig()
    """What it asks of the labels of teachers that it learns from."""
    training: TrainingConfig = TrainingConfig(reader="ray_data")
    """Its ``reader`` is ``ray_data`` unless it names another: a teacher reads all periods through one pipeline."""
    seed: int = 0
    through: str | None = None
    """Last period that it trains on, if not ``schedule.teachers_through``: for the cost of a stale teacher."""
    label_considerations: bool = True
    """Whether considerations get labels too."""
    near_line: NearLineSupervisionConfig | None = None
    """Whether students take this teacher's near-line labels where its bulk labels say nothing; by default not."""
    store_representation: bool = False
    """Store the model's representation beside each label, for students' ``representation`` objectives: 4 bytes times
    its width a row."""
    reference: dict[str, str] = {}
    """Task -> column that considerations, and impressions besides their labels, are scored against:
    ``logged/<model>/<task>``, ``truth/<task>``, or another teacher's ``<teacher>/<task>``."""
    traffics: tuple[str, ...] = ()
    """Traffics whose rows it learns and is scored on: one domain's teacher. It labels all. None named: all."""
    lost_labels: LostLabels | None = None
    """Labels that it is trained without, for experiments on signal loss; it is scored with them."""
    logit_shift: float = 0.0
    """Added to the logits of its binary tasks when it labels: a teacher made as miscalibrated as an experiment needs
    it. Its training and its own metrics are those without."""
    calibrate: bool | CountsCalibration = False
    """Publish with a calibrator (Platt scaling) of each binary task, fitted on the newest period's predictions before
    the model trained on it: its labels are then calibrated. Training and the run's metrics stay those without. With
    ``by`` (and ``counts``) it is fitted on counts of positives per cell, where rows have no true labels."""

    @field_validator("training", mode="before")
    @classmethod
    def _reads_by_ray_data(cls, training: object) -> object:
        """Also where other keys are given: what a teacher reads with does not hang on its batch size being named."""
        if isinstance(training, dict) and "reader" not in training:
            return {**training, "reader": "ray_data"}
        if isinstance(training, TrainingConfig) and "reader" not in training.model_fields_set:
            return training.model_copy(update={"reader": "ray_data"})
        return training


class StudentConfig(Config):
    """A student (ExFM's VM) and its variants, trained side by side."""

    model: Annotated[ModelConfig, MODELS]
    tasks: tuple[str, ...] | None = None
    stage: Stage = "ranking"
    traffics: tuple[str, ...] = ()
    """Traffics whose rows it learns and is scored on: one domain's model. None named: all."""
    lost_labels: LostLabels | None = None
    """Labels that it is trained without, for experiments on signal loss; it is scored with them."""
    variants: dict[Name, tuple[Annotated[ObjectiveConfig, OBJECTIVES], ...]] = {"none": ()}
    """Variant -> its objectives besides the tasks' own loss."""
    group: str = "students"
    """The worker group that trains it; students of one group share a reader."""
    labels: LabelsConfig = LabelsConfig()
    reference: dict[str, str] = {}
    """Task -> column that considerations, and impressions besides their labels, are scored against: the next stage's
    prediction, as UKDSL does (``logged/<model>/<task>`` or ``<teacher>/<task>``), or ``truth/<task>``."""
    calibrate: bool | CountsCalibration = False
    """Publish with a calibrator, as a teacher's ``calibrate`` says: what is served is then calibrated."""


class ScheduleConfig(Config):
    """Which periods do what."""

    warmup: int = Field(ge=1)
    """Periods before the first test period. Choices are fixed on them; the report's numbers are of those after."""
    first: str | None = None
    last: str | None = None
    """Names of the first and last period to use; by default all that the source has."""
    teachers_through: str | None = None
    """Last period that teachers train on; later ones they only predict, and their labels come from that snapshot."""
    students_from: str | None = None
    """First period of the students: they neither predict nor train on earlier ones."""
    students_through: str | None = None
    """Last period that students train on; later ones they only predict."""


class EvaluationConfig(Config):
    """How predictions are scored."""

    replicates: int = Field(200, ge=0)
    """Bootstrap replicates behind the intervals; 0: no intervals."""
    consideration_share: float = Field(1.0, ge=0, le=1)
    """Share of the considerations to predict and score."""
    reference_variant: str = "none"
    """The variant that the others are compared with."""


class ServingConfig(Replicas):
    """The teacher service."""

    threads: int = Field(1, ge=1)
    rows_per_request: int = Field(8192, ge=1)
    http_port: int | None = Field(None, ge=1, le=65535)
    """Also answer over HTTP on this port of the loopback interface."""

    @model_validator(mode="after")
    def _gang(self) -> ServingConfig:
        if self.members > 1 and self.http_port is not None:
            raise ValueError("http_port goes with members: 1; a gang is asked through its handle, or `rayfm serve`")
        if self.members > 1:
            check_member_gpus(self.member_gpus)
        return self

    def placed(self, nodes: NodeLabels) -> Replicas:
        """The replicas alone, on nodes of these labels unless the config names others."""
        own = {name: getattr(self, name) for name in Replicas.model_fields}
        return Replicas(**own | {"nodes": self.nodes or nodes})


class RayConfig(Config):
    """The Ray cluster."""

    address: str | None = None
    """``auto`` or an address to join a cluster; by default ``$RAY_ADDRESS``. Without either, and with
    ``local``, a Ray of its own on this machine."""
    cpus: float | None = Field(None, gt=0)
    """CPUs of the Ray that is started here; by default the machine's cores."""
    data_cpus: float = Field(0.5, gt=0)
    """CPUs kept free of trainers and replicas, for Ray Data tasks."""
    object_store_mb: int = Field(512, ge=100)
    """Size of the object store of the Ray that is started here."""
    nodes: NodesConfig = NodesConfig()
    """Labels of a cluster's nodes for each kind of work."""
    max_cpus: float = Field(0.0, ge=0)
    max_gpus: float = Field(0.0, ge=0)
    """What an autoscaler makes of the cluster at most: a plan has to fit into that, not into what runs at the start.
    Ray does not say by itself."""

    @property
    def largest(self) -> tuple[float, float]:
        """CPUs and GPUs of the cluster at its largest, as far as the config says."""
        return self.max_cpus, self.max_gpus


class PipelineConfig(Config):
    """A whole pipeline: data, teachers, students, schedule, storage."""

    name: Name
    storage: str = "runs/data"
    """Folder of the example store (examples, truth, rejects). Runs on the same data share it. On a cluster: a folder
    that every node mounts."""
    runs: str = "runs"
    """Folder of the runs: each has its snapshots, labels, checkpoints, metrics and report in a folder of its name."""
    label_store: LabelStoreConfig | None = None
    """Where the runs' labels and histories lie, if not in their folders: ``s3://bucket/prefix``, or another folder."""
    seeds: tuple[int, ...] = Field((1,), min_length=1)
    """Every variant is trained once per seed."""
    data: DataConfig
    schema_: Schema = Field(alias="schema")
    schedule: ScheduleConfig
    teachers: dict[Name, TeacherConfig] = {}
    students: dict[Name, StudentConfig]
    groups: dict[Name, TrainingConfig] = {"students": TrainingConfig()}
    """Worker groups of the students."""
    consideration_share: ConsiderationShare = 0.0
    """Which considerations join the students' batches: a share of them all, from 0 to 1, or a policy."""
    publish_students: bool = True
    """Whether students are published after each period; without it, experiments on metrics alone are faster."""
    keep_snapshots: int = Field(3, ge=1)
    """Newest published versions of a student that a run keeps; a teacher's are all kept."""
    evaluation: EvaluationConfig = EvaluationConfig()
    serving: ServingConfig = ServingConfig()
    endpoints: EndpointsConfig = EndpointsConfig()
    """What `rayfm serve` starts; a run does not read it."""
    promotion: PromotionConfig | None = None
    """When a published version may be served; by default the newest is, however good it is."""
    alerts: AlertsConfig = AlertsConfig()
    """Bars that each period of a run is held against."""
    logging: LoggingConfig = LoggingConfig()
    """How log lines look."""
    tracking: TrackingConfig = TrackingConfig()
    """Where a run's scalars go besides its folder: TensorBoard, MLflow."""
    ray: RayConfig = RayConfig()
    follow: FollowConfig = FollowConfig()
    """How `rayfm run CONFIG --follow` looks for new periods."""
    tune: TuneConfig | None = None
    """What `rayfm tune` searches; a run does not read it."""
    select: SelectConfig | None = None
    """What `rayfm select` does; a run does not read it."""

    @property
    def run_dir(self) -> Path:
        return Path(self.runs) / self.name

    @property
    def label_storage(self) -> Storage:
        """Where the run's labels and histories lie."""
        return Storage.of(self.run_dir) if self.label_store is None else self.label_store.of_run(self.name)

    def tasks_of(self, part: TeacherConfig | StudentConfig) -> tuple[str, ...]:
        """The tasks of a teacher or student, in the schema's order."""
        return tuple(t.name for t in self.schema_.tasks if part.tasks is None or t.name in part.tasks)

    @model_validator(mode="after")
    def _consistent(self) -> PipelineConfig:
        tasks = [task.name for task in self.schema_.tasks]
        features = [feature.name for feature in self.schema_.features]
        for what, others in (("student", self.students), ("worker group", self.groups)):
            clash = set(self.teachers) & set(others)
            if clash:
                raise ValueError(f"{min(clash)!r} is both a teacher and a {what}; rename one")
        for name in ("truth", "logged"):
            if name in self.teachers:
                raise ValueError(f"a teacher cannot be called {name!r}: columns that begin so have another meaning")
        parts: list[tuple[str, TeacherConfig | StudentConfig]] = [*self.teachers.items(), *self.students.items()]
        for name, part in parts:
            for task in part.tasks or ():
                if task not in tasks:
                    raise ValueError(f"{name}: task {task!r} is not in the schema{nearest(task, tasks)}")
            for feature in part.model.features or ():
                if feature not in features:
                    raise ValueError(f"{name}: feature {feature!r} is not in the schema{nearest(feature, features)}")
            try:
                part.model.check(self.schema_, self.tasks_of(part))
            except ConfigError as error:
                raise ValueError(f"{name}: {error}") from None
            for task, column in part.reference.items():
                own = list(self.tasks_of(part))
                if task not in own:
                    raise ValueError(f"{name}: reference of {task!r}, which is no task of it{nearest(task, own)}")
                self._check_column(name, f"reference of {task!r}", column, truth=True)
            if isinstance(part.calibrate, CountsCalibration):
                try:
                    part.calibrate.check(self.schema_)
                except ConfigError as error:
                    raise ValueError(f"{name}: {error}") from None
            if part.calibrate and all(self.schema_.task(task).kind != "binary" for task in self.tasks_of(part)):
                raise ValueError(f"{name}: calibrate is for binary tasks, and it has none; leave it out")
            for traffic in (*part.traffics, *(part.lost_labels.traffics if part.lost_labels else ())):
                if traffic not in self.schema_.traffics:
                    known = nearest(traffic, list(self.schema_.traffics))
                    raise ValueError(f"{name}: traffic {traffic!r} is not in the schema{known}")
        for name, student in self.students.items():
            if student.group not in self.groups:
                raise ValueError(
                    f"{name}: worker group {student.group!r} is not defined{nearest(student.group, list(self.groups))}"
                )
            for variant, objectives in student.variants.items():
                for objective in objectives:
                    for column in objective.supervision(self.tasks_of(student)):
                        self._check_column(name, f"variant {variant!r}", column, truth=False)
                self._check_objectives(f"{name}: variant {variant!r}", student, objectives)
                self._check_readings(f"{name}: variant {variant!r}", objectives)
        for name, teacher in self.teachers.items():
            for objective in teacher.objectives:
                for column in objective.supervision(self.tasks_of(teacher)):
                    self._check_column(name, f"objective {objective.label!r}", column, truth=False)
            self._check_objectives(name, teacher, teacher.objectives)
            self._check_readings(name, teacher.objectives)
            if teacher.model.histories:
                raise ValueError(f"{name}: 'histories' are for students")
        self._check_chain()
        self._check_histories()
        self._check_promotion()
        trainings = [(f"teacher {name}", teacher.training) for name, teacher in self.teachers.items()]
        for name, training in [*trainings, *((f"group {name}", group) for name, group in self.groups.items())]:
            self._check_training(name, training)
        for name, part in parts:
            training = part.training if isinstance(part, TeacherConfig) else self.groups[part.group]
            for table in sorted(part.model.unpooled_tables(self.schema_)):
                if training.sharding_of(table, self.schema_.tables[table].rows) == "data_parallel":
                    raise ValueError(
                        f"{name}: table {table!r} is read item by item by a sequence, and such a table cannot be "
                        "replicated, as optimiser adam needs; give it another one in 'table_overrides'"
                    )
        return self

    def objectives_of(self, part: TeacherConfig | StudentConfig) -> tuple[ObjectiveConfig, ...]:
        """The objectives of a teacher, or of all variants of a student."""
        if isinstance(part, TeacherConfig):
            return part.objectives
        return tuple(objective for objectives in part.variants.values() for objective in objectives)

    def teachers_read(self, part: TeacherConfig | StudentConfig) -> tuple[str, ...]:
        """The teachers whose labels a part reads, to learn from or to be scored against, in the config's order."""
        heads = {column.partition("/")[0] for column in part.reference.values()}
        heads |= {history.teacher for history in part.model.histories}
        for objective in self.objectives_of(part):
            heads |= {column.partition("/")[0] for column in objective.supervision(self.tasks_of(part))}
            heads |= set(objective.representations())
        return tuple(name for name in self.teachers if name in heads)

    def teacher_order(self) -> tuple[str, ...]:
        """The teachers, each after those that it reads: a cascade's last stage first."""
        reads = {name: self.teachers_read(teacher) for name, teacher in self.teachers.items()}
        return tuple(graphlib.TopologicalSorter(reads).static_order())

    def _check_chain(self) -> None:
        try:
            self.teacher_order()
        except graphlib.CycleError as error:
            circle = " -> ".join(error.args[1])
            raise ValueError(
                f"teachers: each would wait for the other's labels, {circle} (whose labels -> who reads them); take "
                f"one of the objectives or references out, or let one read '{LOGGED_PREFIX}<model>'"
            ) from None

    def _check_histories(self) -> None:
        first: dict[str, tuple[str, HistoryFeature]] = {}
        for name, student in self.students.items():
            for history in student.model.histories:
                teacher = self.teachers.get(history.teacher)
                if teacher is None:
                    known = nearest(history.teacher, list(self.teachers)) or "; no teacher is defined"
                    raise ValueError(f"{name}: {history.name}: there is no teacher {history.teacher!r}{known}")
                if not teacher.store_representation:
                    raise ValueError(
                        f"{name}: {history.name} is made of representations that are not stored; set "
                        f"teachers.{history.teacher}.store_representation: true"
                    )
                other, same = first.setdefault(history.name, (name, history))
                if same != history:
                    raise ValueError(
                        f"{name}: {history.name} differs from that of {other!r}; students share a teacher's history by "
                        "a key, so give both the same decay, positives_of and width"
                    )

    def _check_promotion(self) -> None:
        if self.promotion is None:
            return
        tasks = {task.name: task.kind for task in self.schema_.tasks}
        for rule in self.promotion.rules:
            if rule.task is not None and rule.task not in tasks:
                known = nearest(rule.task, list(tasks))
                raise ValueError(f"promotion: task {rule.task!r} is not in the schema{known}")
            kinds = set(tasks.values()) if rule.task is None else {tasks[rule.task]}
            if rule.metric not in OF_REGRESSIONS and "binary" not in kinds:
                of = f"task {rule.task!r} is a regression" if rule.task else "every task is a regression"
                raise ValueError(f"promotion: {rule.metric} is of binary tasks, and {of}; take rmse or calibration")
        if "students" in self.promotion.roles and not self.publish_students:
            raise ValueError("promotion guards what is published, and publish_students is false; set it, or leave out")
        if "teachers" in self.promotion.roles and not self.teachers:
            raise ValueError("promotion: roles names teachers, and there are none; leave it out")

    def _check_training(self, owner: str, training: TrainingConfig) -> None:
        for table in (*training.table_overrides, *training.sharding_overrides):
            if table not in self.schema_.tables:
                known = nearest(table, list(self.schema_.tables))
                raise ValueError(f"{owner}: override for table {table!r}, which is not in the schema{known}")
        lanes = self.data.lanes
        for key, size in (("batch_size", training.batch_size), ("predict_batch_size", training.predict_batch_size)):
            if size % lanes:
                nearby = max(1, size // lanes) * lanes
                raise ValueError(f"{owner}: {key} {size} is not a multiple of data.lanes {lanes}; take {nearby}")

    def _check_objectives(
        self, owner: str, part: TeacherConfig | StudentConfig, objectives: tuple[ObjectiveConfig, ...]
    ) -> None:
        try:
            check_objectives(objectives, self.schema_, self.tasks_of(part))
        except ConfigError as error:
            raise ValueError(f"{owner}: {error}") from None

    def _check_readings(self, owner: str, objectives: tuple[ObjectiveConfig, ...]) -> None:
        """What objectives read beside supervision columns: stored representations, and requests."""
        source = vars(self.data.source)["type"]
        for objective in objectives:
            for teacher in objective.representations():
                if teacher not in self.teachers:
                    known = nearest(teacher, list(self.teachers)) or "; no teacher is defined"
                    raise ValueError(f"{owner} reads a representation, but there is no teacher {teacher!r}{known}")
                if not self.teachers[teacher].store_representation:
                    raise ValueError(
                        f"{owner} reads the representation of {teacher!r}, which is not stored; set "
                        f"teachers.{teacher}.store_representation: true"
                    )
            if objective.needs_requests and SOURCES[source].has_requests is False:
                raise ValueError(
                    f"{owner}: objective {objective.label!r} compares rows of one request, and the source {source!r} "
                    "has no request_id; leave it out"
                )

    def _check_column(self, owner: str, what: str, column: str, truth: bool) -> None:
        head, _, task = column.partition("/")
        if column.startswith(LOGGED_PREFIX) or (truth and head == "truth"):
            return
        if head not in self.teachers:
            known = nearest(head, list(self.teachers)) or "; no teacher is defined"
            raise ValueError(f"{owner}: {what} reads {column!r}, but there is no teacher {head!r}{known}")
        taught = self.tasks_of(self.teachers[head])
        if task not in taught:
            raise ValueError(
                f"{owner}: {what} reads {column!r}, but teacher {head!r} has no task {task!r}"
                f"{nearest(task, list(taught))}"
            )


def load_config(path: str | Path, overrides: list[str] | None = None, data: str | None = None) -> PipelineConfig:
    """Read a pipeline's YAML file, apply ``--set`` overrides and ``--data`` (the source's ``path``), and validate it.

    Raises:
        ConfigError: with every complaint, one a line.
    """
    mapping = read_yaml(path)
    if data is not None:
        part = mapping.get("data")
        source = part.get("source") if isinstance(part, dict) else None
        if not isinstance(source, dict):
            raise ConfigError(f"{path}: 'data.source' is missing; --data sets its path")
        source["path"] = data
    for assignment in overrides or []:
        apply_override(mapping, assignment)
    return validate(PipelineConfig, mapping, str(path))
