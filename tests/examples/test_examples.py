from __future__ import annotations

from pathlib import Path

import pytest

from rayfm.augment.config import load_augment
from rayfm.augment.join import FeedbackJoin
from rayfm.augment.random_logs import write_random_logs
from rayfm.config import read_yaml, validate
from rayfm.pipeline.config import load_config
from rayfm.pipeline.plan import student_specs, teacher_key, teacher_spec
from rayfm.schema import Schema
from rayfm.serving.nearline.config import load_nearline

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
FILES = sorted(EXAMPLES.glob("*.yaml"))
PIPELINES = [path for path in FILES if "students" in read_yaml(path)]
SCHEMAS = [path for path in FILES if set(read_yaml(path)) <= set(Schema.model_fields)]
JOINS = [path for path in FILES if "impressions" in read_yaml(path)]
NEAR_LINE = [path for path in FILES if "redis" in read_yaml(path)]


def name(path: Path) -> str:
    return path.name


def test_every_example_is_of_a_known_kind():
    assert FILES
    assert sorted([*PIPELINES, *SCHEMAS, *JOINS, *NEAR_LINE]) == FILES


@pytest.mark.parametrize("path", NEAR_LINE, ids=name)
def test_near_line_labels_come_from_the_demos_teacher(path):
    config, demo = load_nearline(path), load_config(EXAMPLES / "demo.yaml")
    assert config.run == demo.name
    assert config.root == str(demo.run_dir)
    assert config.model == teacher_key(demo, config.teacher)


@pytest.mark.parametrize("path", SCHEMAS, ids=name)
def test_schemas(path):
    validate(Schema, read_yaml(path), path.name)


@pytest.mark.parametrize("path", PIPELINES, ids=name)
def test_pipelines(path):
    config = load_config(path)
    periods = ("2024-01-01", "2024-01-02")
    specs = [*(teacher_spec(config, teacher, periods) for teacher in config.teachers), *student_specs(config, periods)]
    assert {learner.model_name for spec in specs for learner in spec.learners} == {*config.teachers, *config.students}


def test_the_logs_of_public_data_are_read_directly():
    """A Ray Data pipeline takes seconds to start, which short runs on one machine do without."""
    for path in PIPELINES:
        config = load_config(path)
        readers = {teacher.training.reader for teacher in config.teachers.values()}
        assert readers == ({"ray_data"} if path.name == "demo.yaml" else {"arrow"}), path
        assert {group.reader for group in config.groups.values()} == {"arrow"}, path


@pytest.mark.parametrize("path", PIPELINES, ids=name)
def test_what_models_read_is_in_the_schema_and_reached_by_them(path):
    config = load_config(path)
    known = {feature.name for feature in config.schema_.features}
    for part in (*config.teachers.values(), *config.students.values()):
        own = known if part.model.features is None else set(part.model.features)
        assert own <= known
        for key, value in part.model:
            if key.endswith("_features"):
                assert set(value) <= own, key


@pytest.mark.parametrize("path", PIPELINES, ids=name)
def test_tables_of_the_schema_are_used(path):
    schema = load_config(path).schema_
    used = {feature.table_name for feature in schema.features if feature.kind != "dense"}
    assert used == set(schema.tables)


@pytest.mark.parametrize("path", PIPELINES, ids=name)
def test_students_are_compared_with_the_undistilled_one(path):
    config = load_config(path)
    for student in config.students.values():
        assert student.variants[config.evaluation.reference_variant] == ()


@pytest.mark.parametrize("path", SCHEMAS, ids=name)
def test_a_schema_that_a_pipeline_repeats_is_the_same(path):
    """kuairand_schema.yaml belongs to kuairand.yaml, simulator_schema.yaml to the pipelines on the simulator."""
    source = path.name.removesuffix("_schema.yaml")
    schema = validate(Schema, read_yaml(path), path.name)
    pipelines = [load_config(pipeline) for pipeline in PIPELINES]
    belonging = [config for config in pipelines if vars(config.data.source)["type"] == source]
    assert belonging
    for config in belonging:
        assert config.schema_ == schema, config.name


@pytest.mark.parametrize("path", JOINS, ids=name)
def test_joins_run_on_random_logs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_augment(path, ["random_logs.hours=30", "random_logs.impressions_per_hour=20"])
    assert write_random_logs(config)
    assert not write_random_logs(config)
    with FeedbackJoin(config) as join:
        lines = []
        join.run(watch=lines.append)
        assert sum(line["joined"] for line in lines) > 0
        assert sum(line["bad"] for line in lines) == 0
