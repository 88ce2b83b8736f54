"""The training loop: one pass in time order over periods; predict a period first, then train on it, then publish.

Runs the same in a Ray Train worker and in a plain process; every rank walks through the same steps.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from rayfm.data.batch import Batch
from rayfm.data.reader import Reader
from rayfm.data.store import ExampleStore, write_json_atomic
from rayfm.export.calibration import Fits
from rayfm.metrics import RateCounter, bootstrap_weights
from rayfm.operations.logs import about, fields
from rayfm.training.agree import agree
from rayfm.training.checkpoint import Checkpoints, CheckpointState, Cursor
from rayfm.training.columns import check_logged, check_requests
from rayfm.training.device import set_up, worker_device
from rayfm.training.divergence import DivergenceError
from rayfm.training.feed import Feed
from rayfm.training.follow import Following, StopRequested, ask_or_stop, unless_stopped
from rayfm.training.ids import Vocabularies
from rayfm.training.learner import Learner
from rayfm.training.ledger import Ledger
from rayfm.training.period import PeriodParts, PeriodRecord
from rayfm.training.precision import warn_of_precision
from rayfm.training.publishing import Publisher
from rayfm.training.ranks import sum_over_ranks
from rayfm.training.reading import Reading, histories
from rayfm.training.schedule import Schedule
from rayfm.training.scoring import PeriodScores
from rayfm.training.spec import Coordinator, LabelSource, PinnedLabels, TrainerSpec
from rayfm.training.stepping import Stepping
from rayfm.training.telemetry import LoopMetrics

log = logging.getLogger(__name__)

AnswerT = TypeVar("AnswerT")

PROGRESS_EVERY_S = 0.5


class TrainingLoop:
    """Walks one trainer through its periods.

    Args:
        spec: what to train.
        coordinator: period tickets; only rank 0 calls it.
        label_source: makes look-ups of labels.
        progress: called by rank 0 now and then with (period, done steps, all steps, phase).
    """

    def __init__(
        self,
        spec: TrainerSpec,
        coordinator: Coordinator,
        label_source: LabelSource | None = None,
        progress: Callable[[str, int, int, str], None] | None = None,
    ) -> None:
        self.spec, self.coordinator, self.label_source, self.progress = spec, coordinator, label_source, progress
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        torch.set_num_threads(spec.training.threads)
        self.device = worker_device(self.rank, spec.training)
        set_up(self.device, spec.training)
        if self.rank == 0:
            warn_of_precision(spec, self.device)
        self.store = ExampleStore(spec.store)
        self.learners = [
            Learner(config, spec.training, spec.schema_, self.device, spec.folder / "plans" / f"{config.key}.json")
            for config in spec.learners
        ]
        self.stepping = Stepping(spec.training, self.learners, self.device)
        tasks = tuple(dict.fromkeys(task for learner in spec.learners for task in learner.tasks))
        self.tasks = tuple((task.name, task.kind) for task in spec.schema_.tasks if task.name in tasks)
        self.rates = RateCounter([name for name, _ in self.tasks])
        self.checkpoints = Checkpoints(spec.folder / "checkpoints", spec.training.keep_checkpoints)
        self.schedule = Schedule(spec.training, self._agree)
        self.ledger = Ledger(spec.folder / "ledger", self.rank) if spec.training.ledger else None
        keep = spec.training.keep_checkpoints + 1
        self.ids = Vocabularies(spec.schema_, spec.features, self.store, spec.folder / "ids", keep)
        self.reading = Reading(self.store, self.ids, label_source, self.rank, self.world)
        self.publisher = Publisher(self.learners, self.reading, self.ids, self._agree)
        self.steps_done = {learner.config.key: 0 for learner in self.learners}
        self.calibration: dict[str, Fits] = {}
        self._last_progress = 0.0
        self.metrics = LoopMetrics(Path(spec.run_dir).name, spec.name)
        self._following = Following(coordinator, self._agree) if spec.follow else None

    def run(self) -> None:
        """Train from the newest checkpoint, or from the start, through the last period, or until asked to stop."""
        try:
            self._walk()
        except StopRequested:
            self.checkpoints.finish()  # the newest checkpoint says where to go on
        finally:
            self.checkpoints.close()
            if self.ledger is not None:
                self.ledger.close()

    def _walk(self) -> None:
        first, state = self._restore()
        under_way = state is not None and state.cursor.period is not None
        if state is not None and not under_way:
            # The checkpoint comes first, so that a crash right after it loses nothing: publish what it holds.
            self._finish(first - 1, state.partial)
        for index in self._places(first):
            try:
                with about(period=self.spec.periods[index]):
                    self._period(index, state if under_way and index == first else None)
            finally:
                self.metrics.flush()
                if self.label_source is not None:
                    self.label_source.release()  # the period's readers are done, or nobody goes on with them

    def _places(self, first: int) -> Iterator[int]:
        """Places of the periods from ``first`` on; where the trainer follows, as long as more come."""
        index = first
        while index < len(self.spec.periods) or self._grow():
            yield index
            index += 1

    def _grow(self) -> bool:
        """Wait for the next period. Returns whether there is one."""
        grown = None if self._following is None else self._following.grown(self.spec)
        self.spec = grown or self.spec
        return grown is not None

    def _stops(self) -> bool:
        """Between two steps: whether to stop here."""
        return self._following is not None and self._following.stops()

    def _period(self, index: int, resumed: CheckpointState | None) -> None:
        """Predict, train, checkpoint, publish one period; or go on with one that ``resumed`` was in the middle of."""
        period = self.spec.periods[index]
        parts, started = PeriodParts(), time.perf_counter()
        self.metrics.begin(lambda: self._seconds(parts))
        with parts.timed("wait"):
            self._agree(lambda: self.coordinator.wait_prepared(period))
        self.store.check_schema(period, self.spec.schema_)
        check_requests(self.store, period, self.spec.learners)
        if self._trains(index):
            check_logged(self.store, period, self.spec.learners)
        if resumed is None and index >= self.spec.first_predicted:
            self._predict(period, parts)
        partial: dict[str, Any] = dict(resumed.partial) if resumed else {}
        if self.rank > 0:
            partial.pop("examples", None)  # the checkpoint's count is of all ranks; rank 0 goes on with it
        cpu_before = time.process_time()
        if self._trains(index):
            examples = self._train(index, resumed.cursor.step if resumed else 0, partial, resumed, parts)
        else:
            examples = 0
        losses = {name: total / weight for name, (total, weight) in partial.get("losses", {}).items() if weight > 0}
        record = {
            "examples": examples,
            "cpu_seconds": time.process_time() - cpu_before,
            "losses": losses,
            "parts": parts.seconds,
            "ids": partial.get("ids", {}),
            "calibration": self.calibration,
        }
        # It stands before the period is published: what was published is never trained again from before.
        self._checkpoint(Cursor(finished=self.spec.periods[: index + 1]), {}, record, parts)
        seconds = {name: round(value, 3) for name, value in parts.seconds.items()}
        said = fields(rank=self.rank, examples=examples, seconds=seconds)
        log.info("rank %d is through %s (%d examples of all ranks)", self.rank, period, examples, extra=said)
        self._finish(index, record, parts, started)

    def _trains(self, index: int) -> bool:
        return self.spec.trained is None or index < self.spec.trained

    def _finish(
        self, index: int, record: dict[str, Any], parts: PeriodParts | None = None, started: float | None = None
    ) -> None:
        """Publish, write the period's record, hand on the ticket. Doing it again changes nothing."""
        parts = parts or PeriodParts()
        period = self.spec.periods[index]
        versions = self._publish(index, parts) if self.spec.publish else {}
        if self.rank == 0:
            seconds = time.perf_counter() - started if started else sum(record["parts"].values())
            whole = PeriodRecord(trainer=self.spec.name, period=period, seconds=seconds, versions=versions, **record)
            write_json_atomic(self.spec.folder / "periods" / f"{period}.json", whole.dump())
            self.coordinator.trained(period, versions)
        self._barrier()

    # -- predict ------------------------------------------------------------------------------------------------

    def _predict(self, period: str, parts: PeriodParts) -> None:
        """Score a period that no learner has trained on, and store the sums of each learner's metrics."""
        scores = PeriodScores(self.spec, self.learners, self.tasks, period, self.rank)
        columns = tuple(dict.fromkeys(c for learner in self.spec.learners for c in learner.reference.values()))
        labels: dict[str, PinnedLabels] = {}
        if histories(self.spec) or any(column.split("/")[0] in self.spec.teachers for column in columns):
            with parts.timed("wait"):
                labels = self._agree(lambda: self.coordinator.wait_labels(period))
        reader = self.reading.prediction(self.spec, period, columns, labels)
        steps = reader.steps(period)
        for step, cpu_batch in enumerate(parts.iterate(reader.batches(period))):
            self._report(period, step, steps, "predict")
            self.metrics.count("predict", len(cpu_batch))
            if self._stops():
                raise StopRequested  # the period is predicted from its start when the run goes on
            copies = bootstrap_weights(cpu_batch.user, self.spec.replicates) if self.spec.replicates else None
            batch = cpu_batch.to(self.device)
            for learner in self.learners:
                with parts.timed("predict"):
                    logits = {task: z.cpu() for task, z in learner.predict(batch).logits.items()}
                with parts.timed("metrics"):
                    scores.add(learner, cpu_batch, logits, copies)
        with parts.timed("metrics"):
            self.calibration |= scores.finish(self.rates.rates(), self.calibration)

    # -- train --------------------------------------------------------------------------------------------------

    def _train(
        self, index: int, start: int, partial: dict[str, Any], resumed: CheckpointState | None, parts: PeriodParts
    ) -> int:
        """Train the period from step ``start``; ``partial`` gathers its sums. Returns the examples of the period."""
        period = self.spec.periods[index]
        if resumed is not None:
            labels = resumed.labels
        else:
            with parts.timed("ids"):
                partial["ids"] = self.ids.learn(period)
                for table, rows in self.ids.replaced.items():
                    for learner in self.learners:
                        learner.reset_rows(table, rows)
            with parts.timed("wait"):
                labels = self._agree(lambda: self.coordinator.wait_labels(period)) if self.spec.teachers else {}
        reader = self._training_reader(index, start, labels)
        steps = reader.steps(period)
        feed = Feed(parts.iterate(reader.batches(period, start)), self.device, self.stepping.ahead)
        partial.setdefault("losses", {})
        partial.setdefault("examples", 0)
        with self.stepping.steppers(feed) as steppers:
            for step, (cpu_batch, batch) in enumerate(feed, start):
                self._report(period, step, steps, "train")
                self.metrics.count("train", len(cpu_batch))
                self._count(cpu_batch, partial)
                for learner, stepper in steppers:
                    try:
                        terms = stepper.train_step(batch, self.steps_done[learner.config.key])
                    except DivergenceError as error:
                        raise DivergenceError(f"{error} (step {step} of {period}; {self._kept()})") from None
                    self._trained(learner, terms, partial)
                if self.ledger is not None:
                    self.ledger.enter(period, step, cpu_batch.example_id.numpy())
                stop = step + 1 < steps and self._stops()
                if stop or (step + 1 < steps and self.schedule.due(step, self.checkpoints.busy)):
                    cursor = Cursor(finished=self.spec.periods[:index], period=period, step=step + 1)
                    wait = stop or not self.spec.training.async_checkpoints
                    self._checkpoint(cursor, labels, partial, parts, wait=wait)
                if stop:
                    raise StopRequested
        for learner in self.learners:
            for part, seconds in vars(learner.clock).items():
                parts.add(part, seconds)
            learner.clock = type(learner.clock)()
        return int(sum_over_ranks(torch.tensor(partial["examples"]), self.device))

    def _seconds(self, parts: PeriodParts) -> dict[str, float]:
        """Seconds of the period under way by part, the learners' own included."""
        seconds = dict(parts.seconds)
        for learner in self.learners:
            for part, value in vars(learner.clock).items():
                seconds[part] = seconds.get(part, 0.0) + value
        return seconds

    def _count(self, batch: Batch, partial: dict[str, Any]) -> None:
        """Count a step's rows."""
        partial["examples"] += len(batch)
        for task, _ in self.tasks:
            # Of all rows with their true labels, whatever a learner sees of them: one unit of `ne_train` for all.
            label, known = batch.label(task)
            self.rates.update(task, label, known, batch.weight)

    def _trained(self, learner: Learner, terms: dict[str, tuple[float, float]], partial: dict[str, Any]) -> None:
        """Count a step that a learner has made."""
        key = learner.config.key
        self.steps_done[key] += 1
        for term, (total, weight) in terms.items():
            sums = partial["losses"].setdefault(f"{key}/{term}", [0.0, 0.0])
            sums[0] += total
            sums[1] += weight

    def _training_reader(self, index: int, start: int, labels: dict[str, PinnedLabels]) -> Reader:
        return self.reading.training(self.spec, index, start, labels)

    # -- publish, checkpoint, report ----------------------------------------------------------------------------

    def _publish(self, index: int, parts: PeriodParts) -> dict[str, str]:
        """Publish every learner as trained through this period. Returns learner -> version."""
        if not self._trains(index):
            assert self.spec.trained is not None
            index = self.spec.trained - 1  # a period that was only predicted leaves the version before it standing
        with parts.timed("publish"):
            return self.publisher.publish(self.spec, self.spec.periods[index], self.steps_done, self.calibration)

    def _restore(self) -> tuple[int, CheckpointState | None]:
        """Index of the period to go on with, and the newest checkpoint."""
        state = self.checkpoints.load(self.learners)
        if self.ledger is not None:
            if self.rank == 0:
                self.ledger.rewind(state.cursor if state else Cursor())
            self._barrier()
        if state is None:
            return 0, None
        if self._following is not None:
            cursor = state.cursor
            self.spec = self._following.caught_up(self.spec, len(cursor.finished) + (cursor.period is not None))
        index = state.cursor.index(self.spec.periods, str(self.checkpoints.root))
        self.ids.restore(self._counted_through(state.cursor, index))
        self.steps_done = dict(state.steps_done)
        fits = state.partial.get("calibration", {})
        self.calibration = {key: {task: (a, b) for task, (a, b) in own.items()} for key, own in fits.items()}
        if self.rank == 0:
            sums = torch.tensor([state.rates[task] for task, _ in self.tasks], dtype=torch.float64)
            self.rates.load_state_dict({"sums": sums})
        log.info("rank %d goes on from its checkpoint, %s", self.rank, state.cursor, extra=fields(rank=self.rank))
        return index, state

    def _counted_through(self, cursor: Cursor, index: int) -> str | None:
        """The last period whose ids were counted before a checkpoint was made."""
        if cursor.period is not None:
            return cursor.period
        trained = index if self.spec.trained is None else min(index, self.spec.trained)
        return self.spec.periods[trained - 1] if trained else None

    def _kept(self) -> str:
        """What a run that stops now leaves to go back to."""
        self.checkpoints.close()
        path = self.checkpoints.latest()
        return f"the newest checkpoint is {path}" if path else "there is no checkpoint yet"

    def _checkpoint(
        self,
        cursor: Cursor,
        labels: dict[str, PinnedLabels],
        partial: dict[str, Any],
        parts: PeriodParts | None = None,
        wait: bool = True,
    ) -> None:
        """Make a checkpoint; ``wait``: it stands on return. What training stands still for is timed."""
        started = time.perf_counter()
        if self.ledger is not None:
            self.ledger.sync()
        sums = sum_over_ranks(self.rates.state_dict()["sums"], self.device)
        # A finished period's record holds the total already; only the count of a period under way is this rank's own.
        own = partial["examples"] if cursor.step or self.rank == 0 else 0
        examples = sum_over_ranks(torch.tensor(own), self.device)
        rates = {task: sums[i].tolist() for i, (task, _) in enumerate(self.tasks)}
        shared = {**partial, "examples": int(examples), "calibration": self.calibration}
        state = CheckpointState(
            cursor=cursor, steps_done=self.steps_done, labels=labels, rates=rates, partial=shared, world=self.world
        )
        self.checkpoints.save(self.learners, state, wait)
        stall = time.perf_counter() - started
        if parts is not None:
            parts.add("checkpoint", stall)
        self.schedule.made(stall)

    def _agree(self, ask: Callable[[], AnswerT]) -> AnswerT:
        """Rank 0 asks; every rank gets the answer, or stops alike."""
        return unless_stopped(agree(lambda: ask_or_stop(ask)))

    def _barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def _report(self, period: str, step: int, steps: int, phase: str) -> None:
        now = time.perf_counter()
        if self.progress is not None and self.rank == 0 and now - self._last_progress > PROGRESS_EVERY_S:
            self._last_progress = now
            self.progress(period, step, steps, phase)
