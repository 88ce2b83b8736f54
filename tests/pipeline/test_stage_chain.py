"""A cascade of three stages that teach one another in the stream: the plan, what is refused, a whole run."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import run_config
from small_pipeline import PERIODS, mapping, merged, small_pipeline

from rayfm.config import ConfigError, validate
from rayfm.pipeline.capacity import check_capacity
from rayfm.pipeline.config import PipelineConfig, load_config
from rayfm.pipeline.here import run_here
from rayfm.pipeline.hints import hints
from rayfm.pipeline.plan import periods_to_label, representation_widths, student_specs, teacher_spec
from rayfm.pipeline.stream import Pipeline

SMALL = {"type": "fm", "features": ["user", "ad"], "embedding_dim": 4}


def learns_from(*teachers: str, **keys: Any) -> dict[str, Any]:
    """A stage of its own that learns click from the named ones."""
    objectives = [{"type": "cross_stage", "next_stage": name, "name": f"from_{name}"} for name in teachers]
    return {"model": SMALL, "tasks": ["click"], "objectives": objectives, **keys}


def chain(**early: Any) -> dict[str, Any]:
    """fm -> early -> vm, the student of the smallest pipeline."""
    return {
        "teachers": {"early": learns_from("fm", consideration_share=0.5, **early)},
        "students": {"vm": {"variants": {"none": [], "direct": [{"type": "cross_stage", "next_stage": "early"}]}}},
    }


def test_a_stage_reads_the_next_and_is_read_by_the_one_before(tmp_path) -> None:
    config = small_pipeline(tmp_path, **chain(reference={"click": "fm/click"}, labels={"first": 2}))
    assert config.teacher_order() == ("fm", "early"), "the last stage first"
    early, (student,) = teacher_spec(config, "early", PERIODS), student_specs(config, PERIODS)
    assert (early.teachers, student.teachers) == (("fm",), ("early",))
    assert teacher_spec(config, "fm", PERIODS).teachers == ()
    assert (early.consideration_share, early.evaluated_share) == (0.5, config.evaluation.consideration_share)
    assert periods_to_label(config, PERIODS, "fm") == periods_to_label(config, PERIODS, "early") == PERIODS[1:]
    pipeline = Pipeline(config)
    assert [spec.name for spec in pipeline.specs] == ["fm", "early", "students"]
    waits = pipeline.coordinator(early)
    assert (waits.teachers, waits.labels.first, waits.labelled) == (("fm",), 2, PERIODS[1:])


def test_only_periods_that_a_stage_trains_on_are_labelled_for_it(tmp_path) -> None:
    plain = small_pipeline(tmp_path, **chain(through=PERIODS[1]))
    assert periods_to_label(plain, PERIODS, "fm") == (PERIODS[1],)
    assert periods_to_label(plain, PERIODS, "early") == PERIODS[1:]
    scored = small_pipeline(tmp_path, **chain(through=PERIODS[1], reference={"click": "fm/click"}))
    assert periods_to_label(scored, PERIODS, "fm") == PERIODS[1:], "its last period is scored against them"


def test_a_stage_may_learn_the_next_ones_representation(tmp_path) -> None:
    drawn = {"objectives": [{"type": "representation", "teacher": "fm"}]}
    changes = merged(chain(), {"teachers": {"early": drawn, "fm": {"store_representation": True}}})
    config = small_pipeline(tmp_path, **changes)
    (learner,) = teacher_spec(config, "early", PERIODS).learners
    assert learner.representations() == representation_widths(config)
    assert config.teachers_read(config.teachers["early"]) == ("fm",)


@pytest.mark.parametrize(
    ("teachers", "expected"),
    [
        ({"early": learns_from("early")}, "each would wait for the other's labels, early -> early (whose labels"),
        ({"early": learns_from("late"), "late": learns_from("early")}, "early -> late -> early"),
        (
            {"a": learns_from("c"), "b": learns_from("a"), "c": learns_from("fm", "b")},
            "a -> b -> c -> a",
        ),
        ({"fm": {"reference": {"click": "early/click"}}, "early": learns_from("fm")}, "early -> fm -> early"),
        ({"early": learns_from("fmm")}, "early: objective 'from_fmm' reads 'fmm/click', but there is no teacher 'fmm'"),
        (
            {"early": {**learns_from(), "objectives": [{"type": "representation", "teacher": "fm"}]}},
            "early reads the representation of 'fm', which is not stored",
        ),
        ({"fm": {"consideration_share": 1.5}}, "teachers.fm.consideration_share"),
    ],
)
def test_what_cannot_be_a_chain_is_refused(tmp_path, teachers, expected) -> None:
    with pytest.raises(ConfigError) as error:
        validate(PipelineConfig, merged(mapping(tmp_path), {"teachers": teachers}), "small.yaml")
    message = str(error.value)
    rotated = {expected}
    if expected.count(" -> ") > 1 and ":" not in expected:  # a circle may be named from any of its members
        names = expected.split(" -> ")[:-1]
        rotated = {" -> ".join((*names[i:], *names[:i], names[i])) for i in range(len(names))}
    assert any(text in message for text in rotated), message
    assert "\n" not in message


def test_a_stage_without_considerations_is_hinted_at(tmp_path) -> None:
    assert hints(small_pipeline(tmp_path, **merged(chain(), {"consideration_share": 0.5}))) == []
    bare = merged(chain(), {"consideration_share": 0.5, "teachers": {"early": {"consideration_share": 0.0}}})
    (hint,) = hints(small_pipeline(tmp_path, **bare))
    assert hint == "early: cross_stage lives on considerations, and teachers.early.consideration_share is 0; raise it"


def cascade(folder) -> PipelineConfig:
    """ranking -> early -> retrieval on a small world, each a model of its own, none reading the log's predictions."""
    base = run_config.small_pipeline(folder)
    training = base["groups"]["students"] | {"reader": "arrow"}
    cheap = base["students"]["fm"]["model"]
    early = {
        "model": cheap, "tasks": ["click"], "training": training, "consideration_share": 1.0,
        "objectives": [{"type": "cross_stage", "next_stage": "ranking"}], "reference": {"click": "ranking/click"},
    }  # fmt: skip
    ranking = {**base["teachers"]["teacher"], "training": training, "reference": {"click": "truth/click"}}
    two_tower = base["students"]["two_tower"] | {"reference": {"click": "early/click"}}
    two_tower["variants"] = {"none": [], "cross_stage": [{"type": "cross_stage", "next_stage": "early"}]}
    base |= {
        "name": "cascade", "teachers": {"early": early, "ranking": ranking},
        "students": {"retrieval": two_tower}, "consideration_share": 1.0,
    }  # fmt: skip
    base["data"]["source"]["requests_per_period"] = 150
    base["evaluation"]["consideration_share"] = 1.0
    return PipelineConfig.model_validate(base)


