"""What the ``select`` section refuses, and what it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from planted import DAYS, mapping

from rayfm.config import ConfigError, validate
from rayfm.pipeline.config import PipelineConfig
from rayfm.pipeline.plan import choose_periods, periods_to_label, student_specs, teacher_spec
from rayfm.pipeline.select import STUDENT, SelectJob, select_folder, training_config


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return mapping(tmp_path_factory.mktemp("planted"), rows=4)


def changed(whole: dict[str, Any], **changes: Any) -> PipelineConfig:
    select = {"select": whole["select"] | changes.pop("select", {})}
    return validate(PipelineConfig, whole | changes | select)


def test_what_is_trained(whole: dict[str, Any]) -> None:
    config = changed(whole, select={"candidates": ["shunned", "liking"], "consideration_weight": 0.5, "seed": 7})
    training = training_config(config, list(DAYS))
    assert training.run_dir == select_folder(config) / "training"
    periods = choose_periods(training, list(DAYS))
    assert periods == DAYS[:4], "no test period is read"
    assert teacher_spec(training, "big", periods).trained == 3
    (spec,) = student_specs(training, periods)
    assert (spec.trained, spec.publish, spec.consideration_share) == (3, True, 1.0)
    (learner,) = spec.learners
    assert learner.key == f"{STUDENT}.mixed.7"
    assert learner.model.features == ("liking", "shunned"), "in the schema's order"
    (term,) = learner.objectives
    assert (term.teacher, term.rows, term.weight) == ("big", "considerations", 0.5)
    assert learner.supervision() == ("big/click",)
    # The first period can have no labels; the withheld one has those of a teacher that stopped before it.
    assert periods_to_label(training, periods, "big") == DAYS[1:4]


def test_defaults(whole: dict[str, Any]) -> None:
    without = {key: value for key, value in whole.items() if key != "select"}
    training = training_config(validate(PipelineConfig, without), list(DAYS), here=True)
    model = training.students[STUDENT].model
    assert (model.type, len(model.features)) == ("deepfm", 5)
    assert training.teachers["big"].training.reader == "arrow"
    assert SelectJob(validate(PipelineConfig, without)).top_k == 3


@pytest.mark.parametrize(
    ("select", "message"),
    [
        ({"teacher": "bigg"}, "select.teacher: there is no teacher 'bigg'; did you mean 'big'?"),
        (
            {"candidates": ["liking", "prise"]},
            "select.candidates: features: 'prise' is not in the schema; did you mean",
        ),
        ({"tasks": ["clic"]}, "select.tasks: teacher 'big' has no task 'clic'; did you mean 'click'?"),
        ({"group": "student"}, "select.group: no worker group 'student'; did you mean 'students'?"),
        ({"top_k": 6}, "select.top_k: 6 of 5 candidates; take fewer"),
        ({"withheld": 3}, "needs 5 before the first test period.*raise schedule.warmup"),
        ({"first_labels": 3}, "select.first_labels: 3 leaves no period with pseudo-labels of the 3"),
        (
            {"model": {"type": "fm", "histories": [{"teacher": "big", "key": "price", "width": 4}]}},
            "select.model: histories are no candidates; leave them out",
        ),
    ],
)
def test_what_does_not_fit(whole: dict[str, Any], select: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        training_config(changed(whole, select=select), list(DAYS))


@pytest.mark.parametrize(
    ("select", "message"),
    [
        ({"candidates": ["liking", "liking"]}, "candidate 'liking' stands twice; name it once"),
        ({"model": {"type": "fm", "features": ["liking"]}}, "reads all candidates; leave 'model.features' out"),
        ({"shufles": 3}, "unknown key 'select.shufles'; did you mean 'shuffles'?"),
        ({"model": {"type": "fmm"}}, "'select.model.type': unknown 'fmm'; did you mean"),
    ],
)
def test_what_the_section_cannot_say(whole: dict[str, Any], select: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        changed(whole, select=select)


def test_which_teacher(whole: dict[str, Any]) -> None:
    teachers = whole["teachers"] | {"other": whole["teachers"]["big"]}
    with pytest.raises(ConfigError, match=r"select\.teacher: which of big, other"):
        training_config(changed(whole, teachers=teachers), list(DAYS))
    silent = {"big": whole["teachers"]["big"] | {"label_considerations": False}}
    with pytest.raises(ConfigError, match="'big' labels no considerations; set its label_considerations: true"):
        training_config(changed(whole, teachers=silent), list(DAYS))
    with pytest.raises(ConfigError, match="the config has no teachers; add one"):
        training_config(changed(whole, teachers={}), list(DAYS))
    named = changed(whole, teachers=teachers, select={"teacher": "other"})
    assert list(training_config(named, list(DAYS)).teachers) == ["other"]


def test_a_run_may_be_resumed_with_another_select_section(whole: dict[str, Any], tmp_path: Path) -> None:
    from rayfm.pipeline.stream import Pipeline

    runs = {"runs": str(tmp_path)}
    Pipeline(changed(whole, **runs)).open(resume=False, overwrite=False)
    Pipeline(changed(whole, **runs, select={"top_k": 1})).open(resume=True, overwrite=False)
