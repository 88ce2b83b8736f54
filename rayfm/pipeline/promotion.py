"""The guard of a run: which published versions may become current by themselves (`promotion` of the config).

A version is judged on the period after the last one that it was trained on, beside the newest version that was
promoted before it. Students' versions are judged as soon as that period is prepared, in a thread of the driver's for
each trainer; a teacher's version is judged on the period that it is about to label, before it does.

The decision lies beside the version, so a run that was killed finds what was decided and decides the rest; and it
stands as a ticket, so that the report knows of versions that are gone.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any

from rayfm.config import LabelError, RayfmError
from rayfm.data.steps import RepresentationLookup
from rayfm.data.store import ExampleStore
from rayfm.labels.history import HistoryLookup, HistorySpec
from rayfm.labels.storage import Storage
from rayfm.operations.metrics import PROMOTED, REFUSED, REFUSED_NOW
from rayfm.pipeline.label_jobs import wait_prepared, walk
from rayfm.pipeline.plan import periods_to_label, teacher_key
from rayfm.pipeline.state import RunState
from rayfm.serving.labelling import history_spec
from rayfm.serving.validation import Guarded
from rayfm.snapshots.promotion import Promotion
from rayfm.training.follow import StopRequested
from rayfm.training.learner import LearnerConfig
from rayfm.training.spec import TrainerSpec

log = logging.getLogger(__name__)

TICKET = "promotion"


@dataclasses.dataclass(frozen=True)
class Histories:
    """Look-ups of the histories that a model reads; travels to the task that scores.

    Args:
        storage: the label store's.
        specs: the histories.
        examples: root of the example store.
    """

    storage: Storage
    specs: tuple[HistorySpec, ...]
    examples: str

    def __call__(self, period: str) -> tuple[RepresentationLookup, ...]:
        found: list[RepresentationLookup] = []
        for spec in self.specs:
            try:
                found.append(HistoryLookup(self.storage, spec, ExampleStore(self.examples), period))
            except LabelError:  # its teacher has labelled nothing yet: nobody has a history
                continue
        return tuple(found)


class Guard:
    """Decides on a run's versions.

    Args:
        run: the run.
        here: score in this process, without Ray.
    """

    def __init__(self, run: RunState, here: bool = False) -> None:
        self.run, self.here, self.config = run, here, run.config.promotion

    def specs(self) -> list[TrainerSpec]:
        """The trainers whose versions are guarded."""
        return [spec for spec in self.run.specs if spec.guarded]

    def watch(self, spec: TrainerSpec, wait: bool = True) -> None:
        """Decide on a trainer's versions in order, as they come.

        Args:
            spec: the trainer.
            wait: for versions and periods that are not there yet, until the run ends; else decide what can be decided.

        Raises:
            RayfmError: some part of the run failed, or a period cannot be read.
        """
        try:
            self._watch(spec, None if wait else 0.0)
        except StopRequested:
            log.info("promotion of %s: stopped between two decisions", spec.name)

    def _watch(self, spec: TrainerSpec, timeout: float | None) -> None:
        by_label_jobs: tuple[str, ...] = ()
        before: str | None = None
        for _, period in walk(self.run):
            if period < spec.periods[0]:
                continue
            if spec.role == "teacher":
                by_label_jobs = periods_to_label(self.run.config, self.run.periods, spec.name)
            if before is not None and period not in by_label_jobs:
                versions = self._trained(spec, before, timeout)
                if versions is None:
                    return
                self._decide(spec, versions, period, timeout)
            if before is None:
                versions = self._trained(spec, period, timeout)
                if versions is None:
                    return
                self._decide(spec, versions, None, timeout)
            before = period

    def _trained(self, spec: TrainerSpec, period: str, timeout: float | None) -> dict[str, str] | None:
        found = self.run.tickets.wait("trained", spec.name, period, timeout)
        return None if found is None else dict(found["versions"])

    def _decide(self, spec: TrainerSpec, versions: dict[str, str], period: str | None, timeout: float | None) -> None:
        """Decide on versions of a trainer; ``period`` None: on those alone that there is nothing to compare with."""
        learners = {learner.key: learner for learner in spec.learners}
        waiting = [key for key, version in versions.items() if not self._settled(key, version)]
        if not waiting:
            return
        if period is not None:
            if timeout is not None and period not in self.run.store.periods():
                return
            wait_prepared(self.run, period, None)
            for history in {h.teacher for key in waiting for h in learners[key].model.histories}:
                if self.run.tickets.wait("labelled", history, period, timeout) is None:
                    return
        for key in waiting:
            self._compare(learners[key], versions[key], period)

    def _settled(self, key: str, version: str) -> bool:
        """Whether nothing is left to decide of a version; a decision that was made and not noted is noted."""
        if self.run.tickets.get(TICKET, key, version) is not None:
            return True
        if version not in self.run.snapshots.versions(key) or not self.run.snapshots.guarded(key, version):
            return True
        standing = self.run.snapshots.promotion(key, version)
        if standing is not None:
            self._note(key, version, standing)
        return standing is not None

    def _guarded(self, learner: LearnerConfig) -> Guarded:
        assert self.config is not None
        return Guarded(
            str(self.run.run_dir), str(self.run.store.root), learner.key, self.config, tuple(learner.traffics)
        )

    def _compare(self, learner: LearnerConfig, version: str, period: str | None) -> None:
        guarded = self._guarded(learner)
        if not guarded.predecessors(version):
            promotion, new = guarded.first(version)
        elif period is None:
            return  # there is a version before it: the next period will tell
        else:
            specs = tuple(history_spec(history) for history in learner.model.histories)
            histories = Histories(self.run.labels.storage, specs, str(self.run.store.root))
            promotion, new = self._call(functools.partial(guarded.compare, version, period, histories))
        if new:
            self._tell(learner.key, version, promotion)
        self._note(learner.key, version, promotion)

    def _call(self, work: functools.partial[tuple[Promotion, bool]]) -> tuple[Promotion, bool]:
        """``work`` in a task of its own, or in this process."""
        if self.here:
            return work()
        import ray

        assert self.config is not None
        options: dict[str, Any] = {"num_cpus": self.config.cpus}
        if self.run.config.ray.nodes.data:
            options["label_selector"] = self.run.config.ray.nodes.data
        try:
            found: tuple[Promotion, bool] = ray.get(ray.remote(**options)(_run).remote(work))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, RayfmError):
                raise error.cause from None
            raise
        return found

    def _tell(self, key: str, version: str, promotion: Promotion) -> None:
        metric, run = PROMOTED if promotion.promoted else REFUSED, self.run.config.name
        metric.add(1, run=run, model=key)
        if promotion.promoted:
            log.info("%s@%s is promoted: %s", key, version, promotion.reason)
        else:
            log.warning(
                "%s@%s is not promoted; %s stays: on %s %s",
                key,
                version,
                promotion.predecessor,
                promotion.period,
                promotion.reason,
            )

    def _note(self, key: str, version: str, promotion: Promotion) -> None:
        self.run.tickets.put(TICKET, key, version, promotion.dump())
        REFUSED_NOW.set(float(not promotion.promoted), run=self.run.config.name, model=key)

    def teacher_version(self, teacher: str, version: str, period: str) -> str:
        """The version of a teacher that labels a period: ``version``, or where the guard refuses it, the newest
        promoted one before it.
        """
        spec = next(spec for spec in self.run.teacher_specs if spec.name == teacher)
        key = teacher_key(self.run.config, teacher)
        if not spec.guarded:
            return version
        if not self._settled(key, version):
            self._compare(spec.learners[0], version, period)
        if not self.run.snapshots.withheld(key, version):
            return version
        older = self._guarded(spec.learners[0]).predecessors(version)
        return older[0] if older else version


def _run(work: functools.partial[Any]) -> Any:
    return work()
