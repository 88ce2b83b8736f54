from __future__ import annotations

import pytest
from small_pipeline import PERIODS, small_pipeline

from rayfm.config import CapacityError, ConfigError
from rayfm.pipeline.capacity import check_capacity, needs
from rayfm.pipeline.plan import (
    choose_periods,
    group_labels,
    periods_to_label,
    student_specs,
    teacher_key,
    teacher_spec,
    teachers_of,
)

AUX = {"type": "auxiliary_head", "teacher": "fm"}
MORE = {
    "seeds": [1, 2],
    "consideration_share": 0.25,
    "evaluation": {"consideration_share": 0.5, "replicates": 20},
    "students": {
        "vm": {"reference": {"click": "logged/ranking/click"}},
        "early": {
            "tasks": ["watch"],
            "model": {"type": "fm", "features": ["history", "age"]},
            "variants": {"none": [], "aux": [{**AUX, "teacher": "logged/old"}]},
        },
        "alone": {"model": {"type": "fm"}, "group": "others"},
    },
    "groups": {"others": {"batch_size": 4}},
}


@pytest.fixture
def config(tmp_path):
    return small_pipeline(tmp_path, **MORE)


def test_calibration_is_asked_of_each_part(tmp_path):
    config = small_pipeline(tmp_path, **MORE)
    specs = [teacher_spec(config, "fm", PERIODS), *student_specs(config, PERIODS)]
    assert not any(learner.calibrate for spec in specs for learner in spec.learners)
    config = small_pipeline(tmp_path, **MORE | {"teachers": {"fm": {"calibrate": True}}})
    assert teacher_spec(config, "fm", PERIODS).learners[0].calibrate
    assert not any(learner.calibrate for spec in student_specs(config, PERIODS) for learner in spec.learners)
    students = {**MORE["students"], "vm": {"calibrate": True}}
    config = small_pipeline(tmp_path, **MORE | {"students": students})
    asked = {
        learner.model_name for spec in student_specs(config, PERIODS) for learner in spec.learners if learner.calibrate
    }
    assert asked == {"vm"}


def test_periods_of_the_schedule(tmp_path):
    available = [f"2024-01-0{day}" for day in range(1, 8)]

    def chosen(**schedule):
        return choose_periods(small_pipeline(tmp_path, schedule={"warmup": 2, **schedule}), available)

    assert chosen() == tuple(available)
    assert chosen(first="2024-01-03") == tuple(available[2:])
    assert chosen(first="2024-01-02", last="2024-01-04") == tuple(available[1:4])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"first": "2023-12-31"}, "period '2023-12-31' is not in the source, which has 2024-01-01 .. 2024-01-03"),
        ({"last": "2024-01-04"}, "period '2024-01-04' is not in the source"),
        ({"warmup": 3}, "warmup 3 leaves no test period of the 3 there are"),
        ({"warmup": 1, "first": "2024-01-03"}, "warmup 1 leaves no test period of the 1 there are"),
        ({"first": "2024-01-03", "last": "2024-01-01"}, "leaves no test period of the 0 there are"),
    ],
)
def test_a_schedule_that_leaves_nothing_is_refused(tmp_path, schedule, expected):
    config = small_pipeline(tmp_path, schedule=schedule)
    with pytest.raises(ConfigError, match=expected):
        choose_periods(config, list(PERIODS))


def test_no_period_at_all(tmp_path):
    with pytest.raises(ConfigError, match="warmup 1 leaves no test period of the 0 there are"):
        choose_periods(small_pipeline(tmp_path), [])
    with pytest.raises(ConfigError, match="which has none"):
        choose_periods(small_pipeline(tmp_path, schedule={"first": "2024-01-01"}), [])


def test_what_a_teacher_is_told(config):
    spec = teacher_spec(config, "fm", PERIODS)
    assert (spec.name, spec.role, spec.periods) == ("fm", "teacher", PERIODS)
    (learner,) = spec.learners
    assert learner.key == teacher_key(config, "fm") == "fm.teacher.0"
    assert learner.tasks == ("click", "watch")
    assert spec.features is None
    assert spec.teachers == ()
    assert spec.evaluated_share == 0.0, "without a reference there is nothing to score considerations against"
    assert spec.training == config.teachers["fm"].training
    assert spec.store == config.storage
    assert spec.folder == config.run_dir / "trainers" / "fm"


