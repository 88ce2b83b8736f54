"""What objectives read beside predictions: representations that teachers store, and requests."""

from __future__ import annotations

from typing import Any

import pytest
from small_pipeline import PERIODS, mapping, merged, small_pipeline

from rayfm.config import ConfigError, validate
from rayfm.models.build import build_model
from rayfm.pipeline.config import PipelineConfig
from rayfm.pipeline.plan import representation_widths, student_specs, teachers_of

DRAWN = {"type": "representation", "teacher": "fm"}


def changes(*objectives: dict[str, Any], **teacher: Any) -> dict[str, Any]:
    return {
        "students": {"vm": {"variants": {"none": [], "direct": [], "drawn": list(objectives)}}},
        "teachers": {"fm": {"store_representation": True, **teacher}},
    }


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (
            changes(DRAWN, store_representation=False),
            "vm: variant 'drawn' reads the representation of 'fm', which is not stored; set "
            "teachers.fm.store_representation: true",
        ),
        (
            changes({**DRAWN, "teacher": "fmm"}),
            "vm: variant 'drawn' reads a representation, but there is no teacher 'fmm'; did you mean 'fm'?",
        ),
        (
            changes({"type": "kl", "teacher": "fm", "tasks": ["watch"]}),
            "vm: variant 'drawn': objective 'kl': it cannot distil task 'watch'",
        ),
        (
            {**changes({"type": "kl", "teacher": "fm"}), "students": {"vm": {"tasks": None, "variants": {
                "none": [], "drawn": [{"type": "kl", "teacher": "fm"}]}}}},
            "objective 'kl': task 'watch' is a regression",
        ),
        (
            changes({"type": "direct", "teacher": "fm"}, {"type": "direct", "teacher": "fm"}),
            "vm: variant 'drawn': two objectives are called 'direct'; give each a 'name' of its own",
        ),
        (changes({"type": "kl", "teacher": "fm", "temperature": 0}), "temperature': Input should be greater than 0"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(tmp_path, changed, expected) -> None:
    with pytest.raises(ConfigError) as error:
        validate(PipelineConfig, merged(mapping(tmp_path), changed), "small.yaml")
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_the_width_is_that_of_the_teachers_model(tmp_path) -> None:
    config = small_pipeline(tmp_path, **changes(DRAWN))
    teacher = config.teachers["fm"]
    width = build_model(teacher.model, config.schema_, config.tasks_of(teacher)).representation_dim
    assert representation_widths(config) == {"fm": width}
    (spec,) = student_specs(config, PERIODS)
    learners = {learner.variant: learner for learner in spec.learners}
    assert learners["drawn"].representations() == {"fm": width}
    assert learners["drawn"].supervision() == ()
    assert learners["none"].representations() == {}
    assert spec.teachers == ("fm",), "it waits for the teacher's labels, though it reads no prediction"
    assert teachers_of(config) == {"vm": "fm"}


def test_no_teacher_is_built_for_students_that_read_none(tmp_path) -> None:
    assert representation_widths(small_pipeline(tmp_path)) == {}


@pytest.mark.parametrize("kind", ["pairwise", "listwise"])
def test_a_source_without_requests_is_refused(tmp_path, kind) -> None:
    objective = {"type": kind, "teacher": "fm"}
    small_pipeline(tmp_path, **changes(objective))  # Parquet files: to be seen in the data
    kuairand = {"source": {"type": "kuairand", "path": "logs"}}
    found = merged(mapping(tmp_path), changes(objective))
    found["data"] = {**found["data"], **kuairand}
    with pytest.raises(ConfigError, match=f"objective '{kind}' compares rows .* source 'kuairand' has no request_id"):
        validate(PipelineConfig, found, "small.yaml")
