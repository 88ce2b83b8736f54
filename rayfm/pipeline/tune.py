"""`rayfm tune`: a search over config keys on Ray Tune, scored on the warm-up periods, never on a test period.

Ray Tune runs the trials, ASHA (Li et al. 2020, "A system for massively parallel hyperparameter tuning") stops those
that fall behind from period to period, Optuna suggests what to try. Nothing that Ray Tune keeps is needed to resume:
each trial's file is, and a resumed search tells Ray Tune of all of them again, which trains none twice.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from rayfm.config import CapacityError, ConfigError, LabelError, RayfmError, nearest, set_key, validate
from rayfm.data.cluster import cluster_resources
from rayfm.data.prepare import missing_periods
from rayfm.pipeline.config import PipelineConfig, load_config
from rayfm.pipeline.plan import group_labels
from rayfm.pipeline.session import ray_session
from rayfm.pipeline.stream import Pipeline
from rayfm.pipeline.take_up import take_up, write_down
from rayfm.pipeline.tickets import TrainerTickets
from rayfm.pipeline.trial import (
    Target,
    TrialRecord,
    TrialSettings,
    choose_target,
    decode,
    read_records,
    run_trial,
    trial_spec,
    warmup_periods,
    with_values,
)
from rayfm.pipeline.tune_config import Space, TuneConfig
from rayfm.training.spec import PinnedLabels, TrainerSpec

ROOTS = ("students", "teachers", "groups", "schema", "consideration_share")
"""Keys of the config that shape what a trial trains."""

Watch = Callable[[list[TrialRecord]], None]
"""Called with all trials whenever one ends that had not ended before."""


@dataclasses.dataclass
class TuneResult:
    """What a search leaves."""

    target: Target
    periods: tuple[str, ...]
    """The periods that were scored."""
    trials: list[TrialRecord]
    """Best first; then those that were stopped, by their last score; then those that failed."""
    best: Path
    """A YAML file with the best values, for ``rayfm run CONFIG --set @FILE``."""


def tune(
    config: PipelineConfig, resume: bool = False, overwrite: bool = False, watch: Watch | None = None
) -> TuneResult:
    """Search as the config's ``tune`` section says.

    Args:
        config: the pipeline's config.
        resume: go on with a search that was stopped; ``tune.trials`` may have grown.
        overwrite: forget an earlier search for the same model first.
        watch: told of the trials whenever one ends.

    Raises:
        ConfigError: something to search that does not exist or makes no difference, or an earlier search stands.
        LabelError: the variant needs labels that no run of this name has stored.
        RayfmError: every trial failed, with the first one's reason.
    """
    study = Study(config)
    study.open(resume, overwrite)
    records = read_records(study.trials)
    if study.unfinished(records):
        with ray_session(config.ray):
            study.prepare()
            study.search(records, watch)
    return study.result()


def load_search(
    path: str | Path,
    parameters: list[str] | None = None,
    options: dict[str, Any] | None = None,
    overrides: list[str] | None = None,
    data: str | None = None,
) -> PipelineConfig:
    """A pipeline's YAML file as `load_config` reads it, with the ``tune`` section changed.

    Args:
        path, overrides, data: as of `load_config`.
        parameters: ``KEY=SPACE`` each; where there are any, they take the place of the section's own.
        options: other keys of the section.

    Raises:
        ConfigError: with every complaint.
    """
    config = load_config(path, overrides, data)
    section: dict[str, Any] = (config.tune.dump() if config.tune is not None else {}) | (options or {})
    if parameters:
        section["parameters"] = {}
        for text in parameters:
            key, separator, space = text.partition("=")
            if not separator or not key.strip():
                raise ConfigError(f"--param {text!r}: write it as KEY=SPACE, e.g. consideration_share=uniform(0, 1)")
            section["parameters"][key.strip()] = space.strip()
    return validate(PipelineConfig, config.dump() | {"tune": section}, str(path))


class Study:
    """One search: its folder is ``<runs>/<name>.tune/<model>.<variant>``.

    Args:
        config: the pipeline's config, with a ``tune`` section.
    """

    def __init__(self, config: PipelineConfig) -> None:
        if config.tune is None or not config.tune.parameters:
            raise ConfigError(
                "nothing to tune: add --param KEY=SPACE, e.g. --param 'groups.students.dense.lr=loguniform(1e-4, 1e-2)'"
                ", or a 'tune' section with 'parameters'"
            )
        self.tune: TuneConfig = config.tune
        self.target = choose_target(config)
        self.spaces = self.tune.spaces()
        self.pipeline = Pipeline(config)
        self.config = self.pipeline.config  # its folders are absolute
        self.periods = warmup_periods(config, self.target, self.pipeline.periods)
        self.folder = Path(self.config.runs) / f"{config.name}.tune" / self.target.name
        self.trials = self.folder / "trials"
        self.spec = self._spec(self.config)
        check_parameters(self.config, self.spaces, self._spec)

    def _spec(self, config: PipelineConfig) -> TrainerSpec:
        return trial_spec(config, self.target, self.periods, self.trials / "trial")

    # -- its folder ---------------------------------------------------------------------------------------------

    def open(self, resume: bool, overwrite: bool) -> None:
        """Make the folder, or take up the one that stands.

        Raises:
            ConfigError: it stands and neither ``resume`` nor ``overwrite`` is asked for, or it is another search's.
        """
        saved, mine = self.folder / "search.yaml", self._described()
        hint = "the same config and options (only --trials and --concurrent may change)"
        take_up(saved, mine, "search", hint, resume=resume, overwrite=overwrite)
        self.trials.mkdir(parents=True, exist_ok=True)
        write_down(saved, mine)

    def _described(self) -> dict[str, Any]:
        """What must not change when a search resumes."""
        config = self.config.dump()
        kept = self.tune.dump()
        for key in ("trials", "concurrent"):
            del kept[key]
        return {
            "target": self.target.dump(),
            "tune": kept,
            "periods": list(self.periods),
            **{key: config[key] for key in ("seeds", "data", *ROOTS)},
        }

    # -- the search ---------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Bring what is missing of the warm-up periods into the example store, which every trial reads."""
        missing = missing_periods(
            self.pipeline.source, self.config.schema_, self.pipeline.store, self.config.data.lanes
        )
        if {period.name for period in missing} & set(self.periods):
            self.pipeline.prepare()

    def labels(self) -> dict[str, dict[str, PinnedLabels]]:
        """Period -> teacher -> the labels that trials train with: those that a run of this name has stored.

        Raises:
            LabelError: there are none.
        """
        if not self.spec.teachers:
            return {}
        student = self.config.students.get(self.target.model)
        asked = (
            self.config.teachers[self.target.model].labels
            if student is None
            else group_labels(self.config, student.group)
        )
        tickets = TrainerTickets(
            self.pipeline.tickets,
            "tune",
            self.pipeline.store,
            self.pipeline.periods,
            teachers=self.spec.teachers,
            labels=asked.model_copy(update={"wait": 0.0, "on_missing": "fail"}),
        )
        try:
            return {period: tickets.wait_labels(period) for period in self.periods}
        except LabelError as error:
            raise LabelError(
                f"variant {self.target.variant!r} learns from labels, and trials train no teacher: {error}"
            ) from None

    def combinations(self) -> list[dict[str, Any]] | None:
        """Every combination of the choices, as Ray Tune would draw it; None where they are more than the trials."""
        if any(space.kind != "choice" for space in self.spaces.values()):
            return None
        if math.prod(len(space.arguments) for space in self.spaces.values()) > self.tune.trials:
            return None
        positions = itertools.product(*(range(len(space.arguments)) for space in self.spaces.values()))
        return [{f"p{i}": position for i, position in enumerate(chosen)} for chosen in positions]

    def unfinished(self, records: list[TrialRecord]) -> bool:
        """Whether there is something left to train."""
        every = self.combinations()
        wanted = self.tune.trials if every is None else len(every)
        return sum(record.data["ended"] is not None for record in records) < wanted

    def search(self, records: list[TrialRecord], watch: Watch | None = None) -> None:
        """Run trials until there are as many as asked for. Ray must be running.

        Raises:
            ConfigError: Optuna is not installed.
            CapacityError: not even one trial fits.
        """
        settings = TrialSettings(
            config=self.config.dump(),
            target=self.target,
            periods=self.periods,
            folder=str(self.trials),
            labels=self.labels(),
        )
        at_once = self._at_once(*cluster_resources(self.config.ray.largest))
        points = [record.data["sampled"] for record in records]
        every = self.combinations()
        if every is not None:
            points += [point for point in every if point not in points]
        algorithm = self._algorithm(points, len(records))
        os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}  # no files, no words
        from ray import tune as ray_tune
        from ray.tune.schedulers import ASHAScheduler

        source = self.pipeline.label_source("tune")
        spaces = self.spaces

        def trial(sampled: dict[str, Any]) -> None:
            def report(number: int, score: float) -> None:
                ray_tune.report({"score": score, "scored": number})

            run_trial(settings, decode(spaces, sampled), report, source, sampled)

        scored = len(settings.scored)
        tuner = ray_tune.Tuner(
            ray_tune.with_resources(trial, self._resources()),
            param_space={f"p{i}": space.domain() for i, space in enumerate(spaces.values())},
            tune_config=ray_tune.TuneConfig(
                metric="score",
                mode=self.target.mode,
                num_samples=self.tune.trials if every is None else len(every),
                max_concurrent_trials=at_once,
                search_alg=algorithm,
                scheduler=ASHAScheduler(
                    time_attr="scored",
                    max_t=scored,
                    grace_period=min(self.tune.grace, scored),
                    reduction_factor=self.tune.reduction,
                ),
                reuse_actors=True,  # importing torch again for each trial would take longer than many a trial
            ),
            run_config=ray_tune.RunConfig(
                name="ray_tune",
                storage_path=str(self.folder),
                verbose=0,
                failure_config=ray_tune.FailureConfig(max_failures=1),
                callbacks=[_callback(self.trials, spaces, scored, watch)],
            ),
        )
        shutil.rmtree(self.folder / "ray_tune", ignore_errors=True)
        tuner.fit()

    def _training(self) -> Any:
        """The training section of the target: what a worker of it asks for."""
        if self.target.model in self.config.teachers:
            return self.config.teachers[self.target.model].training
        return self.config.groups[self.config.students[self.target.model].group]

    def _resources(self) -> dict[str, float]:
        training = self._training()
        gpus = {"gpu": training.gpus_per_worker} if training.gpus_per_worker else {}
        return {"cpu": training.cpus_per_worker, **gpus}

    def _at_once(self, cpus: float, gpus: float) -> int:
        """How many trials run side by side."""
        wanted = self._resources()
        fits = min(int((have + 1e-9) / wanted[unit]) for unit, have in (("cpu", cpus), ("gpu", gpus)) if unit in wanted)
        if fits < 1:
            asked = ", ".join(f"{amount:g} {unit.upper()}s" for unit, amount in wanted.items())
            raise CapacityError(
                f"a trial needs {asked} and Ray has {cpus:g} CPUs, {gpus:g} GPUs; lower cpus_per_worker or "
                "gpus_per_worker, or join a larger cluster (ray.address)"
            )
        return min(fits, self.tune.concurrent or fits)

    def _algorithm(self, points: list[dict[str, Any]], standing: int) -> Any:
        """Optuna, which suggests ``points`` first.

        Args:
            points: what to try first: trials that stand, to be told of, and what is chosen beforehand.
            standing: how many of them stand.
        """
        try:
            import optuna
        except ImportError:
            raise ConfigError("a search needs Optuna; pip install 'rayfm[tune]'") from None
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        # Another seed once trials stand: the same one would draw them again.
        seed = self.tune.seed + 1000 * standing
        sampler = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}[self.tune.search]
        return OptunaSearch(points_to_evaluate=points or None, sampler=sampler(seed=seed))

    # -- what it found ------------------------------------------------------------------------------------------

    def result(self) -> TuneResult:
        """The trials, best first, and the best one's values in a file.

        Raises:
            RayfmError: no trial was scored on all periods.
        """
        records = ranked(read_records(self.trials), self.target)
        complete = [record for record in records if record.data["ended"] == "complete"]
        if not complete:
            reasons = [record.data["error"] for record in records if record.data["error"]]
            raise RayfmError(
                f"no trial of {len(records)} was scored on every period"
                + (f"; the first failed with: {reasons[0]}" if reasons else "; go on with --resume")
            )
        best = self.folder / "best.yaml"
        score = list(complete[0].scores.values())[-1]
        best.write_text(
            f"# {self.target.metric} {score:.6f} of {self.target.name}, task {self.target.task}, "
            f"on {self.periods[self.tune.score_from]} .. {self.periods[-1]}\n"
            + yaml.safe_dump(best_overrides(self.config, complete[0].values), sort_keys=False)
        )
        return TuneResult(self.target, self.periods[self.tune.score_from :], records, best)