def test_a_teacher_with_a_reference_scores_considerations(tmp_path):
    config = small_pipeline(
        tmp_path,
        teachers={"fm": {"reference": {"click": "truth/click"}, "seed": 3, "model": {"features": ["user"]}}},
        evaluation={"consideration_share": 0.5},
    )
    spec = teacher_spec(config, "fm", PERIODS)
    assert spec.evaluated_share == 0.5
    assert spec.learners[0].key == "fm.teacher.3"
    assert spec.features == ("user",)


def test_a_group_hosts_variants_and_seeds(config):
    others, students = student_specs(config, PERIODS)
    assert (others.name, students.name) == ("others", "students")
    assert [learner.key for learner in students.learners] == [
        "vm.none.1",
        "vm.none.2",
        "vm.direct.1",
        "vm.direct.2",
        "early.none.1",
        "early.none.2",
        "early.aux.1",
        "early.aux.2",
    ]
    assert [learner.key for learner in others.learners] == ["alone.none.1", "alone.none.2"]
    assert others.training.batch_size == 4
    assert {(spec.consideration_share, spec.evaluated_share, spec.replicates) for spec in (others, students)} == {
        (0.25, 0.5, 20)
    }


def test_a_group_reads_the_union_of_its_students_features(config):
    others, students = student_specs(config, PERIODS)
    assert students.features == ("age", "user", "ad", "history"), "in the schema's order"
    assert others.features is None, "one of them reads all"


def test_supervision_and_teachers_follow_from_the_objectives(config):
    others, students = student_specs(config, PERIODS)
    supervision = {learner.key: learner.supervision() for learner in students.learners}
    assert supervision["vm.none.1"] == ()
    assert supervision["vm.direct.2"] == ("fm/click",)
    assert supervision["early.aux.1"] == ("logged/old/watch",)
    assert students.teachers == ("fm",)
    assert others.teachers == ()
    references = {learner.model_name: learner.reference for learner in students.learners}
    assert references == {"vm": {"click": "logged/ranking/click"}, "early": {}}


def test_a_reference_to_a_teacher_makes_the_group_wait_for_its_labels(tmp_path):
    config = small_pipeline(
        tmp_path, students={"vm": {"reference": {"click": "fm/click"}, "variants": {"none": [], "direct": []}}}
    )
    (spec,) = student_specs(config, PERIODS)
    assert spec.teachers == ("fm",)


def test_teachers_whose_names_begin_alike_are_told_apart(tmp_path):
    teacher = {"model": {"type": "fm", "features": ["user"]}, "training": {"batch_size": 16}}
    config = small_pipeline(tmp_path, teachers={"f": teacher, "fm-2": teacher})
    (spec,) = student_specs(config, PERIODS)
    assert spec.teachers == ("fm",)


def test_each_student_is_compared_with_its_teacher(config):
    assert teachers_of(config) == {"vm": "fm"}


def test_a_group_asks_the_strictest_of_its_students(tmp_path):
    config = small_pipeline(
        tmp_path,
        students={
            "vm": {"labels": {"min_coverage": 0.5, "wait": 10, "on_missing": "train_without"}},
            "other": {
                "model": {"type": "fm"},
                "labels": {"min_coverage": 0.9, "wait": 5, "on_missing": "train_without"},
            },
            "strict": {"model": {"type": "fm"}, "group": "apart", "labels": {"min_coverage": 1.0}},
        },
        groups={"apart": {"batch_size": 16}},
    )
    labels = group_labels(config, "students")
    assert (labels.min_coverage, labels.wait, labels.on_missing) == (0.9, 10, "train_without")
    assert group_labels(config, "apart").min_coverage == 1.0
    stricter = small_pipeline(tmp_path, students={"vm": {"labels": {"on_missing": "fail"}}})
    assert group_labels(stricter, "students").on_missing == "fail"


def test_a_plan_that_fits(config):
    assert {need.part: need.cpus for need in needs(config)} == {
        "trainer fm (1 x 0.5)": 0.5,
        "service fm (1 x 0.25)": 0.25,
        "trainer others (1 x 0.5)": 0.5,
        "trainer students (1 x 0.5)": 0.5,
        "Ray Data tasks": 0.5,
    }
    check_capacity(config, cpus=2.25)


