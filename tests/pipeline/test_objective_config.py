"""What of a variant's objectives is refused before anything is trained."""

from __future__ import annotations

from typing import Any

import pytest
from small_pipeline import mapping, merged

from rayfm.config import ConfigError, validate
from rayfm.pipeline.config import PipelineConfig
from rayfm.pipeline.plan import student_specs, teacher_spec


def config_with(*objectives: dict[str, Any]) -> dict[str, Any]:
    return {"students": {"vm": {"tasks": ["click", "watch"], "variants": {"tried": list(objectives)}}}}


def complaint(tmp_path, changes: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        validate(PipelineConfig, merged(mapping(tmp_path), changes), "small.yaml")
    message = str(error.value)
    assert "\n" not in message
    return message


CROSS = {"type": "cross_stage", "next_stage": "logged/ranking"}
CLICK = {"tasks": ["click"]}


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ({"type": "student_adapter"}, "'students.vm.variants.tried.0.teacher' is missing; add it"),
        ({"type": "dependent_task"}, "'students.vm.variants.tried.0.teacher' is missing; add it"),
        ({"type": "cross_stage"}, "'students.vm.variants.tried.0.next_stage' is missing; add it"),
        (
            {"type": "direct", "teacher": "fm", "tasks": ["clik"]},
            "teacher 'fm' has no task 'clik'; did you mean 'click'",
        ),
        ({**CROSS, "tasks": ["clik"]}, "variant 'tried': objective 'cross_stage': it cannot distil task 'clik'; did"),
        ({**CROSS, "fallback": "fmm"}, "'tried' reads 'fmm/click', but there is no teacher 'fmm'; did you mean 'fm'"),
        ({**CROSS, "fallback": "logged/ranking"}, "fallback is next_stage itself, 'logged/ranking'"),
        ({"type": "self_auxiliary"}, "vm: variant 'tried': objective 'self_auxiliary': task 'watch' is a regression"),
        (
            {"type": "self_auxiliary", **CLICK, "rows": "considerations"},
            "selector 'max' needs true labels, and rows 'considerations' have none; take 'distilled', or other rows",
        ),
        ({"type": "self_auxiliary", **CLICK, "selector": "mx"}, "Input should be 'max', 'min', 'original'"),
        (
            {"type": "selected_label", "teacher": "fm", **CLICK, "traffics": ["serch"]},
            "vm: variant 'tried': objective 'selected_label': traffic 'serch' is not in the schema; did you",
        ),
        (
            {"type": "supervised", "traffics": ["fed"]},
            "vm: variant 'tried': objective 'supervised': traffic 'fed' is not in the schema; did you mean 'feed'",
        ),
        ({"type": "supervised", "traffics": []}, "at least 1 item"),
    ],
)
def test_an_objective_that_does_not_fit_is_refused(tmp_path, objective, expected):
    assert expected in complaint(tmp_path, config_with(objective))


def test_two_of_a_type_need_names(tmp_path):
    two = [{"type": "direct", "teacher": "fm"}, {"type": "direct", "teacher": "logged/ranking"}]
    message = complaint(tmp_path, config_with(*two))
    assert "vm: variant 'tried': two objectives are called 'direct'; give each a 'name' of its own" in message
    two[1]["name"] = "direct_logged"
    validate(PipelineConfig, merged(mapping(tmp_path), config_with(*two)))


def test_a_teacher_may_have_objectives_of_its_own(tmp_path):
    objectives = [
        {"type": "supervised", "traffics": ["feed"]},
        {"type": "self_auxiliary", "selector": "original", "traffics": ["search"], **CLICK},
    ]
    teacher = {"teachers": {"fm": {"objectives": objectives}}}
    config = validate(PipelineConfig, merged(mapping(tmp_path), teacher))
    (learner,) = teacher_spec(config, "fm", ("2024-01-01", "2024-01-02")).learners
    assert [objective.label for objective in learner.objectives] == ["supervised", "self_auxiliary"]
    objectives[0]["traffics"] = ["fed"]
    assert "fm: objective 'supervised': traffic 'fed' is not in the schema" in complaint(tmp_path, teacher)
    teacher["teachers"]["fm"]["objectives"] = [{"type": "direct", "teacher": "other"}]
    assert "fm: objective 'direct' reads 'other/click', but there is no teacher 'other'" in complaint(tmp_path, teacher)


def test_a_fallback_teacher_is_waited_for(tmp_path):
    objective = {**CROSS, "fallback": "fm", **CLICK}
    config = validate(PipelineConfig, merged(mapping(tmp_path), config_with(objective)))
    (spec,) = student_specs(config, ("2024-01-01", "2024-01-02"))
    assert spec.teachers == ("fm",)
    tried = next(learner for learner in spec.learners if learner.variant == "tried")
    assert tried.supervision() == ("logged/ranking/click", "fm/click")
