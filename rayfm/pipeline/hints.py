"""What a valid config probably did not mean, said before anything is trained. docs/tables.md has what they rest on."""

from __future__ import annotations

from rayfm.distill.base import ObjectiveConfig
from rayfm.pipeline.config import PipelineConfig, StudentConfig

ON_CONSIDERATIONS = ("dependent_task", "auxiliary_task", "cross_stage")
"""Objectives whose gain, or whose rows, are considerations."""


def hints(config: PipelineConfig) -> list[str]:
    """One line per doubtful place of a pipeline; none is an error."""
    found: list[str] = []
    for name, student in config.students.items():
        for variant, objectives in student.variants.items():
            where = f"{name}, variant {variant!r}"
            for objective in objectives:
                found += [f"{where}: {text}" for text in _objective(config, student, objective)]
    for name, teacher in config.teachers.items():
        for objective in teacher.objectives:
            kind = str(vars(objective)["type"])
            if teacher.consideration_share == 0 and kind in ON_CONSIDERATIONS:
                found.append(
                    f"{name}: {kind} lives on considerations, and teachers.{name}.consideration_share is 0; raise it"
                )
    return list(dict.fromkeys(found))


def _objective(config: PipelineConfig, student: StudentConfig, objective: ObjectiveConfig) -> list[str]:
    kind = str(vars(objective)["type"])
    found = []
    rows = getattr(objective, "rows", "all")
    if config.consideration_share == 0 and (kind in ON_CONSIDERATIONS or rows in ("unlabelled", "considerations")):
        found.append(f"{kind} lives on considerations, and consideration_share is 0; raise it, e.g. to 0.5")
    if kind in ("direct", "kl"):
        for teacher in dict.fromkeys(c.partition("/")[0] for c in objective.supervision(config.tasks_of(student))):
            reason = _bias(config, student, teacher)
            if reason is not None:
                found.append(
                    f"{kind} hands the bias of teacher {teacher!r} ({reason}) to the serving head; compare it with "
                    "auxiliary_head, and with student_adapter beside it"
                )
    return found


def _bias(config: PipelineConfig, student: StudentConfig, name: str) -> str | None:
    """Why a teacher's mean prediction is not to be trusted on a student's rows, if its config says so."""
    teacher = config.teachers.get(name)
    if teacher is None:
        return None
    if teacher.logit_shift:
        return f"its logits are shifted by {teacher.logit_shift:g}"
    through = teacher.through or config.schedule.teachers_through
    # Students that start late may well start right after it: one period's gap is what every teacher has.
    last = config.schedule.students_through or config.schedule.last
    if through is not None and (last is None or through < last) and config.schedule.students_from is None:
        return f"it stops training after {through}"
    if teacher.traffics and set(student.traffics or config.schema_.traffics) - set(teacher.traffics):
        return f"it learnt traffics {', '.join(teacher.traffics)} alone"
    return None