def check_parameters(
    config: PipelineConfig, spaces: dict[str, Space], spec_of: Callable[[PipelineConfig], TrainerSpec]
) -> None:
    """Refuse a key that does not exist, a value that it cannot have, and a key that changes nothing of a trial.

    Args:
        config: the pipeline's config.
        spaces: key -> its space.
        spec_of: what a trial of a config trains.

    Raises:
        ConfigError: naming the key, and the nearest one.
    """
    names: dict[str, Any] = {"students": config.students, "teachers": config.teachers, "groups": config.groups}
    for key, space in spaces.items():
        root, *rest = key.split(".")
        if root not in ROOTS:
            known = root in PipelineConfig.model_fields or root == "schema"
            why = (
                "does not shape what a trial trains" if known else f"is no key of a config{nearest(root, list(ROOTS))}"
            )
            raise ConfigError(f"tune.parameters: {root!r} {why}; tune keys of {', '.join(ROOTS)}")
        if root in names and (not rest or rest[0] not in names[root]):
            given = rest[0] if rest else ""
            raise ConfigError(f"tune.parameters: {key}: no {root[:-1]} {given!r}{nearest(given, list(names[root]))}")
        specs = [spec_of(with_values(config, {key: example})) for example in space.examples()]
        if all(spec == specs[0] for spec in specs[1:]):
            raise ConfigError(
                f"tune.parameters: {key} changes nothing of what is trained and scored; tune a key of the model, of "
                "its variant's objectives or of its training"
            )


