"""Whether a plan fits: what trainers, replicas and Ray Data need together, against what the cluster has."""

from __future__ import annotations

import dataclasses

from rayfm.config import CapacityError
from rayfm.pipeline.config import PipelineConfig, ServingConfig


@dataclasses.dataclass(frozen=True)
class Need:
    """CPUs and GPUs of one part of the plan."""

    part: str
    cpus: float
    gpus: float = 0.0


def needs(config: PipelineConfig) -> list[Need]:
    """What runs side by side: every trainer group, every teacher's replicas, and the room kept for Ray Data tasks."""
    found = []
    for name, teacher in config.teachers.items():
        training = teacher.training
        found.append(
            Need(
                f"trainer {name} ({training.workers} x {training.cpus_per_worker:g})",
                training.workers * training.cpus_per_worker,
                training.workers * training.gpus_per_worker,
            )
        )
        serving = config.serving
        found.append(
            Need(
                f"service {name} ({serving.replicas} x {_terms(serving)})",
                serving.replicas * (serving.cpus + _members(serving) * serving.member_cpus),
                serving.replicas * (serving.gpus + _members(serving) * serving.member_gpus),
            )
        )
    for name in sorted({student.group for student in config.students.values()}):
        training = config.groups[name]
        found.append(
            Need(
                f"trainer {name} ({training.workers} x {training.cpus_per_worker:g})",
                training.workers * training.cpus_per_worker,
                training.workers * training.gpus_per_worker,
            )
        )
    guarded = guarded_trainers(config)
    if config.promotion is not None and guarded:
        cpus = config.promotion.cpus
        found.append(Need(f"promotion ({guarded} x {cpus:g})", guarded * cpus))
    found.append(Need("Ray Data tasks", config.ray.data_cpus))
    return found


def guarded_trainers(config: PipelineConfig) -> int:
    """How many trainers' versions are guarded: so many tasks may score at once."""
    if config.promotion is None:
        return 0
    groups = {student.group for student in config.students.values()} if config.publish_students else set()
    teachers = len(config.teachers) if "teachers" in config.promotion.roles else 0
    return teachers + (len(groups) if "students" in config.promotion.roles else 0)


def _members(serving: ServingConfig) -> int:
    return serving.members if serving.members > 1 else 0


def _terms(serving: ServingConfig) -> str:
    members = _members(serving)
    return f"({serving.cpus:g} + {members} x {serving.member_cpus:g})" if members else f"{serving.cpus:g}"


def check_capacity(config: PipelineConfig, cpus: float, gpus: float = 0.0) -> None:
    """Refuse a plan that would deadlock for want of CPUs or GPUs.

    Raises:
        CapacityError: with the arithmetic.
    """
    wanted = needs(config)
    for unit, have, amounts in (
        ("CPUs", cpus, [need.cpus for need in wanted]),
        ("GPUs", gpus, [need.gpus for need in wanted]),
    ):
        total = sum(amounts)
        if total > have + 1e-9:
            terms = " + ".join(
                f"{amount:g} {need.part}" for need, amount in zip(wanted, amounts, strict=True) if amount
            )
            raise CapacityError(
                f"the plan needs {total:g} {unit} at once and Ray has {have:g}: {terms}; lower workers or "
                "cpus_per_worker, start Ray with more (--set ray.cpus=N), or join a larger cluster (ray.address)"
            )
