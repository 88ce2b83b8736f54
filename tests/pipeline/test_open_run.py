from __future__ import annotations

import pytest
from small_pipeline import PERIODS, merged, small_pipeline

from rayfm.config import ConfigError, DataError
from rayfm.pipeline.config import load_config
from rayfm.pipeline.stream import Pipeline


def test_a_pipeline_knows_its_periods_and_trainers(tmp_path):
    pipeline = Pipeline(small_pipeline(tmp_path))
    assert pipeline.periods == PERIODS
    assert [(spec.role, spec.name) for spec in pipeline.specs] == [("teacher", "fm"), ("students", "students")]
    teacher = pipeline.coordinator(pipeline.specs[0])
    assert (teacher.labelled, teacher.teachers) == (PERIODS[1:], ())
    assert not pipeline.coordinator(pipeline.specs[0], alone=True).labelled
    students = pipeline.coordinator(pipeline.specs[1], alone=True)
    assert (students.teachers, students.labels.wait) == (("fm",), 0.0)


def test_a_new_run_keeps_its_config(tmp_path):
    config = small_pipeline(tmp_path)
    Pipeline(config).open(resume=False, overwrite=False)
    assert load_config(config.run_dir / "config.yaml") == config


def test_a_standing_run_is_neither_lost_nor_mixed(tmp_path):
    config = small_pipeline(tmp_path)
    Pipeline(config).open(resume=False, overwrite=False)
    with pytest.raises(ConfigError, match=r"holds a run; --resume goes on with it, --overwrite starts anew"):
        Pipeline(config).open(resume=False, overwrite=False)


def test_resume_takes_tickets_up_and_forgets_the_failure(tmp_path):
    config = small_pipeline(tmp_path)
    first = Pipeline(config)
    first.open(resume=False, overwrite=False)
    first.tickets.put("trained", "fm", PERIODS[0], {"versions": {}})
    first.tickets.fail("fm", "killed")
    again = Pipeline(config)
    again.open(resume=True, overwrite=False)
    assert again.tickets.get("trained", "fm", PERIODS[0]) == {"versions": {}}
    assert again.tickets.failure() is None


def test_resume_of_nothing_is_a_new_run(tmp_path):
    config = small_pipeline(tmp_path)
    Pipeline(config).open(resume=True, overwrite=False)
    assert (config.run_dir / "config.yaml").exists()


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"seeds": [2]}, "seeds.0"),
        ({"seeds": [1, 2]}, "seeds"),
        ({"students": {"vm": {"variants": {"direct": [{"type": "direct", "teacher": "fm", "weight": 0.5}]}}}},
         "students.vm.variants.direct.0.weight"),
        ({"students": {"vm": {"variants": {"more": []}}}}, "students.vm.variants.more"),
        ({"groups": {"students": {"dense": {"lr": 0.5}}}}, "groups.students.dense.lr"),
    ],
)  # fmt: skip
def test_resume_with_another_config_names_the_key(tmp_path, changes, key):
    Pipeline(small_pipeline(tmp_path)).open(resume=False, overwrite=False)
    with pytest.raises(ConfigError) as error:
        Pipeline(small_pipeline(tmp_path, **changes)).open(resume=True, overwrite=False)
    assert f"config.yaml: {key!r} differs from the config given" in str(error.value)
    assert "\n" not in str(error.value)


def test_resume_may_move_to_another_ray(tmp_path):
    Pipeline(small_pipeline(tmp_path)).open(resume=False, overwrite=False)
    Pipeline(small_pipeline(tmp_path, ray={"cpus": 16})).open(resume=True, overwrite=False)


def test_overwrite_leaves_nothing_of_the_run_before(tmp_path):
    config = small_pipeline(tmp_path)
    first = Pipeline(config)
    first.open(resume=False, overwrite=False)
    first.tickets.put("trained", "fm", PERIODS[0], {"versions": {}})
    (config.run_dir / "metrics.jsonl").write_text("old")
    changed = small_pipeline(tmp_path, **merged({}, {"seeds": [2]}))
    again = Pipeline(changed)
    again.open(resume=False, overwrite=True)
    assert not (config.run_dir / "metrics.jsonl").exists()
    assert again.tickets.get("trained", "fm", PERIODS[0]) is None
    again.tickets.put("trained", "fm", PERIODS[1], {"versions": {}})
    assert Pipeline(changed).tickets.get("trained", "fm", PERIODS[1]) == {"versions": {}}
    assert load_config(config.run_dir / "config.yaml").seeds == (2,)


@pytest.mark.parametrize("key", ["runs", "storage"])
def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path, key):
    """A path below a file, as permissions do not bind every user."""
    (tmp_path / "file").write_text("")
    config = small_pipeline(tmp_path, **{key: str(tmp_path / "file" / "below")})
    with pytest.raises(DataError) as error:
        Pipeline(config).open(resume=False, overwrite=False)
    assert str(tmp_path / "file") in str(error.value)
    assert "choose" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_source_path_is_refused_before_anything_is_made(tmp_path):
    config = small_pipeline(tmp_path, data={"source": {"path": str(tmp_path / "nowhere")}})
    with pytest.raises(DataError, match="nowhere"):
        Pipeline(config)
    assert not config.run_dir.exists()
