"""Hints on configs that are valid and doubtful."""

from __future__ import annotations

import pytest
from small_pipeline import small_pipeline

from rayfm.pipeline.hints import hints

AUX = [{"type": "auxiliary_head", "teacher": "fm"}]


def variants(*objectives: dict) -> dict:
    return {"students": {"vm": {"variants": {"none": [], "direct": list(objectives)}}}}


def test_a_plain_pipeline_has_none(tmp_path) -> None:
    assert hints(small_pipeline(tmp_path)) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"teachers": {"fm": {"logit_shift": 0.7}}}, "its logits are shifted by 0.7"),
        ({"teachers": {"fm": {"through": "2024-01-01"}}}, "it stops training after 2024-01-01"),
        ({"schedule": {"teachers_through": "2024-01-01"}}, "it stops training after 2024-01-01"),
        ({"teachers": {"fm": {"traffics": ["feed"]}}}, "it learnt traffics feed alone"),
    ],
)
def test_direct_distillation_from_a_biased_teacher(tmp_path, changes: dict, reason: str) -> None:
    (found,) = hints(small_pipeline(tmp_path, **changes))
    assert found.startswith("vm, variant 'direct': direct hands the bias of teacher 'fm' (")
    assert reason in found
    assert "auxiliary_head" in found
    headed = {**changes, "students": {"vm": {"variants": {"none": [], "direct": AUX}}}}
    assert hints(small_pipeline(tmp_path, **headed)) == []


def test_a_fresh_teacher_of_the_exfm_split_is_not_stale(tmp_path) -> None:
    schedule = {"teachers_through": "2024-01-01", "students_from": "2024-01-02", "students_through": "2024-01-02"}
    assert hints(small_pipeline(tmp_path, schedule={"warmup": 2, **schedule})) == []


def test_a_teacher_of_a_students_own_traffic_is_not_foreign(tmp_path) -> None:
    changes = {"teachers": {"fm": {"traffics": ["feed"]}}, "students": {"vm": {"traffics": ["feed"]}}}
    assert hints(small_pipeline(tmp_path, **changes)) == []


@pytest.mark.parametrize(
    "objective",
    [
        {"type": "auxiliary_task", "teacher": "fm"},
        {"type": "dependent_task", "teacher": "fm"},
        {"type": "cross_stage", "next_stage": "logged/ranking"},
        {"type": "auxiliary_head", "teacher": "fm", "rows": "considerations"},
    ],
)
def test_terms_on_considerations_without_any(tmp_path, objective: dict) -> None:
    (found,) = hints(small_pipeline(tmp_path, **variants(objective)))
    assert f"{objective['type']} lives on considerations, and consideration_share is 0" in found
    assert hints(small_pipeline(tmp_path, consideration_share=0.5, **variants(objective))) == []
