"""The tables about considerations without training: what they ask for, costs, gains, worlds, and what they fill in."""

from __future__ import annotations

import dataclasses
import io
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from rayfm.config import ConfigError
from rayfm.metrics import Entry, MetricState
from rayfm.metrics.intervals import Estimate, Sample
from rayfm.pipeline.config import PipelineConfig
from rayfm.reproduce import runner as runner_module
from rayfm.reproduce.parts import student
from rayfm.reproduce.runner import Runner
from rayfm.reproduce.scope import Scope, open_scope
from rayfm.reproduce.show import show
from rayfm.reproduce.study import Study, fingerprint, merge, study_config
from rayfm.reproduce.table import TABLES
from rayfm.reproduce.tables import sweep
from rayfm.reproduce.tables.considerations import BUDGET, CHOICES, costs_of, keeps_most, need_considerations

NAMES = ("considerations-share", "ukdsl-foundation", "ukdsl-sweep")


@pytest.fixture(scope="module")
def scope() -> Scope:
    return open_scope("simulator")


@pytest.fixture(scope="module")
def quick() -> Scope:
    return open_scope("simulator", quick=True)


class FilledRunner:
    """Every variant has the same numbers; a study's records count its share."""

    def comparison(self, studies: list, *students: str) -> FilledRunner:
        return self

    over_worlds = comparison

    def value(self, *of: str) -> Estimate:
        return Estimate(0.9, 0.89, 0.91, 3)

    def difference(self, *of: object) -> Sample:
        draws = np.random.default_rng(1).normal(0, 0.001, (3, 50))
        return Sample(np.full(3, -0.01), -0.01 + draws)

    relative_difference = difference

    def records(self, study: Study, student: str, variant: str) -> list[SimpleNamespace]:
        share = study.consideration_share.get("share", 0.3)
        return [SimpleNamespace(examples=1000 + 2467 * share, cpu_seconds=2.0 + share)] * 4


@pytest.mark.parametrize("name", NAMES)
def test_a_table_fits_a_terminal(name: str, scope: Scope, quick: Scope) -> None:
    for each in (scope, quick):
        result = TABLES[name]().fill(each, FilledRunner())
        assert result.rows
        assert all(len(row.labels) == len(result.labels) for row in result.rows)
        assert all(len(row.ours) == len(row.paper) == len(result.metrics) for row in result.rows)
        out = io.StringIO()
        show(result, "A title", Console(file=out, width=80))
        assert max(map(len, out.getvalue().splitlines())) <= 80


def test_what_the_paper_does_not_say_is_not_counted(scope: Scope) -> None:
    for name, counted, apart in (("considerations-share", 0, 18), ("ukdsl-foundation", 0, 12)):
        result = TABLES[name]().fill(scope, FilledRunner())
        assert (len(result.claims), len(result.apart)) == (counted, apart)
    assert len(TABLES["ukdsl-sweep"]().fill(scope, FilledRunner()).claims) == 2 * 3 * len(sweep.LEVELS)


def test_considerations_are_asked_of_the_simulator_alone(scope: Scope) -> None:
    other = dataclasses.replace(scope, source="kuairand", base={"data": {"source": {"type": "kuairand"}}})
    with pytest.raises(ConfigError, match="some-table: it needs considerations, which kuairand has not"):
        need_considerations(other, "some-table")


# -- cost and gain ------------------------------------------------------------------------------------------------


def test_choices_are_of_equal_budget(scope: Scope) -> None:
    assert {name: choice.share for name, choice in CHOICES.items() if "budget" not in choice.share} == {
        "none": {"type": "uniform", "share": 0.0},
        "impressions": {"type": "uniform", "share": 0.0},
        "uniform_10": {"type": "uniform", "share": 0.1},
        "uniform_30": {"type": "uniform", "share": 0.3},
        "uniform_100": {"type": "uniform", "share": 1.0},
    }
    source = scope.base["data"]["source"]
    assert not {"widths", "consideration_share", "candidates"} & set(source), "the budget is of the default log"
    # A fifth of the 20 that early drops and of the 17 that ranking does, for three impressions.
    assert pytest.approx(0.3 * 0.2 * (20 + 17) / 3) == BUDGET
    for choice in CHOICES.values():
        assert choice.share.get("budget", {"per_impression": BUDGET}) == {"per_impression": BUDGET}


