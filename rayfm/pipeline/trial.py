"""One trial of a search: a model trained over the warm-up periods in this process, scored on each before it trains.

A trial never opens a test period: its trainer is not told of them. What it found out stands in files, so that a search
that was stopped is gone on with from them.

::

    <study>/trials/<hash of the values>/trial.json      values, scores by period, how it ended
                                        lock            held by the process that trains it
                                        trainers/...    as in a run: metric sums, the newest checkpoint
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rayfm.config import Config, ConfigError, DataError, RayfmError, nearest, set_key, validate
from rayfm.data.store import ExampleStore, write_json_atomic
from rayfm.metrics import LOWER_IS_BETTER, MetricState
from rayfm.metrics.pool import Pool
from rayfm.pipeline.config import PipelineConfig
from rayfm.pipeline.plan import TEACHER_VARIANT, student_specs, teacher_spec
from rayfm.pipeline.tune_config import Space
from rayfm.schema import KINDS
from rayfm.training.loop import TrainingLoop
from rayfm.training.spec import LabelSource, PinnedLabels, TrainerSpec
from rayfm.training.trainer import single_process_group

Report = Callable[[int, float], None]
"""Called with how many periods are scored and the score over all of them."""


class Target(Config):
    """What a search makes better."""

    model: str
    variant: str
    task: str
    metric: str

    @property
    def name(self) -> str:
        """Name of the search's folder."""
        return f"{self.model}.{self.variant}"

    @property
    def mode(self) -> str:
        """``min`` or ``max``, as Ray Tune wants it."""
        return "min" if self.metric in LOWER_IS_BETTER else "max"


def choose_target(config: PipelineConfig) -> Target:
    """The model that the config's ``tune`` section names, with its defaults.

    Raises:
        ConfigError: no such model, variant or task, or the metric is not of the task's kind.
    """
    tune = config.tune
    assert tune is not None
    names = [*config.students, *config.teachers]
    model = tune.model or (names[0] if len(names) == 1 else None)
    if model is None:
        raise ConfigError(f"tune.model: which of {', '.join(names)}? Name it (--model)")
    if model not in names:
        raise ConfigError(f"tune.model: unknown model {model!r}{nearest(model, names)}")
    student = config.students.get(model)
    if student is None:
        variant = tune.variant or TEACHER_VARIANT
        known = [TEACHER_VARIANT]
    else:
        known = list(student.variants)
        default = config.evaluation.reference_variant
        variant = tune.variant or (default if default in known else known[0])
    if variant not in known:
        raise ConfigError(f"tune.variant: {model} has no variant {variant!r}{nearest(variant, known)}")
    tasks = list(config.tasks_of(student or config.teachers[model]))
    task = tune.task or tasks[0]
    if task not in tasks:
        raise ConfigError(f"tune.task: {model} has no task {task!r}{nearest(task, tasks)}")
    if config.schema_.task(task).kind == "regression" and tune.metric != "rmse":
        raise ConfigError(f"tune.metric: {tune.metric} is for binary tasks and {task!r} is a regression; take rmse")
    return Target(model=model, variant=variant, task=task, metric=tune.metric)


def warmup_periods(config: PipelineConfig, target: Target, periods: tuple[str, ...]) -> tuple[str, ...]:
    """The periods before the first test period that the target sees.

    Raises:
        ConfigError: they leave none to score.
    """
    tune, schedule = config.tune, config.schedule
    assert tune is not None
    start = schedule.students_from if target.model in config.students else None
    seen = tuple(period for period in periods[: schedule.warmup] if start is None or period >= start)
    if len(seen) <= tune.score_from:
        late = "" if start is None else f" from students_from {start} on"
        raise ConfigError(
            f"schedule.warmup {schedule.warmup} leaves no period to score before the test periods: a search trains on "
            f"the first {tune.score_from} and scores the rest of the warm-up{late}; raise schedule.warmup by "
            f"{tune.score_from + 1 - len(seen)} or more"
        )
    return seen


def with_values(config: PipelineConfig, values: dict[str, Any]) -> PipelineConfig:
    """The config with other values at dotted keys.

    Raises:
        ConfigError: a key that does not exist, or a value that it cannot have.
    """
    mapping = config.dump()
    for key, value in values.items():
        set_key(mapping, key, value, f"tune.parameters: {key}")
    said = ", ".join(f"{key}={json.dumps(value)}" for key, value in values.items())
    return validate(PipelineConfig, mapping, f"tune.parameters ({said})")