def test_the_example_is_a_chain_that_two_cores_hold() -> None:
    config = load_config(run_config.EXAMPLES / "cascade.yaml")
    assert config.teacher_order() == ("ranking", "early")
    assert config.teachers_read(config.students["retrieval"]) == ("early",)
    assert hints(config) == []
    check_capacity(config, cpus=2)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_three_stages_learn_from_the_period_before(tmp_path) -> None:
    config = cascade(tmp_path)
    Pipeline(config).prepare()
    pipeline = run_here(config)
    periods = pipeline.periods
    for teacher in ("ranking", "early"):
        for before, period in itertools.pairwise(periods):
            ticket = pipeline.tickets.get("labelled", teacher, period)
            assert ticket is not None
            assert ticket["trained_through"] == before, "made by the snapshot of the period before"
            assert ticket["coverage"] == {"impression": 1.0, "consideration": 1.0}
    losses = {
        (spec.name, period): json.loads((spec.folder / "periods" / f"{period}.json").read_text())["losses"]
        for spec in pipeline.specs
        for period in periods
    }
    terms = {"early": "early.teacher.0/cross_stage/click", "students": "retrieval.cross_stage.1/cross_stage/click"}
    for trainer, term in terms.items():
        assert term not in losses[trainer, periods[0]], "nobody was trained before the first period"
        assert all(losses[trainer, period][term] > 0 for period in periods[1:])

    # Each pair of stages, on both kinds of rows, pooled and in each period.
    summary, report = pipeline.finish()
    pairs = {(row["model"], row["variant"], row["against"]) for row in summary["stages"]}
    assert pairs == {
        ("ranking", "teacher", "truth/click"),
        ("early", "teacher", "ranking/click"),
        ("retrieval", "none", "early/click"),
        ("retrieval", "cross_stage", "early/click"),
    }
    for pair in pairs:
        rows = [row for row in summary["stages"] if (row["model"], row["variant"], row["against"]) == pair]
        found = {(row["kind"], row["metric"]): row for row in rows}
        for kind in ("impression", "consideration"):
            for metric in ("calibration", "ne"):
                assert found[kind, metric]["lo"] < found[kind, metric]["value"] < found[kind, metric]["hi"]
    lines = [json.loads(line) for line in (pipeline.run_dir / "metrics.jsonl").read_text().splitlines()]
    seen = {(line["model"], line["kind"], line["period"]) for line in lines}
    for model in ("ranking", "early", "retrieval"):
        for kind in ("impression", "impression_reference", "consideration"):
            assert {period for m, k, period in seen if (m, k) == (model, kind)} == set(periods[1:])
    page = report.read_text()
    assert "Between stages" in page
    assert "Calibration against the next stage, on considerations" in page