def test_costs_are_relative_to_the_first_study(scope: Scope) -> None:
    table = TABLES["considerations-share"]()
    studies = dict(zip(CHOICES, table.studies(scope), strict=True))
    chosen = ["none", "uniform_100", "far"]
    costs = costs_of(FilledRunner(), [studies[name] for name in chosen], chosen)
    assert [cost.value for cost, _ in costs] == pytest.approx([0.0, 2.467, 0.7401])
    assert [cpu.value for _, cpu in costs] == pytest.approx([1.0, 1.5, 1.15])


def test_most_of_a_gain() -> None:
    less, more = Sample(np.array([0.3]), np.array([[0.3, 0.1]])), Sample(np.array([0.4]), np.array([[0.4, 0.4]]))
    kept = keeps_most(less, more)
    assert kept.points.tolist() == pytest.approx([0.1])
    assert kept.replicates[0].tolist() == pytest.approx([0.1, -0.1])


# -- worlds -------------------------------------------------------------------------------------------------------


def test_a_study_in_a_world_of_its_own(scope: Scope) -> None:
    students = {"fm": student(scope, "fm", {"none": []})}
    here = Study("one", {"warmup": 3}, students=students)
    there = dataclasses.replace(here, world={"seed": 99, "exploration": 0.2}, seeds=(7,))
    config, other = (study_config(study, scope, "x", "run") for study in (here, there))
    assert (other.data.source.seed, other.data.source.exploration, other.seeds) == (99, 0.2, (7,))
    assert config.storage != other.storage
    assert study_config(dataclasses.replace(here, world={}), scope, "x", "run").storage == config.storage
    assert len({fingerprint(study, scope, "fm", "none") for study in (here, there)}) == 2
    with pytest.raises(ConfigError, match="'one' is defined twice with different days, rows or seeds"):
        merge([here, there])


def test_every_world_is_prepared_once(scope: Scope, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class StopHereError(Exception):
        pass

    def remote(*of: object) -> None:
        raise StopHereError

    prepared: list[str] = []

    def pipeline(config: PipelineConfig) -> SimpleNamespace:
        return SimpleNamespace(config=config, specs=[], prepare=lambda: prepared.append(config.storage))

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(remote=remote))
    monkeypatch.setattr(runner_module, "Pipeline", pipeline)
    students = {"fm": student(scope, "fm", {"none": []})}
    worlds = [{}, {"seed": 99}, {}, {"seed": 98}, {"seed": 99}]
    studies = [Study(f"s{i}", {"warmup": 3}, students=students, world=w) for i, w in enumerate(worlds)]
    configs = [study_config(study, scope, "x", "run") for study in studies]
    with pytest.raises(StopHereError):
        Runner(scope, tmp_path)._run(studies, configs, None)
    assert sorted(prepared) == sorted({config.storage for config in configs})
    assert len(prepared) == 3


def test_worlds_stand_in_the_place_of_seeds(scope: Scope, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def state(prediction: float) -> MetricState:
        state = MetricState([("click", "binary")], ("feed",), replicates=4)
        rows = 200
        logit = torch.full((rows,), prediction).logit()
        label, user = (torch.arange(rows) % 2).float(), torch.arange(rows)
        known, traffic = torch.ones(rows, dtype=torch.bool), torch.zeros(rows, dtype=torch.int64)
        weights = torch.ones(rows, 4)
        state.update("click", 0, logit, label, known, torch.ones(rows), traffic, user, weights=weights)
        return state

    predictions = {"one": 0.4, "two": 0.6}
    runner = Runner(scope, tmp_path)
    monkeypatch.setattr(
        runner, "_entries", lambda studies, _: [Entry("fm", "none", 1, "p", state(predictions[studies[0].name]))]
    )
    found = runner.over_worlds([Study(name, {"warmup": 1}) for name in predictions], "fm").value(
        "fm", "none", "calibration", "click"
    )
    assert found is not None
    assert found.seeds == 2
    assert found.value == pytest.approx((0.8 + 1.2) / 2, rel=1e-5)


def test_the_sweeps_worlds_are_frozen(scope: Scope) -> None:
    assert not set(sweep.SEEDS) & set(sweep.CALIBRATION_SEEDS)
    for level in sweep.LEVELS:
        studies = sweep.UKDSLSweep().of_level(scope, level)
        assert [study.world["seed"] for study in studies] == list(sweep.SEEDS)
        for study in studies:
            config = study_config(study, scope, "x", "run")
            assert config.data.source.periods == sweep.SIZE["periods"]
            assert config.schedule.last == scope.periods[sweep.SIZE["periods"] - 1]
            assert {**sweep.SIZE, **sweep.LEVELS[level], "seed": study.world["seed"]} == study.world
