"""From the config to what each trainer is told."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rayfm.config import ConfigError
from rayfm.models.base import ModelConfig
from rayfm.models.build import build_model
from rayfm.models.histories import HistoryFeature
from rayfm.pipeline.config import LabelsConfig, PipelineConfig, StudentConfig, TeacherConfig
from rayfm.training.calibration import CountsCalibration
from rayfm.training.learner import LearnerConfig
from rayfm.training.spec import TrainerSpec

TEACHER_VARIANT = "teacher"


def choose_periods(config: PipelineConfig, available: list[str], open_end: bool = False) -> tuple[str, ...]:
    """The periods of the schedule among those that the source has.

    Args:
        config: the pipeline's config.
        available: periods of the source, in time order.
        open_end: more may come: the last one need not be there yet, nor any to test on.

    Raises:
        ConfigError: the bounds name none, or too few are left to test on.
    """
    schedule = config.schedule
    own = {f"teachers.{name}.through": teacher.through for name, teacher in config.teachers.items()}
    for bound in (schedule.first, None if open_end else schedule.last):
        if bound is not None and bound not in available:
            raise ConfigError(f"schedule: period {bound!r} is not in the source, which has {_span(available)}")
    periods = tuple(
        period
        for period in available
        if (schedule.first is None or period >= schedule.first) and (schedule.last is None or period <= schedule.last)
    )
    if open_end and not periods:
        raise ConfigError(
            "schedule: no period is complete yet; a source's newest one is once a later one has begun, or "
            "follow.close_after_s seconds after its end"
        )
    if len(periods) <= schedule.warmup and not open_end:
        raise ConfigError(
            f"schedule: warmup {schedule.warmup} leaves no test period of the {len(periods)} there are; lower it"
        )
    inner = {f"schedule.{key}": getattr(schedule, key) for key in _INNER_BOUNDS} | own
    for key, bound in inner.items():
        if bound is not None and bound not in periods:
            raise ConfigError(f"{key}: period {bound!r} is not one of the schedule's, {_span(list(periods))}")
    start, end = schedule.students_from or periods[0], schedule.students_through or periods[-1]
    if start > end:
        raise ConfigError(f"schedule: students_from {start} lies after students_through {end}; exchange them")
    return periods


_INNER_BOUNDS = ("teachers_through", "students_from", "students_through")


def trained_periods(periods: tuple[str, ...], through: str | None) -> int | None:
    """How many of ``periods`` are trained on, for a trainer that stops after ``through``; None: all."""
    return None if through is None else periods.index(through) + 1


def student_periods(config: PipelineConfig, periods: tuple[str, ...]) -> tuple[str, ...]:
    """The periods that students see."""
    start = config.schedule.students_from
    return periods if start is None else periods[periods.index(start) :]


def periods_to_label(config: PipelineConfig, periods: tuple[str, ...], teacher: str) -> tuple[str, ...]:
    """The periods whose labels of a teacher any student or other teacher reads: to train with, or to be scored against.

    The first period can have none: no teacher was trained before it.
    """
    if any(history.teacher == teacher for history in histories(config)):
        return periods[1:]  # a history of every period, and each period may be predicted with it
    read: set[str] = set()
    for part in _parts(config):
        if teacher not in config.teachers_read(part):
            continue
        if isinstance(part, StudentConfig):
            seen, through = student_periods(config, periods), config.schedule.students_through
        else:
            seen, through = periods, part.through or config.schedule.teachers_through
        scored = any(column.startswith(f"{teacher}/") for column in part.reference.values())
        read |= set(seen if scored else seen[: trained_periods(seen, through)])
    return tuple(period for period in periods[1:] if period in read)


def _parts(config: PipelineConfig) -> list[TeacherConfig | StudentConfig]:
    return [*config.students.values(), *config.teachers.values()]


def histories(config: PipelineConfig) -> tuple[HistoryFeature, ...]:
    """The histories that any student reads, each once, with their widths."""
    widths = representation_widths(config)
    found = {h.name: h for s in config.students.values() for h in _with_widths(s.model, widths).histories}
    return tuple(found.values())


def _with_widths(model: ModelConfig, widths: dict[str, int]) -> ModelConfig:
    """``model`` told how wide the teachers' representations are."""
    told = tuple(
        h if h.width is not None else h.model_copy(update={"width": widths[h.teacher]}) for h in model.histories
    )
    return model.model_copy(update={"histories": told}) if told else model


def _span(periods: list[str]) -> str:
    return f"{periods[0]} .. {periods[-1]}" if periods else "none"


def teacher_key(config: PipelineConfig, teacher: str) -> str:
    """The teacher's key in snapshots and checkpoints."""
    return f"{teacher}.{TEACHER_VARIANT}.{config.teachers[teacher].seed}"


