from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from pydantic import ValidationError
from small_pipeline import mapping, merged, small_pipeline, write_config

from rayfm.config import ConfigError, read_yaml, validate, write_yaml
from rayfm.pipeline.config import PipelineConfig, TeacherConfig, load_config
from rayfm.training.config import TrainingConfig

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

DIRECT = {"type": "direct", "teacher": "fm"}


def complaint(tmp_path: Path, changes: dict) -> str:
    with pytest.raises(ConfigError) as error:
        validate(PipelineConfig, merged(mapping(tmp_path), changes), "small.yaml")
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"students": {"vm": {"tasks": ["clik"]}}}, "vm: task 'clik' is not in the schema; did you mean 'click'?"),
        ({"teachers": {"fm": {"tasks": ["wach"]}}}, "fm: task 'wach' is not in the schema; did you mean 'watch'?"),
        (
            {"students": {"vm": {"model": {"features": ["usr"]}}}},
            "vm: feature 'usr' is not in the schema; did you mean 'user'?",
        ),
        (
            {"students": {"vm": {"group": "student"}}},
            "vm: worker group 'student' is not defined; did you mean 'students'?",
        ),
        (
            {"students": {"vm": {"variants": {"direct": [{**DIRECT, "teacher": "fmm"}]}}}},
            "vm: variant 'direct' reads 'fmm/click', but there is no teacher 'fmm'; did you mean 'fm'?",
        ),
        (
            {"teachers": {"fm": {"tasks": ["watch"]}}},
            "vm: variant 'direct' reads 'fm/click', but teacher 'fm' has no task 'click'; known: watch",
        ),
        (
            {"students": {"vm": {"reference": {"click": "fm/clik"}}}},
            "vm: reference of 'click' reads 'fm/clik', but teacher 'fm' has no task 'clik'",
        ),
        (
            {"students": {"vm": {"reference": {"watch": "truth/watch"}}}},
            "vm: reference of 'watch', which is no task of it; known: click",
        ),
        (
            {"teachers": {"fm": {"reference": {"click": "ranking/click"}}}},
            "fm: reference of 'click' reads 'ranking/click', but there is no teacher 'ranking'",
        ),
        ({"teachers": {"vm": mapping(Path())["teachers"]["fm"]}}, "'vm' is both a teacher and a student"),
        ({"teachers": {"students": mapping(Path())["teachers"]["fm"]}}, "'students' is both a teacher and a worker"),
        ({"teachers": {"truth": mapping(Path())["teachers"]["fm"]}}, "a teacher cannot be called 'truth'"),
        (
            {"groups": {"students": {"batch_size": 18}}},
            "group students: batch_size 18 is not a multiple of data.lanes 4; take 16",
        ),
        (
            {"teachers": {"fm": {"training": {"predict_batch_size": 3}}}},
            "teacher fm: predict_batch_size 3 is not a multiple of data.lanes 4; take 4",
        ),
        (
            {"groups": {"students": {"sharding_overrides": {"usr": "row_wise"}}}},
            "group students: override for table 'usr', which is not in the schema; did you mean 'user'?",
        ),
        (
            {"students": {"vm": {"tasks": ["watch"], "variants": {"none": []}, "calibrate": True}}},
            "vm: calibrate is for binary tasks, and it has none; leave it out",
        ),
        ({"schema": {"taks": []}}, "unknown key 'schema.taks'; did you mean 'tasks'?"),
        (
            {"students": {"vm": {"variants": {"direct": [{**DIRECT, "wieght": 1}]}}}},
            "unknown key 'students.vm.variants.direct.0.wieght'; did you mean 'weight'?",
        ),
        (
            {"teachers": {"fm": {"training": {"table": {"lr": 1}}}}},
            "unknown key 'teachers.fm.training.table'; did you mean 'tables'?",
        ),
        ({"teachers": {"fm": {"model": {"type": "dcn2"}}}}, "'teachers.fm.model.type': unknown 'dcn2'; did you mean"),
        ({"data": {"source": {"type": "parket"}}}, "'data.source.type': unknown 'parket'; did you mean 'parquet'?"),
        ({"name": "../up"}, "'name': String should match pattern"),
        ({"schedule": {"warmup": 0}}, "'schedule.warmup': Input should be greater than or equal to 1"),
    ],
)
def test_what_does_not_fit_together_is_refused(tmp_path, changes, expected):
    message = complaint(tmp_path, changes)
    assert expected in message
    assert "\n" not in message


