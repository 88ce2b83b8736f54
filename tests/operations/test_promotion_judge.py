"""The guard's decision, on figures worked out by hand."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from rayfm.operations.promotion import PromotionConfig, PromotionRule, badness, judge

BINARY = {"click": "binary"}


def rule(metric: str, margin: float, task: str | None = None) -> PromotionRule:
    return PromotionRule.model_validate({"metric": metric, "margin": margin, "task": task})


def test_badness_is_lower_for_the_better_model():
    assert badness("ne", 0.8) == 0.8
    assert badness("auc", 0.7) == -0.7
    assert badness("calibration", 0.9) == pytest.approx(0.1)
    assert badness("calibration", 1.1) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("metric", "new", "old", "margin", "worse_by", "promoted"),
    [
        ("ne", 0.805, 0.80, 0.01, 0.005, True),
        ("ne", 0.815, 0.80, 0.01, 0.015, False),
        ("ne", 0.75, 0.80, 0.0, -0.05, True),
        ("ne", 0.75, 0.75, 0.0, 0.0, True),
        ("logloss", 0.375, 0.25, 0.125, 0.125, True),  # exactly the margin
        ("calibration", 1.25, 0.875, 0.1, 0.125, False),  # 0.25 from 1, and 0.125
        ("calibration", 0.875, 1.25, 0.0, -0.125, True),
        ("auc", 0.5, 0.75, 0.1, 0.25, False),
        ("auc", 0.75, 0.5, 0.0, -0.25, True),
        ("rmse", 2.0, 1.5, 0.25, 0.5, False),
    ],
)
def test_a_version_is_refused_where_it_is_worse_by_more_than_the_margin(
    metric: str, new: float, old: float, margin: float, worse_by: float, promoted: bool
):
    verdict = judge([rule(metric, margin)], BINARY, {("click", metric): new}, {("click", metric): old})
    assert verdict.promoted is promoted
    (figure,) = verdict.figures
    assert figure.worse_by == pytest.approx(worse_by)
    assert figure.broken is not promoted


def test_one_broken_rule_of_one_task_is_enough_and_the_reason_names_it_alone():
    rules = [rule("ne", 0.01), rule("calibration", 0.05, task="like")]
    tasks = {"click": "binary", "like": "binary", "watch": "regression"}
    old = {("click", "ne"): 0.8, ("like", "ne"): 0.9, ("like", "calibration"): 1.0, ("click", "calibration"): 1.0}
    new = {("click", "ne"): 0.79, ("like", "ne"): 0.895, ("like", "calibration"): 1.2, ("click", "calibration"): 3.0}
    verdict = judge(rules, tasks, new, old)
    assert not verdict.promoted
    assert [(figure.task, figure.metric) for figure in verdict.figures] == [
        ("click", "ne"),
        ("like", "ne"),
        ("like", "calibration"),
    ]
    assert verdict.reason == (
        "calibration of like is 1.20000, the predecessor's 1.00000: worse by 0.20000, margin 0.05"
    )


def test_a_value_that_is_not_finite_is_refused_where_the_predecessors_is():
    verdict = judge([rule("logloss", 9.0)], BINARY, {("click", "logloss"): math.nan}, {("click", "logloss"): 0.5})
    assert not verdict.promoted
    assert verdict.reason == "logloss of click is not finite"


def test_a_metric_that_neither_has_says_nothing():
    verdict = judge([rule("ne", 0.0)], BINARY, {}, {})
    assert verdict.promoted
    assert verdict.reason == "nothing could be compared"
    verdict = judge([rule("ne", 0.0)], BINARY, {("click", "ne"): 0.9}, {("click", "ne"): math.nan})
    assert verdict.promoted, "a predecessor whose value is not finite is no bar"


def test_regressions_are_judged_by_rmse_and_calibration():
    tasks = {"watch": "regression"}
    verdict = judge([rule("ne", 0.0), rule("rmse", 0.1)], tasks, {("watch", "rmse"): 2.0}, {("watch", "rmse"): 1.0})
    assert [figure.metric for figure in verdict.figures] == ["rmse"]
    assert not verdict.promoted


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rules": []}, "at least 1 item"),
        ({"rules": [{"metric": "ne", "margin": -1}]}, "greater than or equal to 0"),
        ({"rules": [{"metric": "ne"}]}, "margin"),
        ({"rules": [{"metric": "ne", "margin": 0}, {"metric": "ne", "margin": 1}]}, "two rules for ne of every task"),
        ({"rules": [{"metric": "f1", "margin": 0}]}, "'ne', 'logloss', 'calibration'"),
    ],
)
def test_a_config_that_says_nothing_clear_is_refused(config: dict, message: str):
    with pytest.raises(ValidationError, match=message):
        PromotionConfig.model_validate(config)