def trial_spec(config: PipelineConfig, target: Target, periods: tuple[str, ...], folder: Path) -> TrainerSpec:
    """What a trial trains: the target's models alone (one a seed), in one process.

    The batches do not depend on the reader or on the number of workers, so neither does what is found.

    Args:
        config: with the trial's values.
        target: what is tuned.
        periods: the warm-up periods that the target sees; the last is scored and not trained on.
        folder: the trial's folder.
    """
    tune = config.tune
    assert tune is not None

    def inside(bound: str | None) -> str | None:
        return bound if bound in periods else None

    schedule = config.schedule.model_copy(
        update={
            "students_from": None,
            "students_through": inside(config.schedule.students_through),
            "teachers_through": inside(config.schedule.teachers_through),
        }
    )
    evaluation = config.evaluation.model_copy(update={"replicates": 0, "consideration_share": 0.0})
    common: dict[str, Any] = {
        "evaluation": evaluation, "schedule": schedule, "runs": str(folder.parent), "name": folder.name,
    }  # fmt: skip
    if target.model in config.teachers:
        teacher = config.teachers[target.model]
        teacher = teacher.model_copy(update={"through": inside(teacher.through), "reference": {}})
        changed = config.model_copy(update={**common, "teachers": {**config.teachers, target.model: teacher}})
        spec = teacher_spec(changed, target.model, periods)
    else:
        student = config.students[target.model]
        alone = student.model_copy(
            update={"variants": {target.variant: student.variants[target.variant]}, "reference": {}}
        )
        (spec,) = student_specs(config.model_copy(update={**common, "students": {target.model: alone}}), periods)
    training = spec.training.model_copy(
        update={"workers": 1, "cpus_per_worker": 1.0, "reader": "arrow", "keep_checkpoints": 1, "max_failures": 0}
    )
    return spec.model_copy(update={"training": training, "first_predicted": tune.score_from})


class TrialRecord:
    """A trial's file.

    Args:
        folder: the study's folder of trials.
        values: config key -> value.
    """

    def __init__(self, folder: Path, values: dict[str, Any]) -> None:
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
        self.folder, self.values = folder / digest, values
        self.data: dict[str, Any] = {"values": values, "sampled": {}, "scores": {}, "started": 0.0, "seconds": 0.0}
        self.data |= {"ended": None, "error": None}
        self.reread()

    @property
    def path(self) -> Path:
        return self.folder / "trial.json"

    @property
    def scores(self) -> dict[str, float]:
        """Scored period -> score over all periods so far."""
        found: dict[str, float] = self.data["scores"]
        return found

    def reread(self) -> None:
        """Take in what another process wrote."""
        if self.path.exists():
            self.data |= json.loads(self.path.read_text())

    def write(self, **changes: Any) -> None:
        """Change the file, whole or not at all."""
        self.data |= changes
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json_atomic(self.path, self.data)

    def end(self, how: str, error: str | None = None) -> None:
        """Say how it ended (``complete``, ``stopped``, ``failed``): it is never trained again. Drops its checkpoint."""
        if self.data["ended"] is None:
            self.write(ended=how, error=error, seconds=self.data["seconds"] + time.time() - self.data["started"])
            for path in self.folder.glob("trainers/*/checkpoints"):
                shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One process at a time: a search may suggest the same values twice. Ends with the process that holds it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def read_records(folder: Path) -> list[TrialRecord]:
    """The trials that stand, in the order in which they were started."""
    found = [json.loads(path.read_text()) for path in folder.glob("*/trial.json")]
    return [TrialRecord(folder, data["values"]) for data in sorted(found, key=lambda data: data["first_started"])]


class TrialSettings(Config):
    """What every trial of a search shares."""

    config: dict[str, Any]
    """The pipeline's config as its YAML file."""
    target: Target
    periods: tuple[str, ...]
    """The warm-up periods that the target sees."""
    folder: str
    """The study's folder of trials."""
    labels: dict[str, dict[str, PinnedLabels]] = {}
    """Period -> teacher -> the labels that the base run stored."""

    @property
    def scored(self) -> tuple[str, ...]:
        """The periods that count."""
        return self.periods[int(self.config["tune"]["score_from"]) :]


class _Scored(Exception):
    """Every period is scored: what a trial would train on from here, nobody looks at."""