def test_supervision_may_come_from_the_log(tmp_path):
    config = small_pipeline(
        tmp_path,
        teachers={"fm": {"reference": {"click": "logged/ranking/click"}}},
        students={
            "vm": {
                "reference": {"click": "truth/click"},
                "variants": {"direct": [{"type": "direct", "teacher": "logged/ranking"}]},
            }
        },
    )
    assert config.students["vm"].variants["direct"][0].supervision(("click",)) == ("logged/ranking/click",)


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        (None, "ray_data"),
        ({}, "ray_data"),
        ({"batch_size": 16}, "ray_data"),
        ({"batch_size": 16, "reader": "arrow"}, "arrow"),
        (TrainingConfig(batch_size=16), "ray_data"),
        (TrainingConfig(reader="arrow"), "arrow"),
    ],
)
def test_a_teacher_reads_through_ray_data_unless_it_says_otherwise(training, expected):
    plain = {"model": {"type": "fm"}}
    teacher = TeacherConfig.model_validate(plain if training is None else {**plain, "training": training})
    assert teacher.training.reader == expected
    assert TeacherConfig.model_validate(teacher.dump()) == teacher


def test_a_training_that_a_teacher_shares_with_a_group_stays_the_groups(tmp_path):
    shared = {"batch_size": 16, "predict_batch_size": 64}
    plain = merged(mapping(tmp_path), {"groups": {"students": shared}})
    plain["teachers"]["fm"]["training"] = shared
    config = PipelineConfig.model_validate(plain)
    assert config.teachers["fm"].training.reader == "ray_data"
    assert config.groups["students"].reader == "arrow"
    assert "reader" not in shared


def test_tasks_come_in_the_schemas_order(tmp_path):
    config = small_pipeline(tmp_path, teachers={"fm": {"tasks": ["watch", "click"]}})
    assert config.tasks_of(config.teachers["fm"]) == ("click", "watch")
    assert config.tasks_of(config.students["vm"]) == ("click",)


def test_load_config_takes_overrides_and_the_data_folder(tmp_path):
    path = write_config(tmp_path)
    config = load_config(path, ["seeds=[1, 2]", "students.vm.variants.direct.0.weight=0.5"], data="elsewhere")
    assert config.seeds == (1, 2)
    assert config.students["vm"].variants["direct"][0].weight == 0.5
    assert config.data.source.path == "elsewhere"


@pytest.mark.parametrize("text", ["name: x\n", "name: x\ndata:\n", "name: x\ndata: [1]\n", "data: {source: parquet}\n"])
def test_the_data_folder_needs_a_source(tmp_path, text):
    path = tmp_path / "bare.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"'data\.source' is missing"):
        load_config(path, data="elsewhere")


def test_written_and_read_again_is_the_same_config(tmp_path):
    config = small_pipeline(tmp_path)
    write_yaml(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    demo = load_config(EXAMPLES / "demo.yaml")
    write_yaml(demo, tmp_path / "demo.yaml")
    assert load_config(tmp_path / "demo.yaml") == demo


def test_the_json_schema_knows_the_keys(tmp_path):
    schema = PipelineConfig.model_json_schema(by_alias=True)
    assert json.loads(json.dumps(schema)) == schema
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    good = json.loads(json.dumps(mapping(tmp_path)))
    validator.validate(good)
    for changes in (
        {"shedule": {}},
        {"schema": {"taks": []}},
        {"teachers": {"fm": {"model": {"type": "dcn2"}}}},
        {"teachers": {"fm": {"model": {"low_rnk": 3}}}},
        {"students": {"vm": {"variants": {"direct": [{**DIRECT, "wieght": 1}]}}}},
        {"schedule": {"warmup": 0}},
    ):
        assert not validator.is_valid(merged(good, changes)), changes


@pytest.mark.parametrize("example", ["demo.yaml", "kuairand.yaml"])
def test_the_examples_fit_the_json_schema(example):
    schema = PipelineConfig.model_json_schema(by_alias=True)
    jsonschema.Draft202012Validator(schema).validate(read_yaml(EXAMPLES / example))


def test_a_table_that_a_sequence_reads_is_never_replicated(tmp_path):
    dmin = {"type": "dmin", "features": ["user", "ad", "history"], "embedding_dim": 4, "hidden": [8]}
    adam = {"tables": {"type": "adam"}, "sharding": "data_parallel"}
    groups = {"students": adam}
    small_pipeline(tmp_path, groups=groups)
    with pytest.raises(ValidationError, match=r"vm: table '\w+' is read item by item by a sequence"):
        small_pipeline(tmp_path, groups=groups, students={"vm": {"model": dmin}})