def ranked(records: list[TrialRecord], target: Target) -> list[TrialRecord]:
    """Best first among those scored on every period; then by how far the others came, and their score there."""
    sign = 1.0 if target.mode == "min" else -1.0

    def order(record: TrialRecord) -> tuple[bool, int, float]:
        scores = list(record.scores.values())
        return record.data["ended"] != "complete", -len(scores), sign * scores[-1] if scores else 0.0

    return sorted(records, key=order)


def best_overrides(config: PipelineConfig, values: dict[str, Any]) -> dict[str, Any]:
    """The values as a nested mapping to lay over the config's file; a list that one of them stands in comes whole."""
    whole = config.dump()
    for key, value in values.items():
        set_key(whole, key, value, key)
    found: dict[str, Any] = {}
    for key in values:
        here: Any = whole
        path: list[str] = []
        for part in key.split("."):
            if isinstance(here, list):
                break
            path.append(part)
            here = here[part]
        set_key(found, ".".join(path), here, key)
    return found


def _callback(folder: Path, spaces: dict[str, Space], scored: int, watch: Watch | None) -> Any:
    """Ray Tune's callback that says in a trial's file how it ended."""
    from ray import tune as ray_tune

    class Ended(ray_tune.Callback):
        def __init__(self, watch: Watch | None) -> None:
            self.watch = watch
            self.told = {record.folder for record in read_records(folder) if record.data["ended"] is not None}

        def __getstate__(self) -> dict[str, Any]:
            return {}  # Ray Tune stores its callbacks, and whoever watches may hold a terminal

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            record = TrialRecord(folder, decode(spaces, trial.config))
            if record.path.exists():
                record.end("complete" if len(record.scores) == scored else "stopped")
            if self.watch is not None and record.folder not in self.told:
                self.told.add(record.folder)
                self.watch(read_records(folder))

    return Ended(watch)
