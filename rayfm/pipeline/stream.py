"""The main job: teacher and students walk through the periods side by side, labels between them.

One driver, a thread per part: each trainer's ``fit``, each teacher's label jobs, the preparation. They meet only in
the period tickets, so any of them can die and be started again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import yaml

from rayfm.config import ConfigError, DataError, RayfmError, SnapshotError, read_yaml, write_yaml
from rayfm.data.prepare import missing_periods
from rayfm.data.prepare import prepare as prepare_source
from rayfm.data.sources.base import SOURCES, Source
from rayfm.data.store import ExampleStore
from rayfm.labels.config import run_storage
from rayfm.labels.history import HistoryStore
from rayfm.labels.store import LabelStore
from rayfm.pipeline.capacity import check_capacity
from rayfm.pipeline.config import PipelineConfig
from rayfm.pipeline.follow import (
    POLL_S,
    Arrival,
    Follower,
    FollowingTickets,
    Lag,
    Stream,
    complete_periods,
    lag,
    lag_event,
    open_source,
)
from rayfm.pipeline.plan import (
    choose_periods,
    group_labels,
    histories,
    periods_to_label,
    student_specs,
    teacher_key,
    teacher_spec,
)
from rayfm.pipeline.records import RunRecords
from rayfm.pipeline.session import cluster_resources, own_cpus, ray_session
from rayfm.pipeline.stop import StopSignals
from rayfm.pipeline.tickets import Tickets, TrainerTickets, check_order, metadata_path
from rayfm.serving.application import start_teacher, stop_teacher
from rayfm.serving.labelling import StoredLabels, history_spec, label_period
from rayfm.serving.nearline.labels import NearLineLabels
from rayfm.serving.teacher import TeacherServiceConfig
from rayfm.snapshots.collect import Collector
from rayfm.snapshots.keeper import LeaseKeeper
from rayfm.snapshots.load import SnapshotStore
from rayfm.snapshots.metadata import SQLiteMetadataStore, open_metadata
from rayfm.training.follow import StopRequested
from rayfm.training.period import PeriodRecord
from rayfm.training.progress import progress_file
from rayfm.training.spec import TrainerSpec
from rayfm.training.trainer import fit

log = logging.getLogger(__name__)

LEASE_S = 120.0
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


@dataclasses.dataclass
class Watch:
    """What a display shows of a run under way; read from files and tickets, so it can be late but not wrong."""

    pipeline: Pipeline
    prepared: int
    labelled: dict[str, tuple[int, int]]
    """Teacher -> (periods labelled, periods to label)."""
    trained: dict[str, tuple[float, str]]
    """Trainer -> (periods done, fraction included; what it is doing)."""
    lag: dict[str, Lag] = dataclasses.field(default_factory=dict)
    """Of a run that follows, trainer -> how far it is behind."""


class Pipeline:
    """A run's parts: its stores, its trainers' specs, its tickets.

    Args:
        config: the pipeline's config.
        follow: take periods up as they become complete; without it, those that are there (of a run that has followed,
            those that it took, and what came later).
        anew: forget the periods of a run of this name.

    Raises:
        ConfigError: the schedule does not fit the periods.
        DataError: the source cannot be read, or the run's folder not be written.
    """

    def __init__(self, config: PipelineConfig, follow: bool = False, anew: bool = False) -> None:
        # Workers run in folders of their own: a path relative to this one would mean another place there.
        storage, runs = (str(Path(folder).absolute()) for folder in (config.storage, config.runs))
        place = None if config.label_store is None else config.label_store.absolute()
        config = config.model_copy(update={"storage": storage, "runs": runs, "label_store": place})
        self.config, self.follow = config, follow
        self.source = SOURCES.build(config.data.source, config.schema_)
        self.run_dir = config.run_dir
        self.store = ExampleStore(config.storage)
        self.arrivals: list[Arrival] = []
        self.periods = self._find_periods(anew)
        check_order(self.periods)
        _make_folder(self.run_dir)
        self.metadata = SQLiteMetadataStore(metadata_path(self.run_dir))
        self.tickets = Tickets(self.metadata, config.name)
        self.stream = Stream(self.tickets)
        self.labels = LabelStore(config.label_storage, self.metadata)
        self.snapshots = SnapshotStore(self.run_dir)
        # Where services follow `current`: what is current, held or kept is known there alone.
        url = config.endpoints.metadata
        followed = self.metadata if url is None else open_metadata(url)
        self.collector = Collector(self.snapshots, followed, keep=config.keep_snapshots)
        self.teacher_specs = [teacher_spec(config, name, self.periods) for name in config.teacher_order()]
        self.student_specs = student_specs(config, self.periods)
        if follow:
            for specs in (self.teacher_specs, self.student_specs):
                specs[:] = [spec.model_copy(update={"follow": True}) for spec in specs]
        self.specs: list[TrainerSpec] = [*self.teacher_specs, *self.student_specs]
        self.records = RunRecords(config, self.specs, self.tickets, self.periods)
        self._done: dict[str, int] = {}
        self._labelled: dict[str, int] = {}

    def _find_periods(self, anew: bool) -> tuple[str, ...]:
        """The periods as far as they are known; those of a stream are in ``arrivals`` too."""
        standing = metadata_path(self.run_dir)
        if not anew and standing.exists():  # opening it would make it
            self.arrivals = Stream(Tickets(SQLiteMetadataStore(standing), self.config.name)).arrivals()
        if not self.follow and not self.arrivals:
            return choose_periods(self.config, [period.name for period in self.source.periods()])
        taken = [arrival.period for arrival in self.arrivals]
        for arrival in complete_periods(self.config, self.store, open_source(self.config), taken):
            if not taken or arrival.period > taken[-1]:
                self.arrivals.append(dataclasses.replace(arrival, at=time.time()))
        return choose_periods(self.config, [arrival.period for arrival in self.arrivals], open_end=True)

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
        self.tickets.check()

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
            replicas=serving.replicas,
            cpus=serving.cpus,
            gpus=serving.gpus,
            http_port=serving.http_port,
            members=serving.members,
            member_cpus=serving.member_cpus,
            member_gpus=serving.member_gpus,
            row_wise_from=serving.row_wise_from,
        )

    def label(
        self, teacher: str, handle: Any, periods: tuple[str, ...] | None = None, timeout: float | None = None
    ) -> None:
        """Label periods in order, each with the snapshot trained through the period before it.

        Args:
            teacher: the teacher.
            handle: its service.
            periods: which; all but the first by default.
            timeout: seconds to wait for the snapshot that a period needs; by default as long as it takes.

        Raises:
            LabelError: the snapshot did not come, or the label store refuses; or there are no near-line labels such as
                the config states.
        """
        key = teacher_key(self.config, teacher)
        near_line, posted = self.config.teachers[teacher].near_line, NearLineLabels(self.run_dir)
        if near_line is not None:  # what is stated wrongly is said before anybody waits for a snapshot
            posted.pin(teacher, self.periods[0], near_line.table_version)
        for index, period in self._walk():
            wanted = periods_to_label(self.config, self.periods, teacher) if self.follow else periods
            if index == 0 or (wanted is not None and period not in wanted):
                continue
            if self.tickets.get("labelled", teacher, period) is not None:
                continue
            before = self.periods[index - 1]
            trained = self.tickets.wait("trained", teacher, before, timeout)
            if trained is None:
                raise DataError(
                    f"teacher {teacher}: no snapshot is trained through {before}, which labels of {period} need; "
                    "run `rayfm train` for it first"
                )
            self._wait_prepared(period, timeout)
            self._histories(teacher, index)
            version = str(trained["versions"][key])
            with contextlib.closing(LeaseKeeper(self.collector.metadata, LEASE_S)) as keeper:
                keeper.keep(self.collector.hold(key, version, f"label {period}", LEASE_S))
                ticket = label_period(
                    self.labels,
                    self.snapshots,
                    self.store,
                    teacher,
                    key,
                    version,
                    period,
                    self.config.tasks_of(self.config.teachers[teacher]),
                    handle,
                    considerations=self.config.teachers[teacher].label_considerations,
                    rows_per_request=self.config.serving.rows_per_request,
                    store_representation=self.config.teachers[teacher].store_representation,
                )
            if near_line is not None:
                # In the ticket, so that all students read one version, whatever is labelled near-line meanwhile.
                ticket["near_line"] = posted.pin(teacher, period, near_line.table_version)
            self.tickets.put("labelled", teacher, period, ticket)

    def _walk(self) -> Iterator[tuple[int, str]]:
        """The periods with their places; where the run follows, also those that come while it does."""
        place = 0
        while True:
            ended = not self.follow or self.stream.ended()  # asked first, so that what came last is not overlooked
            if place < len(self.periods):
                yield place, self.periods[place]
                place += 1
            elif ended:
                return
            else:
                self.tickets.check()
                self.tickets.check_stop()
                time.sleep(POLL_S)

    def _histories(self, teacher: str, index: int) -> None:
        """Before a period is labelled: what its students may know of the labels of the periods before it."""
        before = self.tickets.get("labelled", teacher, self.periods[index - 1])
        earlier = None
        if before is not None:
            earlier = self.periods[index - 1], str(before["version"]), int(before["table_version"])
        for history in histories(self.config):
            if history.teacher == teacher:
                HistoryStore(self.labels.storage, self.metadata).advance(
                    history_spec(history),
                    self.store,
                    self.periods[index],
                    earlier,
                )

    def _wait_prepared(self, period: str, timeout: float | None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while period not in self.store.periods():
            self.tickets.check()
            self.tickets.check_stop()
            if deadline is not None and time.monotonic() > deadline:
                self.store.manifest(period)
            time.sleep(0.1)

    def watch(self) -> Watch:
        """How far the parts are."""
        prepared = set(self.store.periods())
        trained, behinds = {}, self.lags()
        for spec in self.specs:
            periods, done = spec.periods, self._finished(spec)
            text, fraction = "", 0.0
            report = progress_file(spec).read()
            if report is not None and done < len(periods) and report["period"] == periods[done]:
                share = report["step"] / max(1, report["steps"])
                fraction = 0.2 * share if report["phase"] == "predict" else 0.2 + 0.8 * share
                text = f"{report['phase']} {report['period']}"
            elif done < len(periods):
                text = f"waiting for {periods[done]}" if done or report else "starting"
            behind = behinds.get(spec.name)
            if behind is not None and behind.periods:
                text += f"; {behind}"
            trained[spec.name] = (done + fraction, text)
        labelled = {}
        for teacher in self.config.teachers:
            wanted = periods_to_label(self.config, self.periods, teacher)
            count = self._labelled.get(teacher, 0)  # in order, so that what was counted stays so
            while count < len(wanted) and self.tickets.get("labelled", teacher, wanted[count]) is not None:
                count += 1
            self._labelled[teacher] = count
            labelled[teacher] = (count, len(wanted))
        return Watch(self, sum(period in prepared for period in self.periods), labelled, trained, behinds)

    def _finished(self, spec: TrainerSpec) -> int:
        """How many of its periods a trainer has finished; it does so in order."""
        done = self._done.get(spec.name, 0)
        while done < len(spec.periods) and (spec.folder / "periods" / f"{spec.periods[done]}.json").exists():
            done += 1
        self._done[spec.name] = done
        return done

    def _places(self) -> dict[str, int]:
        """Trainer -> how many of the run's periods are behind it, those before its first included."""
        return {spec.name: len(self.periods) - len(spec.periods) + self._finished(spec) for spec in self.specs}

    def lags(self) -> dict[str, Lag]:
        """Trainer -> how far it is behind the newest complete period; empty for a run that never followed."""
        if not self.arrivals:
            return {}
        newest = self.stream.newest() or self.arrivals[-1]
        return {name: lag(name, done, self.arrivals, newest) for name, done in self._places().items()}

    # -- the whole ----------------------------------------------------------------------------------------------

    def open(self, resume: bool, overwrite: bool) -> None:
        """Make the run's folder, or take up the one that stands.

        Raises:
            ConfigError: it stands and neither ``resume`` nor ``overwrite`` is asked for, or it is another config's; or
                labels of a run whose folder is elsewhere stand where this one's would lie.
            DataError: it cannot be written.
            LabelError: the label store cannot.
        """
        saved = self.run_dir / "config.yaml"
        if overwrite:
            self._clear(saved)
        elif saved.exists() and not resume:
            raise ConfigError(
                f"{self.run_dir} holds a run; --resume goes on with it, --overwrite starts anew, --set name=NAME "
                "makes another"
            )
        elif saved.exists():
            self._same_config(saved)
        elif self.config.label_store is not None and self.labels.storage.stands():
            # They would be taken for this run's: versions of equal names hold other weights.
            raise ConfigError(
                f"{self.labels.root} holds labels of a run whose folder is not {self.run_dir}; --overwrite deletes "
                "them, --set name=NAME makes another run"
            )
        if self.config.label_store is not None:
            self.labels.storage.check_access()
        _make_folder(self.run_dir)
        _make_folder(self.store.root)
        write_yaml(self.config, saved)
        self.tickets.clear_failure()
        self.tickets.clear_stop()
        if self.follow:
            self.stream.go_on()
            for place in range(len(self.stream.arrivals()), len(self.arrivals)):
                self.stream.append(place, self.arrivals[place])

    def _clear(self, saved: Path) -> None:
        """Remove the run of this name, wherever it kept its labels."""
        before = read_yaml(saved).get("label_store") if saved.exists() else None
        kept = [run_storage(self.run_dir, self.config.name, before), self.labels.storage]
        # Labels first: what is left of a run that is broken off here has its config, and is not taken for a new one.
        for storage in kept:
            if storage.root != str(self.run_dir):
                storage.clear()
        if saved.exists():
            # Versions of the new run may bear the names of this one's: a tombstone of then is not for them.
            for model in self.snapshots.models():
                self.collector.forget(model)
            self.collector.metadata.close()
            self.metadata.close()
            shutil.rmtree(self.run_dir)

    def _same_config(self, saved: Path) -> None:
        before, now = yaml.safe_load(saved.read_text()), self.config.dump()
        for config in (before, now):
            for key in ("ray", "runs", "storage", "tune", "select", "follow"):
                config.pop(key, None)
            # It counts for the periods that are labelled from now on; tickets hold what counts for the others.
            for teacher in (config.get("teachers") or {}).values():
                teacher.pop("near_line", None)
            # Where the labels lie belongs to the run; how they are reached does not.
            config["label_store"] = (config.get("label_store") or {}).get("root")
        key = ".".join(_first_difference(before, now))
        if key:
            raise ConfigError(
                f"{saved}: {key!r} differs from the config given; resume with the run's own config, or --overwrite"
            )

    def _follow(self) -> None:
        """Take periods into the stream as they become complete, and prepare them, until the run is to stop."""
        Follower(
            self.config, self.stream, self.store, self._bring, lambda: min(self._places().values()), self._take
        ).run()

    def _take(self, arrival: Arrival) -> None:
        """A period more, for whoever walks through them here; workers read it from the stream."""
        self.specs = [spec.model_copy(update={"periods": (*spec.periods, arrival.period)}) for spec in self.specs]
        self.arrivals = [*self.arrivals, arrival]
        self.periods = (*self.periods, arrival.period)
        self.records.specs, self.records.periods = self.specs, self.periods

    def run(self, watch: Callable[[Watch], None] | None = None, stop: Callable[[], bool] | None = None) -> None:
        """Run all parts to their end. Ray must be running.

        Args:
            watch: called several times a second with the state of the parts.
            stop: asked as often; once it says so, a run that follows stops where it can be gone on with.

        Raises:
            RayfmError: the first failure of any part.
        """
        check_capacity(self.config, *cluster_resources())
        # Before anything is started: is what the store holds ours?
        if not self.follow or self.config.follow.prepare:
            missing_periods(self.source, self.config.schema_, self.store, self.config.data.lanes)
        self.records.start()
        shown: dict[str, Lag] = {}
        written = 0.0
        parts: dict[Future[Any], str] = {}
        with ThreadPoolExecutor(max_workers=2 + 2 * len(self.specs)) as pool:

            def start(name: str, work: Callable[..., Any], *arguments: Any) -> None:
                parts[pool.submit(work, *arguments)] = name

            start("prepare", self._follow if self.follow else self.prepare)
            for spec in self.specs:
                start(spec.name, self.train, spec)
            for spec in self.specs:
                for teacher in spec.teachers:
                    if f"labels of {teacher}" not in parts.values():
                        wanted = periods_to_label(self.config, self.periods, teacher)
                        start(f"labels of {teacher}", self.serve_and_label, teacher, wanted)
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
                if behinds != shown and time.monotonic() - written >= WRITE_EVERY_S:
                    self.write_events()
                    shown, written = behinds, time.monotonic()
                if watch is not None:
                    watch(self.watch())
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


def _make_folder(path: Path) -> None:
    """Raises DataError where the folder is neither there nor can be made, or cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}; choose other 'runs' and 'storage'") from None


def _first_difference(one: Any, other: Any) -> list[str]:
    """Keys that lead to the first value that differs; empty where none does."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys()):
            if key not in one or key not in other:
                return [key]
            if one[key] != other[key]:
                return [key, *_first_difference(one[key], other[key])]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for position, (left, right) in enumerate(zip(one, other, strict=True)):
            if left != right:
                return [str(position), *_first_difference(left, right)]
    return []


def cpu_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
