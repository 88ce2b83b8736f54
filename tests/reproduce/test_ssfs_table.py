"""UKDSL's Table 2 without training: what is selected, which students it asks for, and its numbers by hand."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from rayfm.config import ConfigError
from rayfm.metrics.intervals import Estimate, Sample
from rayfm.pipeline.plan import choose_periods
from rayfm.pipeline.select import SelectJob, select_folder
from rayfm.reproduce import runner as runner_module
from rayfm.reproduce.runner import LOCK, Runner
from rayfm.reproduce.scope import Scope, open_scope
from rayfm.reproduce.study import Study, merge, study_config
from rayfm.reproduce.tables.ssfs import ALL, UKDSLTable2
from rayfm.selection.result import FILE

LISTS = {
    "impressions_only": ("user_id", "ad_ctr"),
    "considerations_only": ("ad_ctr", "user_id"),
    "average_rank": ("ad_ctr",),
    "average_importance": ("ad_ctr",),
    "intersection": (),
    "union": ("user_id", "ad_ctr", "hour"),
    "union_of_size": ("ad_ctr", "user_id"),
}


@pytest.fixture(scope="module", params=[True, False], ids=["quick", "full"])
def scope(request: pytest.FixtureRequest) -> Scope:
    return open_scope("simulator", quick=request.param)


def test_features_are_selected_before_the_test_periods(scope: Scope, tmp_path: Path) -> None:
    table = UKDSLTable2()
    config = table.selection(scope, str(tmp_path))
    assert config is not None
    selection = SelectJob(config, here=True)
    (study,) = table.studies(scope)
    periods = choose_periods(study_config(study, scope, str(tmp_path), "run"), list(scope.periods))
    assert (*selection.trained, *selection.withheld) == periods[: study.schedule["warmup"]]
    assert len(selection.candidates) == len(scope.base["schema"]["features"])
    seeds = dataclasses.replace(scope, seeds=(5,))
    assert select_folder(table.selection(seeds, str(tmp_path))) == select_folder(config)
    # Another world, or other code, is another selection.
    other = dataclasses.replace(scope, base={**scope.base, "data": scope.base["data"] | {"lanes": 2}})
    assert select_folder(table.selection(other, str(tmp_path))) != select_folder(config)
    files = {**scope.base["data"], "source": {"type": "kuairand", "path": "x"}}
    without = dataclasses.replace(scope, source="kuairand", base={**scope.base, "data": files})
    with pytest.raises(ConfigError, match="it needs considerations, which kuairand has not"):
        table.selection(without, "x")


def test_a_student_for_each_different_list(scope: Scope, tmp_path: Path) -> None:
    table = UKDSLTable2()
    table.lists = LISTS
    (study,) = merge(table.studies(scope))
    read = [set(student["model"]["features"]) for student in study.students.values()]
    every = {feature["name"] for feature in scope.base["schema"]["features"]}
    assert sorted(read, key=len) == [{"ad_ctr"}, {"ad_ctr", "user_id"}, {"ad_ctr", "hour", "user_id"}, every]
    config = study_config(study, scope, str(tmp_path), "run")
    assert config.consideration_share == 1.0
    (term,) = next(iter(config.students.values())).variants["mixed"]
    assert (term.teacher, term.rows) == ("dcnv2", "considerations")


class ByFeatures:
    """A comparison in which NE falls by 0.01 with each feature that a student reads."""

    def __init__(self, studies: list[Study]) -> None:
        (study,) = studies
        self.counts = {name: len(student["model"]["features"]) for name, student in study.students.items()}

    def ne(self, student: str) -> float:
        return 0.9 - 0.01 * self.counts[student]

    def value(self, student: str, variant: str, metric: str, task: str, kind: str) -> Estimate:
        return Estimate(self.ne(student), 0.0, 1.0, 3)

    def difference(self, one: tuple[str, str], other: tuple[str, str], metric: str, task: str, kind: str) -> Sample:
        value = np.full(3, self.ne(one[0]) - self.ne(other[0]))
        draws = np.random.default_rng(1).normal(0, 1e-4, (3, 100))
        return Sample(value, value[:, None] + draws * (one != other))


class FakeRunner:
    def comparison(self, studies: list[Study], *students: str) -> ByFeatures:
        found = ByFeatures(studies)
        assert set(students) == set(found.counts)
        return found


def test_its_numbers_by_hand(scope: Scope) -> None:
    table = UKDSLTable2()
    table.lists = LISTS
    result = table.fill(scope, FakeRunner())
    rows = {row.labels[0]: row for row in result.rows}
    changes = {name: row.ours[1].value if row.ours[1] else None for name, row in rows.items()}
    # The base, of two features, has an NE of 0.88; one feature more is 0.01 less.
    assert changes["IMP importance only"] == changes["CD importance only"] == 0.0
    assert changes["union of top features"] == pytest.approx(-100 * 0.01 / 0.88)
    assert changes["average rank"] == pytest.approx(100 * 0.01 / 0.88)
    assert changes["intersection of top features"] is None, "there is no list"
    assert rows["intersection of top features"].labels[1] == "0"
    assert rows["union of top features"].paper == (-0.137, -0.725)
    verdicts = {judged.claim.text: judged.verdict for judged in result.claims}
    assert verdicts["union ahead of IMP only on considerations"] == "held"
    assert verdicts["average rank ahead of IMP only on considerations"] == "not"
    assert verdicts["CD only ahead of IMP only on considerations"] == "open"
    assert len(result.apart) == 4
    assert result.apart[-1].verdict == "held"
    assert any("NE of IMP importance only: 0.8800, 0.8800" in note for note in result.notes)


def test_without_a_base_nothing_is_compared(scope: Scope) -> None:
    table = UKDSLTable2()
    table.lists = {**LISTS, "impressions_only": ()}
    result = table.fill(scope, FakeRunner())
    assert all(value is None for row in result.rows for value in row.ours)
    assert any(f"NE of {'all candidates'}" in note for note in result.notes)
    assert ALL not in table.lists


def test_what_was_selected_before_is_read(scope: Scope, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = UKDSLTable2().selection(scope, str(tmp_path))
    folder = select_folder(config)
    folder.mkdir(parents=True)
    (folder / FILE).write_text("{}")
    asked = []

    class Found:
        selection = type("Selection", (), {"lists": LISTS})

    monkeypatch.setattr(runner_module, "select", lambda config, **options: asked.append(options) or Found)
    with contextlib.ExitStack() as session:
        found, seconds = Runner(scope, tmp_path).select(config, session)
    assert (found, seconds, asked) == (LISTS, 0.0, [{"resume": True, "here": True}])
    assert not (tmp_path / LOCK).exists(), "nothing is trained, and no Ray is started"
