"""What a config may say of promotion, and what the plan makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from small_pipeline import mapping, merged, small_pipeline

from rayfm.config import CapacityError
from rayfm.pipeline.capacity import check_capacity, needs
from rayfm.pipeline.config import PipelineConfig
from rayfm.pipeline.opening import open_run
from rayfm.pipeline.state import RunState

NE = {"metric": "ne", "margin": 0.01}


def config(folder: Path, **promotion: Any) -> PipelineConfig:
    return small_pipeline(folder, promotion={"rules": [NE], **promotion})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"promotion": {"rules": [{**NE, "task": "clik"}]}}, "promotion: task 'clik' is not in the schema.*'click'"),
        (
            {"promotion": {"rules": [{**NE, "task": "watch"}]}},
            "ne is of binary tasks, and task 'watch' is a regression",
        ),
        ({"promotion": {"rules": [NE]}, "publish_students": False}, "publish_students is false"),
        ({"promotion": {"rules": [NE], "roles": ["serving"]}}, "'students' or 'teachers'"),
        ({"alerts": {"coverage": 1.5}}, "less than or equal to 1"),
        ({"alerts": {"freshness": 1}}, "freshness"),
        ({"logging": {"format": "xml"}}, "'text' or 'json'"),
        ({"tracking": {"mlflow": {}}}, "uri"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, changes: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        PipelineConfig.model_validate(merged(mapping(tmp_path), changes))


def test_teachers_are_not_guarded_where_there_are_none(tmp_path: Path):
    values = mapping(tmp_path) | {"teachers": {}, "promotion": {"rules": [NE], "roles": ["teachers"]}}
    values["students"]["vm"]["variants"] = {"none": []}
    with pytest.raises(ValidationError, match="roles names teachers, and there are none"):
        PipelineConfig.model_validate(values)


@pytest.mark.parametrize(
    ("promotion", "guarded"),
    [
        ({}, {"students"}),
        ({"roles": ["teachers"]}, {"fm"}),
        ({"roles": ["students", "teachers"]}, {"students", "fm"}),
    ],
)
def test_roles_say_whose_versions_wait(tmp_path: Path, promotion: dict[str, Any], guarded: set[str]):
    state = RunState(config(tmp_path, **promotion))
    assert {spec.name for spec in state.specs if spec.guarded} == guarded


def test_the_task_that_scores_is_in_the_arithmetic(tmp_path: Path):
    plain, guarded = small_pipeline(tmp_path), config(tmp_path, cpus=0.5, roles=["students", "teachers"])
    asked = {need.part: need.cpus for need in needs(guarded)}
    assert asked["promotion (2 x 0.5)"] == 1.0
    have = sum(need.cpus for need in needs(plain))
    check_capacity(plain, have)
    with pytest.raises(CapacityError, match=r"1 promotion \(2 x 0.5\)"):
        check_capacity(guarded, have)


def test_a_run_may_be_gone_on_with_under_other_bars(tmp_path: Path):
    open_run(RunState(small_pipeline(tmp_path)), resume=False, overwrite=False)
    changed = small_pipeline(
        tmp_path,
        promotion={"rules": [NE]},
        alerts={"coverage": 0.9},
        logging={"format": "json"},
        tracking={"tensorboard": False},
    )
    open_run(RunState(changed), resume=True, overwrite=False)


def test_a_run_that_was_started_before_there_were_such_keys_is_gone_on_with(tmp_path: Path):
    state = RunState(small_pipeline(tmp_path))
    open_run(state, resume=False, overwrite=False)
    saved = state.run_dir / "config.yaml"
    values = yaml.safe_load(saved.read_text())
    for key in ("promotion", "alerts", "logging", "tracking"):
        del values[key]
    saved.write_text(yaml.safe_dump(values))
    open_run(RunState(small_pipeline(tmp_path)), resume=True, overwrite=False)
