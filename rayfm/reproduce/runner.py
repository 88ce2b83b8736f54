"""Runs studies, each variant once: what an earlier call trained is found by its fingerprint."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rayfm.data.store import write_json_atomic
from rayfm.metrics import Comparison, Entry, MetricState
from rayfm.pipeline.config import PipelineConfig
from rayfm.pipeline.plan import TEACHER_VARIANT
from rayfm.pipeline.session import ray_session
from rayfm.pipeline.stream import Pipeline, Watch
from rayfm.reproduce.scope import Scope
from rayfm.reproduce.study import Study, fingerprint, study_config

DONE = "trained.json"
"""Written into a run's folder when it is complete: what it trained, by fingerprint."""

Started = Callable[[PipelineConfig, int, int], Callable[[Watch], None] | None]
"""Called before each run with its config, its number and their count; returns what watches it."""


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

    def run(self, studies: list[Study], started: Started | None = None) -> float:
        """Train what is missing of the studies, one after another; returns the seconds it took.

        Raises:
            RayfmError: the first failure.
        """
        begin = time.perf_counter()
        left = [part for study in studies if (part := self.missing(study)).students]
        if left:
            ray = max((self._config(study).ray for study in left), key=lambda config: config.cpus or 0.0)
            with ray_session(ray):
                for number, study in enumerate(left, 1):
                    config = self._config(study)
                    watch = started(config, number, len(left)) if started else None
                    self._run(study, config, watch)
        return time.perf_counter() - begin

    def _config(self, study: Study) -> PipelineConfig:
        keys = sorted(fingerprint(study, self.scope, *v) for v in study.variants)
        name = f"{study.name}-{self.scope.source}-{_short(keys)}".replace("/", "-")
        return study_config(study, self.scope, str(self.folder), name)

    def _run(self, study: Study, config: PipelineConfig, watch: Callable[[Watch], None] | None) -> None:
        keys = [fingerprint(study, self.scope, *v) for v in study.variants]
        pipeline = Pipeline(config)
        pipeline.open(resume=True, overwrite=False)  # a run that was broken off goes on
        pipeline.run(watch)
        write_json_atomic(pipeline.run_dir / DONE, {"study": study.name, "fingerprints": keys})
        self._found |= dict.fromkeys(keys, pipeline.run_dir)

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
                periods = self._test_periods(study)
                group = study.students[name].get("group", "students")
                for seed in self.scope.seeds:
                    for period in periods:
                        yield _entry(folder / "trainers" / group / "metrics" / period, name, variant, seed, period)
                for teacher, config in study.teachers.items():
                    for period in periods:
                        at = folder / "trainers" / teacher / "metrics" / period
                        if (teacher, period) in teachers_read or not (at / "rates.json").exists():
                            continue
                        teachers_read.add((teacher, period))
                        yield _entry(at, teacher, TEACHER_VARIANT, int(config.get("seed", 0)), period)

    def _test_periods(self, study: Study) -> tuple[str, ...]:
        schedule = study.schedule
        first, last = schedule.get("first"), schedule.get("last")
        periods = [p for p in self.scope.periods if (first is None or p >= first) and (last is None or p <= last)]
        return tuple(periods[schedule["warmup"] :])


def _entry(folder: Path, model: str, variant: str, seed: int, period: str) -> Entry:
    state = MetricState.load(folder / f"{model}.{variant}.{seed}.npz")
    return Entry(model, variant, seed, period, state, json.loads((folder / "rates.json").read_text()))


def _short(keys: list[str]) -> str:
    return hashlib.sha256(" ".join(keys).encode()).hexdigest()[:10]