class _Loop(TrainingLoop):
    """A training loop that says when a period is scored, and publishes nothing."""

    def __init__(self, spec: TrainerSpec, coordinator: Any, labels: LabelSource | None, scored: Callable[[str], None]):
        super().__init__(spec, coordinator, labels)
        self._scored = scored

    def _predict(self, period: str, *rest: Any) -> None:
        super()._predict(period, *rest)
        self._scored(period)

    def _publish(self, *_: Any) -> dict[str, str]:
        return {}


class _Coordinator:
    """A coordinator that waits for nothing: periods and labels stood before the search began."""

    def __init__(self, store: ExampleStore, labels: dict[str, dict[str, PinnedLabels]]) -> None:
        self.store, self.labels = store, labels

    def wait_prepared(self, period: str) -> None:
        self.store.manifest(period)

    def wait_labels(self, period: str) -> dict[str, PinnedLabels]:
        return self.labels.get(period, {})

    def trained(self, period: str, versions: dict[str, str]) -> None:
        pass

    def stopped(self) -> bool:
        return False

    def failed(self, message: str) -> None:
        raise RayfmError(message)


def pooled_score(spec: TrainerSpec, target: Target, periods: tuple[str, ...]) -> float:
    """The target's metric on the impressions of ``periods``, from pooled sums; the mean over the seeds.

    Raises:
        DataError: it is undefined there.
    """
    kind = spec.schema_.task(target.task).kind
    values = []
    for learner in spec.learners:
        pool = Pool(kind)
        for period in periods:
            folder = spec.folder / "metrics" / period
            state = MetricState.load(folder / f"{learner.key}.npz")
            rates = json.loads((folder / "rates.json").read_text())
            pool.add(period, state.cell(KINDS.index("impression"), target.task), rates.get(target.task, math.nan))
        values.append(pool.points()[target.metric])
    score = sum(values) / len(values)
    if not math.isfinite(score):
        raise DataError(
            f"{target.metric} of {target.task} on {', '.join(periods)} is {score}: labels of one class, or predictions "
            "that are not finite; choose another task or metric, or score later periods (tune.score_from)"
        )
    return score


def run_trial(
    settings: TrialSettings,
    values: dict[str, Any],
    report: Report,
    label_source: LabelSource | None = None,
    sampled: dict[str, Any] | None = None,
) -> TrialRecord:
    """Train and score one trial, or say again what a trial with these values found.

    A trial that had ended is not trained again; one that was cut short goes on from its checkpoint. A failure that is
    the values' own (a model that cannot be built, a loss that diverges) ends the trial and not the search.

    Args:
        settings: what all trials share.
        values: config key -> value.
        report: told the score after each period; it may not return, where the scheduler stops the trial.
        label_source: makes look-ups of the teachers' labels.
        sampled: what the search drew, to be suggested again when it resumes.
    """
    record = TrialRecord(Path(settings.folder), values)
    with record.lock():
        record.reread()
        if not record.path.exists():
            record.write(sampled=sampled or {}, first_started=time.time())
        for number, score in enumerate(record.scores.values(), 1):
            report(number, score)
        if record.data["ended"] is None:
            record.write(started=time.time())
            try:
                _train(settings, record, report, label_source)
                record.end("complete")
            except RayfmError as error:
                record.end("failed", str(error).splitlines()[0])
    return record


def _train(settings: TrialSettings, record: TrialRecord, report: Report, label_source: LabelSource | None) -> None:
    config = with_values(PipelineConfig.model_validate(settings.config), record.values)
    spec = trial_spec(config, settings.target, settings.periods, record.folder)

    def scored(period: str) -> None:
        if period not in record.scores:
            upto = settings.scored[: settings.scored.index(period) + 1]
            score = pooled_score(spec, settings.target, upto)
            record.write(scores=record.scores | {period: score})
            report(len(record.scores), score)
        if period == settings.scored[-1]:
            raise _Scored

    if settings.scored[-1] in record.scores:
        return
    coordinator = _Coordinator(ExampleStore(spec.store), settings.labels)
    with single_process_group(), contextlib.suppress(_Scored):
        _Loop(spec, coordinator, label_source, scored).run()


def decode(spaces: dict[str, Space], sampled: dict[str, Any]) -> dict[str, Any]:
    """Config key -> value for what the search drew, which is named by position (``p0``, ``p1``, ...)."""
    return {key: space.value(sampled[f"p{i}"]) for i, (key, space) in enumerate(spaces.items())}
