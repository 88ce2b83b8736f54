"""The main job: teacher and students walk through the periods side by side, labels between them.

One driver, a thread per part: each trainer's ``fit``, each teacher's label jobs, the preparation. They meet only in
the period tickets, so any of them can die and be started again.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import logging
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from rayfm.config import RayfmError, SnapshotError
from rayfm.data.cluster import cluster_nodes, cluster_resources
from rayfm.data.prepare import missing_periods
from rayfm.data.prepare import prepare as prepare_source
from rayfm.data.sources.base import Source
from rayfm.operations.logs import about, configure
from rayfm.pipeline.capacity import check_capacity, check_nodes
from rayfm.pipeline.config import PipelineConfig
from rayfm.pipeline.follow import Follower, FollowingTickets, Lag, lag_event
from rayfm.pipeline.label_jobs import label
from rayfm.pipeline.observers import Observers, observers
from rayfm.pipeline.opening import open_run
from rayfm.pipeline.plan import group_labels, periods_to_label, teacher_key
from rayfm.pipeline.promotion import Guard
from rayfm.pipeline.session import own_cpus, ray_session
from rayfm.pipeline.state import RunState
from rayfm.pipeline.stop import StopSignals
from rayfm.pipeline.tickets import TrainerTickets
from rayfm.pipeline.watch import Progress, Watch
from rayfm.serving.application import start_teacher, stop_teacher
from rayfm.serving.labelling import StoredLabels
from rayfm.serving.teacher import TeacherHere, TeacherServiceConfig
from rayfm.training.follow import StopRequested
from rayfm.training.period import PeriodRecord
from rayfm.training.spec import TrainerSpec
from rayfm.training.trainer import fit

log = logging.getLogger(__name__)

WRITE_EVERY_S = 5.0
"""A run that follows writes ``progress.jsonl`` at most so often."""
LATER = "9999-12-31"
"""A period after all others."""


@dataclasses.dataclass
class RunResult:
    """What a finished run leaves."""

    run_dir: Path
    summary: dict[str, Any]
    report: Path
    seconds: float
    stopped: bool = False
    """Whether it was asked to stop; it can be gone on with."""


class Pipeline(RunState):
    """A run's parts; see `RunState` for the arguments.

    Raises:
        ConfigError: the schedule does not fit the periods.
        DataError: the source cannot be read, or the run's folder not be written.
    """

    def __init__(self, config: PipelineConfig, follow: bool = False, anew: bool = False) -> None:
        super().__init__(config, follow, anew)
        self.progress = Progress(self)

    # -- the parts ----------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Bring the source's periods into the example store; what stands there is kept."""
        self._bring(self.source)

    def _bring(self, source: Source, periods: list[str] | None = None) -> None:
        data, tasks = self.config.data, own_cpus(self.config.ray)
        prepare_source(
            source,
            self.config.schema_,
            self.store,
            data.lanes,
            cpus_per_task=data.cpus_per_task,
            only=periods,
            tasks=tasks,
            nodes=self.config.ray.nodes.data,
        )

    def coordinator(self, spec: TrainerSpec, prepare_timeout: float = 3600.0, alone: bool = False) -> TrainerTickets:
        """The coordinator of a trainer.

        Args:
            spec: the trainer.
            prepare_timeout: seconds to wait for a period to be prepared.
            alone: nothing else runs: wait for no label job and for no labels.
        """
        teaches = spec.role == "teacher" and not alone
        students = spec.role == "students"
        labels = group_labels(self.config, spec.name) if students else self.config.teachers[spec.name].labels
        if self.follow and not alone:
            return FollowingTickets(
                self.tickets,
                spec.name,
                self.store,
                self.periods,
                teachers=spec.teachers,
                labels=labels,
                labelled=periods_to_label(self.config, self.periods, spec.name) if teaches else (),
                readers={other.name: other.periods[0] for other in self.specs if spec.name in other.teachers},
                ahead=self.config.follow.ahead,
                labels_on=LATER in periods_to_label(self.config, (*self.periods, LATER), spec.name),
            )
        return TrainerTickets(
            self.tickets,
            spec.name,
            self.store,
            self.periods,
            teachers=spec.teachers,
            labels=labels.model_copy(update={"wait": 0.0}) if alone else labels,
            labelled=periods_to_label(self.config, self.periods, spec.name) if teaches else (),
            prepare_timeout=prepare_timeout,
        )

    def train(self, spec: TrainerSpec, coordinator: TrainerTickets | None = None) -> None:
        """Train one group through all periods."""
        fit(spec, coordinator or self.coordinator(spec), self.label_source(spec.name))
        self._warn()
        self.tickets.check()

    def _warn(self) -> None:
        """Hand on what trainers warn of: their own logs stay on the machines that they run on."""
        for message in self.records.warnings():
            log.warning(message)

    def label_source(self, owner: str) -> StoredLabels:
        """Look-ups of the run's labels, near-line ones included, for a trainer called ``owner``."""
        return StoredLabels(self.labels.storage, self.metadata, owner, near_line=self.run_dir)

    def serve(self, teacher: str) -> Any:
        """Start a teacher's service; returns its handle."""
        serving = self.config.serving
        return start_teacher(
            self.config.name,
            teacher,
            TeacherServiceConfig(
                root=str(self.run_dir.absolute()), model=teacher_key(self.config, teacher), threads=serving.threads
            ),
            replicas=serving.placed(self.config.ray.nodes.serving),
            http_port=serving.http_port,
        )

    def label(
        self, teacher: str, handle: Any, periods: tuple[str, ...] | None = None, timeout: float | None = None
    ) -> None:
        """Label periods in order through a teacher's service; see `rayfm.pipeline.label_jobs.label`."""
        guard = Guard(self, here=isinstance(handle, TeacherHere))
        label(self, teacher, handle, periods, timeout, guard.teacher_version)

    def watch(self) -> Watch:
        """How far the parts are."""
        return self.progress.watch()

    def lags(self) -> dict[str, Lag]:
        """Trainer -> how far it is behind the newest complete period; empty for a run that never followed."""
        return self.progress.lags()

    # -- the whole ----------------------------------------------------------------------------------------------

    def open(self, resume: bool, overwrite: bool) -> None:
        """Make the run's folder, or take up the one that stands; see `rayfm.pipeline.opening.open_run`."""
        open_run(self, resume, overwrite)

    def _follow(self) -> None:
        """Take periods into the stream as they become complete, and prepare them, until the run is to stop."""
        Follower(
            self.config, self.stream, self.store, self._bring, lambda: min(self.progress.places().values()), self.take
        ).run()

    def run(self, watch: Callable[[Watch], None] | None = None, stop: Callable[[], bool] | None = None) -> None:
        """Run all parts to their end. Ray must be running.

        Args:
            watch: called several times a second with the state of the parts.
            stop: asked as often; once it says so, a run that follows stops where it can be gone on with.

        Raises:
            RayfmError: the first failure of any part.
        """
        check_capacity(self.config, *cluster_resources(self.config.ray.largest))
        check_nodes(self.config, cluster_nodes())
        # Before anything is started: is what the store holds ours?
        if not self.follow or self.config.follow.prepare:
            missing_periods(self.source, self.config.schema_, self.store, self.config.data.lanes)
        with observers(self) as told, about(run=self.config.name):
            self._run(told, watch, stop)

    def _run(
        self, told: Observers, watch: Callable[[Watch], None] | None = None, stop: Callable[[], bool] | None = None
    ) -> None:
        self.records.start()
        self.records.told = told.period
        looked = 0.0
        shown: dict[str, Lag] = {}
        written = 0.0
        parts: dict[Future[Any], str] = {}
        guard = Guard(self)
        with ThreadPoolExecutor(max_workers=2 + 3 * len(self.specs)) as pool:

            def start(name: str, work: Callable[..., Any], *arguments: Any) -> None:
                # Each part's lines of the log say which run they are of, from its own thread.
                parts[pool.submit(contextvars.copy_context().run, work, *arguments)] = name

            start("prepare", self._follow if self.follow else self.prepare)
            for spec in self.specs:
                start(spec.name, self.train, spec)
            for spec in self.specs:
                for teacher in spec.teachers:
                    if f"labels of {teacher}" not in parts.values():
                        wanted = periods_to_label(self.config, self.periods, teacher)
                        start(f"labels of {teacher}", self.serve_and_label, teacher, wanted)
            for spec in guard.specs():
                start(f"promotion of {spec.name}", guard.watch, spec)
            failure: BaseException | None = None
            pending = set(parts)
            while pending:
                done, pending = wait(pending, timeout=0.25, return_when=FIRST_COMPLETED)
                for part in done:
                    error = part.exception()
                    if error is not None and failure is None:
                        failure = error
                        self.tickets.fail(parts[part], str(error))
                if stop is not None and stop() and not self.tickets.stopping():
                    self.tickets.stop()
                for record in self.records.refresh():
                    self._collect(record)
                behinds = self.lags()
                if not pending or time.monotonic() - looked >= WRITE_EVERY_S:
                    told.look(behinds)
                    looked = time.monotonic()
                if behinds != shown and time.monotonic() - written >= WRITE_EVERY_S:
                    self.write_events()
                    shown, written = behinds, time.monotonic()
                self._warn()
                if watch is not None:
                    watch(self.watch())
        self.records.told = None
        if failure is not None:
            cause = self.tickets.failure()
            if isinstance(failure, RayfmError) and cause is not None and "stopped because" in str(failure):
                raise RayfmError(f"{cause['who']}: {cause['message']}") from failure
            raise failure

    def _collect(self, record: PeriodRecord) -> None:
        """Delete what newer snapshots of students have superseded; a teacher's stay, for labels to be made again.

        What cannot be deleted now is left to the next look: no training stops for it.
        """
        if record.trainer in {spec.name for spec in self.student_specs}:
            for model in record.versions:
                try:
                    self.collector.expire(model)
                    self.collector.sweep(model)
                except (SnapshotError, OSError) as error:
                    log.warning("old versions of %s stay for now: %s", model, error)

    def serve_and_label(
        self, teacher: str, periods: tuple[str, ...] | None = None, timeout: float | None = None
    ) -> None:
        """Start a teacher's service, label through it (as `label`), stop it."""
        handle = self.serve(teacher)
        try:
            self.label(teacher, handle, periods, timeout)
        except StopRequested:
            log.info("labels of %s: stopped between two periods", teacher)
        finally:
            stop_teacher(self.config.name, teacher)

    def write_events(self) -> None:
        """Bring ``progress.jsonl`` up to date."""
        arrived = {arrival.period: arrival.at for arrival in self.arrivals}
        self.records.events(arrived, [lag_event(found) for found in self.lags().values()])

    def finish(self) -> tuple[dict[str, Any], Path]:
        """Summary, event log and report from what the run left."""
        from rayfm.report.html import write_report

        self.records.start()
        self.records.refresh()
        self.write_events()
        summary = self.records.summary()
        return summary, write_report(self.run_dir)


def run(
    config: PipelineConfig,
    resume: bool = False,
    overwrite: bool = False,
    watch: Callable[[Watch], None] | None = None,
    follow: bool = False,
) -> RunResult:
    """Prepare, train the teachers, label, train the students, evaluate and report.

    Args:
        config: the pipeline's config.
        resume: go on with the run of this name where it was stopped or killed.
        overwrite: remove a run of this name first.
        watch: called several times a second with the state of the parts.
        follow: go on with every period that becomes complete, until SIGTERM or Ctrl-C.

    Raises:
        RayfmError: the first failure of any part, as one line.
    """
    started = time.perf_counter()
    configure(config.logging)
    signals = StopSignals()
    with signals if follow else contextlib.nullcontext():
        pipeline = Pipeline(config, follow=follow, anew=overwrite)
        pipeline.open(resume, overwrite)
        with ray_session(config.ray):
            if follow:
                signals.install()  # starting Ray has taken SIGTERM
            pipeline.run(watch, signals.asked if follow else None)
        summary, report = pipeline.finish()
    return RunResult(pipeline.run_dir, summary, report, time.perf_counter() - started, signals.asked())
