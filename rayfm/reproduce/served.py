"""What stages are worth end to end: the true value of what the simulator's cascade shows with students in its stages.

Shape letters: R requests of a period, C candidates of a pool, P bootstrap replicates, N rows.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping

import numpy as np
import torch

from rayfm.config import DataError
from rayfm.config.durable import write_whole
from rayfm.metrics import bootstrap_weights
from rayfm.metrics.functions import Array
from rayfm.metrics.intervals import Sample
from rayfm.pipeline.config import PipelineConfig
from rayfm.reproduce.parts import CLICK
from rayfm.reproduce.runner import Runner
from rayfm.reproduce.study import Study, fingerprint, study_config
from rayfm.serving.teacher import LoadedVersion, load_version, score_chunk
from rayfm.simulator.config import SimulatorConfig
from rayfm.simulator.production import single_thread
from rayfm.simulator.replay import Bools, Replay
from rayfm.simulator.simulation import Simulation
from rayfm.simulator.world import Floats
from rayfm.snapshots.load import SnapshotStore

REQUESTS = 2000
"""Requests of a test period that are served again, spread evenly over it."""

PRODUCTION = "production"
"""The cascade as it logged: every stage a production model."""

COPY = "a copy of ranking"
"""In a variant's place: the stage predicts what the production ranking model does, as a student would that has learned
all there is to learn from it."""

Stages = Mapping[str, str]
"""Stage -> variant of the student in its place, or `COPY`. A later stage comes after an earlier one."""


def served_shares(
    runner: Runner, study: Study, students: Mapping[str, str], cascades: Mapping[str, Stages]
) -> dict[str, Sample]:
    """The value of what each cascade shows, as a share of the best possible, over the test periods of a study.

    For every test period the simulator serves the period's requests as it did when it made the log; then each cascade
    serves the same ones, with students that were trained on earlier periods alone. Students score candidates by the
    features that the log would have of them, and by nothing else. What the cascades show is not learned from: the
    period's world, and every later one, is that of the log.

    Args:
        runner: has run the study.
        study: publishes its students; on the simulator.
        students: stage -> its student.
        cascades: name -> which students stand in for which stages (``retrieval``, ``early``, or both); the student of
            ``early`` is asked for what any retrieval stage passes on, the production model's included.

    Returns:
        Cascade -> the share per student seed (one for those without students: copies, and `PRODUCTION`, which is
        always there), with replicates by user, paired over all cascades.
    """
    config = study_config(study, runner.scope, "", "x")
    wanted: dict[str, Stages] = {PRODUCTION: {}, **cascades}
    keys = [fingerprint(study, runner.scope, students[stage], variant) for stage, variant in _models(wanted)]
    text = json.dumps([keys, {name: dict(stages) for name, stages in wanted.items()}, dict(students), REQUESTS])
    path = runner.folder / "served" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        sums = _measure(runner, study, config, students, wanted)
        write_whole(path, lambda file: np.savez(file, allow_pickle=False, **sums))
    try:
        with np.load(path, allow_pickle=False) as file:
            best = file["best"]
            return {name: Sample(file[name][:, 0] / best[0], file[name][:, 1:] / best[1:]) for name in wanted}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot read what was measured ({error}); delete it and try again") from None


def _models(cascades: Mapping[str, Stages]) -> list[tuple[str, str]]:
    """(stage, variant) of every student that is needed."""
    return sorted({place for stages in cascades.values() for place in stages.items() if place[1] != COPY})


def _seeds(stages: Stages, seeds: tuple[int, ...]) -> tuple[int, ...]:
    """The student seeds that a cascade is served with; 0 where it has no student."""
    return seeds if set(stages.values()) - {COPY} else (0,)


def _measure(
    runner: Runner, study: Study, config: PipelineConfig, students: Mapping[str, str], cascades: Mapping[str, Stages]
) -> dict[str, Array]:
    """Sums over all test periods: cascade -> ``[seeds, 1 + P]``, ``best`` -> ``[1 + P]``; the first one as it is."""
    source, seeds, tested = config.data.source, runner.scope.seeds, runner.test_periods(study)
    assert isinstance(source, SimulatorConfig), "tables that ask for a truth refuse other sources"
    sums: dict[str, Array] = {
        name: np.zeros((len(_seeds(stages, seeds)), 1 + runner.scope.replicates)) for name, stages in cascades.items()
    }
    best = np.zeros(1 + runner.scope.replicates)
    for period, replay in _replays(source, runner.scope.periods, tested):
        copies = bootstrap_weights(torch.from_numpy(replay.user), runner.scope.replicates).double().numpy()
        weights = np.concatenate([np.ones((len(copies), 1)), copies], axis=1)
        best += replay.best @ weights
        folders = {
            (stage, variant, seed): runner.published(study, students[stage], variant, seed, period)
            for stage, variant in _models(cascades)
            for seed in seeds
        }
        models = {
            place: load_version(SnapshotStore(folder), key, version)
            for place, (folder, key, version) in folders.items()
        }
        grids = _grids(replay, config, models)
        copy = replay.predicted("ranking")
        for name, stages in cascades.items():
            for position, seed in enumerate(_seeds(stages, seeds)):
                stand_ins = {stage: copy if v == COPY else grids[stage, v, seed] for stage, v in stages.items()}
                sums[name][position] += replay.served(stand_ins) @ weights
    return {**sums, "best": best}


def _replays(
    source: SimulatorConfig, periods: tuple[str, ...], tested: tuple[str, ...]
) -> Iterator[tuple[str, Replay]]:
    """The test periods as they are served, each before anything is learned from it."""
    simulation = Simulation(source)
    last = periods.index(tested[-1])
    requests = np.unique(np.linspace(0, source.requests_per_period - 1, REQUESTS).astype(np.int64))
    while simulation.number < last:
        record = simulation.serve()
        if record.number >= 0 and periods[record.number] in tested:
            yield periods[record.number], Replay(simulation, record, requests)
        simulation.learn(record)


_Place = tuple[str, str, int]
"""Stage, variant, seed."""


def _grids(replay: Replay, config: PipelineConfig, models: Mapping[_Place, LoadedVersion]) -> dict[_Place, Floats]:
    """What each model predicts of each candidate ``[R, C]``; of ``early`` NaN for what no retrieval model passes on."""
    retrieval = {place: model for place, model in models.items() if place[0] == "retrieval"}
    grids = _scored(replay, config, retrieval, np.ones(replay.pool.shape, np.bool_))
    early = {place: model for place, model in models.items() if place[0] == "early"}
    # A cascade may have the production model as retrieval and a student as early stage.
    reached = replay.passed(replay.record.outcome.grid(0)[replay.requests])
    for click in grids.values():
        reached |= replay.passed(click)
    return {**grids, **_scored(replay, config, early, reached)}


def _scored(
    replay: Replay, config: PipelineConfig, models: Mapping[_Place, LoadedVersion], wanted: Bools
) -> dict[_Place, Floats]:
    """What models that read the same features predict where ``wanted``; NaN elsewhere."""
    if not models:
        return {}
    encoder = next(iter(models.values())).encoder
    table = replay.rows(config.schema_, encoder.columns, wanted)
    none = np.zeros((table.num_rows, 0), np.float32)
    chunk = encoder.encode(table, np.zeros(table.num_rows, np.int64), none, none.astype(np.bool_))
    grids = {}
    with single_thread(0):
        for place, model in models.items():
            if model.encoder.columns != encoder.columns:
                raise ValueError(f"{place}: models of one stage read the same features")
            grid = np.full(replay.pool.shape, np.nan, np.float32)
            grid[wanted] = score_chunk(model, chunk)[CLICK].to_numpy()
            grids[place] = grid
    return grids
