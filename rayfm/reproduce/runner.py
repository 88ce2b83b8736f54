"""Runs studies, each variant once: what an earlier call trained is found by its fingerprint.

A study is one Ray task: small data is trained faster than a worker group starts, and a machine has as many studies
under way as it has cores.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rayfm.config import RayfmError, errors
from rayfm.data.lock import alone
from rayfm.data.store import write_json_atomic
from rayfm.metrics import Comparison, Entry, MetricState
from rayfm.pipeline.config import PipelineConfig
from rayfm.pipeline.here import run_here
from rayfm.pipeline.plan import TEACHER_VARIANT
from rayfm.pipeline.select import select, select_folder
from rayfm.pipeline.session import ray_session
from rayfm.pipeline.stream import Pipeline
from rayfm.reproduce.scope import Scope
from rayfm.reproduce.study import Study, fingerprint, study_config
from rayfm.selection.result import FILE
from rayfm.training.period import PeriodRecord

DONE = "trained.json"
"""Written into a run's folder when it is complete: what it trained, by fingerprint."""

LOCK = ".reproduce.lock"

POLL_S = 0.5


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a study is."""

    study: str
    models: int
    """Teachers, and students in all variants and seeds."""
    done: float
    """Periods of all its trainers that are done, fractions included."""
    total: int


Watch = Callable[[list[Progress]], None]
"""Called twice a second while studies run."""


class Runner:
    """Trains what studies need and reads what they left.

    Args:
        scope: the source.
        folder: where data and runs lie.
    """

    def __init__(self, scope: Scope, folder: str | Path) -> None:
        self.scope, self.folder = scope, Path(folder).absolute()
        self._found: dict[str, Path] = {}
        for path in sorted((self.folder / "runs").glob(f"*/{DONE}")):
            for key in json.loads(path.read_text())["fingerprints"]:
                self._found[key] = path.parent

    def missing(self, study: Study) -> Study:
        """The part of a study that no run has trained."""
        return study.only(v for v in study.variants if fingerprint(study, self.scope, *v) not in self._found)

    def run(self, studies: list[Study], watch: Watch | None = None) -> float:
        """Train what is missing of the studies; returns the seconds it took.

        Raises:
            DataError: another process trains in the same folder.
            RayfmError: the first failure; the studies that are under way then are ended.
        """
        begin = time.perf_counter()
        left = [part for study in studies if (part := self.missing(study)).students]
        if left:
            configs = [self._config(study) for study in left]
            self.folder.mkdir(parents=True, exist_ok=True)
            # Two would train the same runs in the same folders.
            with alone(self.folder / LOCK, "reproducing tables here", "--folder"), ray_session(configs[0].ray):
                self._run(left, configs, watch)
        return time.perf_counter() - begin

    def select(self, config: PipelineConfig, session: contextlib.ExitStack) -> tuple[dict[str, tuple[str, ...]], float]:
        """(way -> features, seconds) of a pipeline's ``select`` section, run in this process unless it was before.

        Args:
            config: the pipeline.
            session: is entered into a Ray where one is needed, for what is run after it to use.

        Raises:
            DataError: another process trains in the same folder.
            RayfmError: as `rayfm.pipeline.select.select`.
        """
        if (select_folder(config) / FILE).exists():
            return select(config, resume=True, here=True).selection.lists, 0.0
        self.folder.mkdir(parents=True, exist_ok=True)
        with alone(self.folder / LOCK, "reproducing tables here", "--folder"):
            session.enter_context(ray_session(config.ray))
            found = select(config, resume=True, here=True)
        return found.selection.lists, found.seconds

    def _run(self, studies: list[Study], configs: list[PipelineConfig], watch: Watch | None) -> None:
        import ray

        pipelines = [Pipeline(config) for config in configs]
        for pipeline in {pipeline.config.storage: pipeline for pipeline in pipelines}.values():
            pipeline.prepare()
        # The longest first, so that the last one to end is a short one.
        order = sorted(range(len(studies)), key=lambda i: -_size(pipelines[i]))
        task = ray.remote(_study_task).options(num_cpus=1, max_retries=2)
        running = {task.remote(configs[i].dump()): i for i in order}
        try:
            while running:
                done, _ = ray.wait(list(running), timeout=POLL_S)
                for reference in done:
                    number = running.pop(reference)
                    failure = ray.get(reference)
                    if failure is not None:
                        kind, text = failure
                        raise getattr(errors, kind, RayfmError)(f"study {studies[number].name}: {text}")
                    self._keep(studies[number], configs[number])
                if watch is not None:
                    watch([_progress(s, p) for s, p in zip(studies, pipelines, strict=True)])
        finally:
            for reference in running:
                ray.cancel(reference, force=True)

    def _keep(self, study: Study, config: PipelineConfig) -> None:
        keys = [fingerprint(study, self.scope, *v) for v in study.variants]
        write_json_atomic(config.run_dir / DONE, {"study": study.name, "fingerprints": keys})
        self._found |= dict.fromkeys(keys, config.run_dir)
        # What only a resumption reads, and most of a run's size: gigabytes where a study has many students.
        for checkpoints in config.run_dir.glob("trainers/*/checkpoints"):
            shutil.rmtree(checkpoints)

    def _config(self, study: Study) -> PipelineConfig:
        keys = sorted(fingerprint(study, self.scope, *v) for v in study.variants)
        digest = hashlib.sha256(" ".join(keys).encode()).hexdigest()[:10]
        return study_config(study, self.scope, str(self.folder), f"{study.name}-{self.scope.source}-{digest}")

    # -- what they left -----------------------------------------------------------------------------------------

    def comparison(self, studies: list[Study], *students: str) -> Comparison:
        """The students' variants, and the teachers beside them, over the test periods of all the studies."""
        return Comparison(self._entries(studies, students))

    def _entries(self, studies: list[Study], students: tuple[str, ...]) -> Iterator[Entry]:
        teachers_read: set[tuple[str, str]] = set()
        for study in studies:
            for name, variant in study.variants:
                if name not in students:
                    continue
                folder = self._found[fingerprint(study, self.scope, name, variant)]
                periods = self.test_periods(study)
                group = study.students[name].get("group", "students")
                for seed in study.seeds or self.scope.seeds:
                    for period in periods:
                        yield _entry(folder / "trainers" / group / "metrics" / period, name, variant, seed, period)
                for teacher, config in study.teachers.items():
                    for period in periods:
                        at = folder / "trainers" / teacher / "metrics" / period
                        if (teacher, period) in teachers_read or not (at / "rates.json").exists():
                            continue
                        teachers_read.add((teacher, period))
                        yield _entry(at, teacher, TEACHER_VARIANT, int(config.get("seed", 0)), period)

    def over_worlds(self, studies: list[Study], *students: str) -> Comparison:
        """As `comparison`, of equal studies in several worlds: a world stands in a seed's place, so that the intervals
        are over users and worlds. Each study has one seed."""
        entries = [
            dataclasses.replace(entry, seed=number)
            for number, study in enumerate(studies)
            for entry in self._entries([study], students)
        ]
        return Comparison(entries)

    def records(self, study: Study, student: str, variant: str) -> list[PeriodRecord]:
        """What the trainer of a variant says of each period: of all the variants that it trained together."""
        folder = self._found[fingerprint(study, self.scope, student, variant)]
        group = study.students[student].get("group", "students")
        paths = sorted((folder / "trainers" / group / "periods").glob("*.json"))
        return [PeriodRecord.model_validate_json(path.read_text()) for path in paths]

    def periods(self, study: Study) -> tuple[str, ...]:
        """The periods of a study."""
        first, last = study.schedule.get("first"), study.schedule.get("last")
        return tuple(p for p in self.scope.periods if (first is None or p >= first) and (last is None or p <= last))

    def test_periods(self, study: Study) -> tuple[str, ...]:
        """Those of them that are tested on."""
        return self.periods(study)[study.schedule["warmup"] :]

    def published(self, study: Study, student: str, variant: str, seed: int, period: str) -> tuple[Path, str, str]:
        """Where the student's newest snapshot before ``period`` is: (run's folder, model's key, version).

        The study publishes, has the student from its first period, and has been run; ``period`` is not its first.
        """
        folder = self._found[fingerprint(study, self.scope, student, variant)]
        periods = self.periods(study)
        before, group = periods[periods.index(period) - 1], study.students[student].get("group", "students")
        record = json.loads((folder / "trainers" / group / "periods" / f"{before}.json").read_text())
        key = f"{student}.{variant}.{seed}"
        return folder, key, record["versions"][key]


def _entry(folder: Path, model: str, variant: str, seed: int, period: str) -> Entry:
    state = MetricState.load(folder / f"{model}.{variant}.{seed}.npz")
    return Entry(model, variant, seed, period, state, json.loads((folder / "rates.json").read_text()))


def _study_task(config: dict[str, Any]) -> tuple[str, str] | None:
    """Run one study in a Ray task; what went wrong comes back as (type, message), since Ray keeps neither."""
    try:
        run_here(PipelineConfig.model_validate(config), check_exports=False)
    except RayfmError as error:
        return type(error).__name__, str(error)
    return None


def _size(pipeline: Pipeline) -> int:
    return sum(len(spec.periods) * len(spec.learners) for spec in pipeline.specs)


def _progress(study: Study, pipeline: Pipeline) -> Progress:
    trained = pipeline.watch().trained
    models = sum(len(spec.learners) for spec in pipeline.specs)
    done = sum(trained[spec.name][0] * len(spec.learners) for spec in pipeline.specs)
    return Progress(study.name, models, done, _size(pipeline))
