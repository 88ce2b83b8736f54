"""The value of what cascades with students show: which snapshots, which rows, which sums."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from rayfm.config import DataError
from rayfm.reproduce import served as module
from rayfm.reproduce.parts import student
from rayfm.reproduce.runner import DONE, Runner
from rayfm.reproduce.scope import Scope, open_scope
from rayfm.reproduce.served import COPY, PRODUCTION, served_shares
from rayfm.reproduce.splits import progressive
from rayfm.reproduce.study import Study, fingerprint

STUDENTS = {"retrieval": "retrieval_stage", "early": "early_stage"}
CASCADES = {
    "neither": {"retrieval": "none", "early": "none"},
    "both": {"retrieval": "good", "early": "good"},
    "first": {"retrieval": "good"},
    "copied": {"retrieval": COPY, "early": COPY},
}


@pytest.fixture
def scope() -> Scope:
    quick = open_scope("simulator", quick=True)
    source = quick.base["data"]["source"] | {"requests_per_period": 120, "candidates": 60, "periods": 5}
    base = quick.base | {"data": quick.base["data"] | {"source": source}}
    return dataclasses.replace(quick, base=base, periods=quick.periods[:5], seeds=(1, 2))


def study(scope: Scope) -> Study:
    variants = {"none": [], "good": [{"type": "cross_stage", "next_stage": "logged/early"}]}
    models = zip(STUDENTS.values(), ("two_tower", "fm"), strict=True)
    students = {name: student(scope, type_, variants) for name, type_ in models}
    return Study("stages", progressive(scope), students=students, publish=True)


def trained(scope: Scope, folder: Path, wanted: Study) -> Runner:
    """A runner that finds the study, with the records that its trainers leave."""
    run = folder / "runs" / "r"
    keys = [fingerprint(wanted, scope, *v) for v in wanted.variants]
    (run / "trainers" / "students" / "periods").mkdir(parents=True)
    (run / DONE).write_text(json.dumps({"study": "stages", "fingerprints": keys}))
    for period in scope.periods:
        versions = {f"{name}.{v}.{seed}": f"{period}-x" for name, v in wanted.variants for seed in scope.seeds}
        path = run / "trainers" / "students" / "periods" / f"{period}.json"
        path.write_text(json.dumps({"versions": versions}))
    return Runner(scope, folder)


def test_the_share_of_cascades_by_hand(scope: Scope, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = study(scope)
    runner = trained(scope, tmp_path, wanted)
    asked: list[tuple[str, str]] = []
    replays, produced, copied = [], [], []

    def grids(replay, config, models):
        """A student that knows the truth, one that knows nothing; the second seed knows nothing either."""
        replays.append(replay)
        produced.append(replay.served({}).sum())
        truth = replay.value / replay.record.observation.ad_columns["ad_bid"][replay.pool]
        monkeypatch.setattr(replay, "predicted", {"ranking": truth}.__getitem__)
        copied.append(replay.served({"retrieval": truth, "early": truth}).sum())
        noise = np.random.default_rng(0).random(replay.pool.shape, np.float32)
        return {(stage, v, seed): truth if v == "good" and seed == 1 else noise for stage, v, seed in models}

    monkeypatch.setattr(module, "load_version", lambda store, key, version: asked.append((key, version)))
    monkeypatch.setattr(module, "_grids", grids)
    shares = served_shares(runner, wanted, STUDENTS, CASCADES)

    # Each test period by the snapshots of the period before it.
    tested = runner.test_periods(wanted)
    before = [scope.periods[scope.periods.index(period) - 1] for period in tested]
    assert [version for _, version in asked[:: len(asked) // len(tested)]] == [f"{period}-x" for period in before]
    assert {key for key, _ in asked} == {
        f"{s}.{v}.{n}" for s in STUDENTS.values() for v in ("none", "good") for n in (1, 2)
    }
    # The same requests of every period for all of them; the value is the ratio of sums.
    assert [len(replay.user) for replay in replays] == [120] * len(tested)
    best = sum(replay.best.sum() for replay in replays)
    assert shares[PRODUCTION].points == pytest.approx([sum(produced) / best])
    assert shares["copied"].points == pytest.approx([sum(copied) / best])
    assert shares["both"].points.shape == (2,)
    assert shares["both"].replicates.shape == (2, scope.replicates)
    one, nothing = shares["both"].points
    assert one > shares["first"].points[0] > shares["neither"].points[0] == pytest.approx(shares["neither"].points[1])
    assert nothing == pytest.approx(shares["neither"].points[0])
    assert one < 1.0, "the last stage is still the production model"
    difference = shares["both"] - shares["neither"]
    assert (difference.replicates[0] > 0).all(), "paired by user"

    # What was measured is found again; what is broken is said.
    again = served_shares(runner, wanted, STUDENTS, CASCADES)
    assert len(replays) == len(tested)
    assert np.array_equal(again["both"].replicates, shares["both"].replicates)
    (path,) = (tmp_path / "served").iterdir()
    path.write_bytes(b"broken")
    with pytest.raises(DataError, match="cannot read what was measured"):
        served_shares(runner, wanted, STUDENTS, CASCADES)


def test_early_is_asked_for_what_retrieval_passes_on(scope: Scope, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def scored(replay, config, models, wanted):
        asked.append(wanted)
        return {
            place: np.where(wanted, 0.1 + place[2] * replay.pool % 7, np.nan).astype(np.float32) for place in models
        }

    monkeypatch.setattr(module, "_scored", scored)
    config = module.study_config(study(scope), scope, "", "x")
    ((_, replay),) = module._replays(config.data.source, scope.periods, scope.periods[1:2])
    grids = module._grids(
        replay, config, {("retrieval", "none", 1): None, ("retrieval", "none", 2): None, ("early", "none", 1): None}
    )
    assert asked[0].all()
    production = replay.record.outcome.grid(0)[replay.requests]
    passed = replay.passed(grids["retrieval", "none", 1]) | replay.passed(grids["retrieval", "none", 2])
    passed |= replay.passed(production)
    assert np.array_equal(asked[1], passed)
    assert 40 * 120 <= asked[1].sum() < asked[1].size
