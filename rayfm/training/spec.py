"""What a trainer is told: which models, which periods, where things are."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from rayfm.config import Config
from rayfm.config.nodes import NodesConfig
from rayfm.data.sampling import ConsiderationShare
from rayfm.data.steps import Lookup, RepresentationLookup
from rayfm.data.store import ExampleStore
from rayfm.export.config import Tolerance
from rayfm.models.histories import HistoryFeature
from rayfm.schema import Schema
from rayfm.training.config import TrainingConfig
from rayfm.training.learner import LearnerConfig


class TrainerSpec(Config):
    """One worker group: a teacher, or the students that share a reader and a collate."""

    name: str
    role: str
    """``teacher`` or ``students``."""
    learners: tuple[LearnerConfig, ...]
    training: TrainingConfig
    schema_: Schema
    features: tuple[str, ...] | None = None
    """Features that any of the learners reads; None: all."""
    periods: tuple[str, ...]
    trained: int | None = None
    """How many of the periods, from the first, are trained on; the others are predicted alone. None: all."""
    first_predicted: int = 1
    """Index of the first period that is predicted before it is trained on."""
    publish: bool = True
    """Whether each trained period is published."""
    export_tolerance: Tolerance | None = Tolerance()
    """How far the exported form of a student may be from what was trained; a version beyond it is not published. None:
    students are published unchecked."""
    guarded: bool = False
    """Whether what is published waits for the guard's decision before anybody takes it by itself."""
    store: str
    """Root of the example store."""
    run_dir: str
    """The run's folder: snapshots, and this trainer's own folder, lie below it."""
    teachers: tuple[str, ...] = ()
    """Teachers whose labels the learners read."""
    consideration_share: ConsiderationShare = 0.0
    """Which considerations are in training batches: a share of them all, or a policy."""
    evaluated_share: float = 0.0
    """Share of the considerations that are predicted and scored."""
    replicates: int = 200
    nodes: NodesConfig = NodesConfig()
    """Where workers run, unless the training names others, and the tasks that read for them."""
    follow: bool = False
    """Whether more periods come after those named; the coordinator then knows the next one."""

    @property
    def folder(self) -> Path:
        return Path(self.run_dir) / "trainers" / self.name


class PinnedLabels(Config):
    """Which labels a period is trained with: a teacher's version as a version of the label table holds it."""

    version: str
    table_version: int
    near_line: int | None = None
    """Version of the near-line label table, whose labels by the same teacher version fill what is masked."""


class Coordinator(Protocol):
    """What the loop asks of the pipeline around it. Every call is made by rank 0 alone."""

    def wait_prepared(self, period: str) -> None:
        """Block until the period may be trained on by this trainer."""
        ...

    def wait_labels(self, period: str) -> dict[str, PinnedLabels]:
        """Block until the period's labels stand, by teacher. A teacher may be absent (train without)."""
        ...

    def trained(self, period: str, versions: dict[str, str]) -> None:
        """The period is trained and these versions (model key -> version) are published."""
        ...

    def stopped(self) -> bool:
        """Whether some part of the run has failed."""
        ...

    def failed(self, message: str) -> None:
        """Say that this trainer cannot go on, for a reason that a restart does not mend."""
        ...


class LabelSource(Protocol):
    """Makes a look-up of labels in a worker."""

    def lookup(self, teacher: str, labels: PinnedLabels, tasks: tuple[str, ...]) -> Lookup:
        """Supervision columns ``<teacher>/<task>`` from one version's labels."""
        ...

    def representation(self, teacher: str, labels: PinnedLabels, width: int) -> RepresentationLookup:
        """The representations, ``width`` wide, that the same version stored."""
        ...

    def history(self, history: HistoryFeature, store: ExampleStore, period: str) -> RepresentationLookup:
        """What the teacher thought of the entities' past, as of just before ``period``."""
        ...

    def release(self) -> None:
        """Nobody reads any more from the look-ups made so far: what holds their labels in place may go."""
        ...