def test_a_plan_that_does_not_fit_is_refused_with_the_arithmetic(config):
    with pytest.raises(CapacityError) as error:
        check_capacity(config, cpus=2)
    message = str(error.value)
    assert "the plan needs 2.25 CPUs at once and Ray has 2: " in message
    terms = message.split("has 2: ")[1].split("; ")[0].split(" + ")
    assert sum(float(term.split()[0]) for term in terms) == 2.25
    assert "0.5 trainer students (1 x 0.5)" in terms
    assert "\n" not in message


def test_a_plan_without_its_gpus_is_refused(tmp_path):
    config = small_pipeline(
        tmp_path, teachers={"fm": {"training": {"workers": 2, "gpus_per_worker": 1}}}, serving={"gpus": 0.5}
    )
    check_capacity(config, cpus=8, gpus=2.5)
    with pytest.raises(CapacityError, match=r"needs 2\.5 GPUs at once and Ray has 2: 2 trainer fm .* 0\.5 service fm"):
        check_capacity(config, cpus=8, gpus=2)


def test_groups_without_students_need_nothing(tmp_path):
    config = small_pipeline(tmp_path, groups={"idle": {"workers": 100}})
    check_capacity(config, cpus=2)


def test_periods_of_teachers_and_of_students_apart(tmp_path):
    days = tuple(f"2024-01-0{day}" for day in range(1, 7))

    def planned(teacher=None, **schedule):
        config = small_pipeline(
            tmp_path, schedule={"warmup": 5, **schedule}, teachers={"fm": {"through": teacher}} if teacher else {}
        )
        periods = choose_periods(config, list(days))
        (students,) = student_specs(config, periods)
        return teacher_spec(config, "fm", periods), students, periods_to_label(config, periods, "fm")

    # The ExFM split: the teacher learns four days and labels the fifth; the student learns that one, and is tested on
    # the sixth.
    teacher, students, labelled = planned(teachers_through=days[3], students_from=days[4], students_through=days[4])
    assert (teacher.periods, teacher.trained) == (days, 4)
    assert (students.periods, students.trained) == (days[4:], 1)
    assert labelled == (days[4],)
    teacher, students, labelled = planned()
    assert (teacher.trained, students.trained) == (None, None)
    assert students.periods == days
    assert labelled == days[1:], "no teacher was trained before the first period"
    assert planned(teacher=days[1])[0].trained == 2
    assert planned(teacher=days[1], teachers_through=days[3])[0].trained == 2, "the teacher's own bound goes first"


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"teachers_through": "2024-01-09"}, "schedule.teachers_through: period '2024-01-09' is not one of the sche"),
        ({"students_from": "2024-01-03", "students_through": "2024-01-02"}, "lies after students_through 2024-01-02"),
    ],
)
def test_bounds_of_a_part_lie_in_the_schedule(tmp_path, schedule, expected):
    config = small_pipeline(tmp_path, schedule={"warmup": 1, **schedule})
    with pytest.raises(ConfigError, match=expected):
        choose_periods(config, list(PERIODS))
    config = small_pipeline(tmp_path, teachers={"fm": {"through": "2024-02-01"}})
    with pytest.raises(ConfigError, match=r"teachers.fm.through: period '2024-02-01' is not one of the schedule's"):
        choose_periods(config, list(PERIODS))


def test_a_gang_counts_its_members(tmp_path):
    config = small_pipeline(tmp_path, serving={"replicas": 2, "cpus": 0.1, "members": 3, "member_cpus": 0.5})
    (service,) = (need for need in needs(config) if need.part.startswith("service"))
    assert service.part == "service fm (2 x (0.1 + 3 x 0.5))"
    assert service.cpus == pytest.approx(3.2)
    with pytest.raises(ValueError, match="http_port goes with members: 1"):
        small_pipeline(tmp_path, serving={"members": 2, "http_port": 8000})
    for gpus in (0.5, 2):
        with pytest.raises(ValueError, match="a member has a GPU of its own"):
            small_pipeline(tmp_path, serving={"members": 2, "member_gpus": gpus})
    small_pipeline(tmp_path, serving={"members": 2, "member_gpus": 1})