def teacher_spec(config: PipelineConfig, name: str, periods: tuple[str, ...]) -> TrainerSpec:
    """What the trainer of a teacher is told."""
    teacher, widths = config.teachers[name], representation_widths(config)
    return TrainerSpec(
        name=name,
        role="teacher",
        learners=(
            LearnerConfig(
                model_name=name,
                variant=TEACHER_VARIANT,
                seed=teacher.seed,
                model=teacher.model,
                tasks=config.tasks_of(teacher),
                objectives=tuple(objective.with_widths(widths) for objective in teacher.objectives),
                reference=teacher.reference,
                traffics=teacher.traffics,
                lost_labels=teacher.lost_labels,
                logit_shift=teacher.logit_shift,
                calibrate=teacher.calibrate,
            ),
        ),
        training=teacher.training,
        schema_=config.schema_,
        features=_read(config, [teacher]),
        periods=periods,
        trained=trained_periods(periods, teacher.through or config.schedule.teachers_through),
        guarded=config.promotion is not None and "teachers" in config.promotion.roles,
        store=config.storage,
        run_dir=str(config.run_dir),
        teachers=config.teachers_read(teacher),
        consideration_share=teacher.consideration_share,
        evaluated_share=config.evaluation.consideration_share if teacher.reference else 0.0,
        replicates=config.evaluation.replicates,
        nodes=config.ray.nodes,
    )


def student_specs(config: PipelineConfig, periods: tuple[str, ...]) -> list[TrainerSpec]:
    """What each group of students is told."""
    specs = []
    periods = student_periods(config, periods)
    widths = representation_widths(config)
    for group in sorted({student.group for student in config.students.values()}):
        students = {name: student for name, student in config.students.items() if student.group == group}
        learners = tuple(
            LearnerConfig(
                model_name=name,
                variant=variant,
                seed=seed,
                model=_with_widths(student.model, widths),
                tasks=config.tasks_of(student),
                objectives=tuple(objective.with_widths(widths) for objective in objectives),
                reference=student.reference,
                traffics=student.traffics,
                lost_labels=student.lost_labels,
                calibrate=student.calibrate,
            )
            for name, student in students.items()
            for variant, objectives in student.variants.items()
            for seed in config.seeds
        )
        read = {name for student in students.values() for name in config.teachers_read(student)}
        specs.append(
            TrainerSpec(
                name=group,
                role="students",
                learners=learners,
                training=config.groups[group],
                schema_=config.schema_,
                features=_read(config, list(students.values())),
                periods=periods,
                trained=trained_periods(periods, config.schedule.students_through),
                publish=config.publish_students,
                guarded=config.promotion is not None and "students" in config.promotion.roles,
                export_tolerance=config.endpoints.compile.tolerance,
                store=config.storage,
                run_dir=str(config.run_dir),
                teachers=tuple(name for name in config.teachers if name in read),
                consideration_share=config.consideration_share,
                evaluated_share=config.evaluation.consideration_share,
                replicates=config.evaluation.replicates,
                nodes=config.ray.nodes,
            )
        )
    return specs


def _read(config: PipelineConfig, parts: Sequence[TeacherConfig | StudentConfig]) -> tuple[str, ...] | None:
    """The features that any of the parts reads, to embed or as calibration's cells; None: all."""
    if any(part.model.features is None for part in parts):
        return None
    names = {name for part in parts for name in part.model.features or ()}
    names |= {part.calibrate.by for part in parts if isinstance(part.calibrate, CountsCalibration)}
    return tuple(feature.name for feature in config.schema_.features if feature.name in names)


def representation_widths(config: PipelineConfig) -> dict[str, int]:
    """Width of the representation of each teacher that a student, or another teacher, reads one of."""
    objectives = [objective for part in _parts(config) for objective in config.objectives_of(part)]
    names = {name for objective in objectives for name in objective.representations()}
    names |= {history.teacher for student in config.students.values() for history in student.model.histories}
    return {
        name: build_model(
            teacher.model, config.schema_, config.tasks_of(teacher), device=torch.device("meta")
        ).representation_dim
        for name, teacher in config.teachers.items()
        if name in names
    }


def group_labels(config: PipelineConfig, group: str) -> LabelsConfig:
    """What a group asks of labels: the strictest of what its students ask, since they share a reader."""
    asked: list[LabelsConfig] = [student.labels for student in _members(config, group)]
    return LabelsConfig(
        min_coverage=max(labels.min_coverage for labels in asked),
        wait=max(labels.wait for labels in asked),
        first=min(labels.first for labels in asked),
        on_missing="fail" if any(labels.on_missing == "fail" for labels in asked) else "train_without",
    )


def _members(config: PipelineConfig, group: str) -> list[StudentConfig]:
    return [student for student in config.students.values() if student.group == group]


def teachers_of(config: PipelineConfig) -> dict[str, str]:
    """Student -> the teacher that it is compared with: the first that one of its variants learns from."""
    found: dict[str, str] = {}
    for name, student in config.students.items():
        for objectives in student.variants.values():
            for objective in objectives:
                for column in (*objective.supervision(config.tasks_of(student)), *objective.representations()):
                    head = column.partition("/")[0]
                    if head in config.teachers:
                        found.setdefault(name, head)
    return found
