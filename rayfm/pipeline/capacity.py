"""Whether a plan fits: what trainers, replicas and Ray Data need together, against what the cluster has."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from rayfm.config import CapacityError
from rayfm.config.nodes import NodeLabels, matches
from rayfm.data.cluster import Node
from rayfm.pipeline.config import PipelineConfig
from rayfm.training.config import TrainingConfig


@dataclasses.dataclass(frozen=True)
class Need:
    """CPUs and GPUs of one part of the plan, and the labels of the nodes that it runs on."""

    part: str
    cpus: float
    gpus: float = 0.0
    nodes: NodeLabels = dataclasses.field(default_factory=dict)


def needs(config: PipelineConfig, grown: bool = False) -> list[Need]:
    """What runs side by side: every trainer group, every teacher's replicas, and the room kept for Ray Data tasks.

    Args:
        config: the pipeline's config.
        grown: elastic trainers, and services that follow their load, at their largest; otherwise at their smallest.
    """
    found, nodes = [], config.ray.nodes

    def trainer(name: str, given: TrainingConfig) -> Need:
        training = _sized(given, grown)
        return Need(
            f"trainer {name} ({training.workers} x {training.cpus_per_worker:g})",
            training.workers * training.cpus_per_worker,
            training.workers * training.gpus_per_worker,
            training.nodes or nodes.training,
        )

    for name, teacher in config.teachers.items():
        found.append(trainer(name, teacher.training))
        serving = config.serving
        replicas = (grown and serving.max_replicas) or serving.replicas
        found.append(
            Need(
                f"service {name} ({serving.terms(replicas)})",
                replicas * serving.whole_cpus,
                replicas * serving.whole_gpus,
                serving.nodes or nodes.serving,
            )
        )
    for name in sorted({student.group for student in config.students.values()}):
        found.append(trainer(name, config.groups[name]))
    guarded = guarded_trainers(config)
    if config.promotion is not None and guarded:
        cpus = config.promotion.cpus
        found.append(Need(f"promotion ({guarded} x {cpus:g})", guarded * cpus, nodes=nodes.data))
    found.append(Need("Ray Data tasks", config.ray.data_cpus, nodes=nodes.data))
    return found


def guarded_trainers(config: PipelineConfig) -> int:
    """How many trainers' versions are guarded: so many tasks may score at once."""
    if config.promotion is None:
        return 0
    groups = {student.group for student in config.students.values()} if config.publish_students else set()
    teachers = len(config.teachers) if "teachers" in config.promotion.roles else 0
    return teachers + (len(groups) if "students" in config.promotion.roles else 0)


def _sized(training: TrainingConfig, grown: bool) -> TrainingConfig:
    if not grown or training.max_workers is None:
        return training
    return training.model_copy(update={"workers": training.max_workers})


def elastic_trainers(config: PipelineConfig) -> dict[str, TrainingConfig]:
    """Teachers and groups whose workers may become more, by name."""
    groups = sorted({student.group for student in config.students.values()})
    trainers = {name: teacher.training for name, teacher in config.teachers.items()}
    trainers |= {name: config.groups[name] for name in groups}
    return {name: t for name, t in trainers.items() if t.max_workers is not None and t.max_workers > t.workers}


def check_growth(config: PipelineConfig, cpus: float, gpus: float = 0.0) -> None:
    """Refuse elastic trainers that could grow over what the other parts need.

    Ray Train counts what a cluster's nodes have, less what other trainers asked for: what replicas and tasks hold it
    does not see, and a group that has grown over it waits for workers that find no place, and holds what others need.

    Args:
        config: the pipeline's config.
        cpus: of the cluster at its largest.
        gpus: likewise.

    Raises:
        CapacityError: with the arithmetic.
    """
    elastic = elastic_trainers(config)
    if not elastic:
        return
    wanted = needs(config, grown=True)
    for unit, have, amounts, each in (
        ("CPUs", cpus, [need.cpus for need in wanted], {n: t.cpus_per_worker for n, t in elastic.items()}),
        ("GPUs", gpus, [need.gpus for need in wanted], {n: t.gpus_per_worker for n, t in elastic.items()}),
    ):
        total = sum(amounts)
        if total <= have + 1e-9 or not any(each.values()):
            continue
        terms = _terms(wanted, amounts)
        advice = f"lower max_workers of {', '.join(elastic)}"
        if len(elastic) == 1:
            ((name, training),) = elastic.items()
            fits = (training.max_workers or 0) - math.ceil((total - have - 1e-9) / each[name])
            advice += (
                f" to {fits}" if fits > training.workers else f" (no more than its {fits} workers fit: leave it out)"
            )
            if fits < training.workers:
                advice = "take away what services may grow to (max_replicas), or max_workers"
        raise CapacityError(
            f"grown as far as it may, the plan takes {total:g} {unit} and Ray has {have:g} at its largest: {terms}. "
            f"Ray Train does not see what replicas hold, and would grow over it: {advice}, join a larger "
            f"cluster, or say how large it grows (ray.max_{unit.lower()})"
        )


def check_capacity(config: PipelineConfig, cpus: float, gpus: float = 0.0) -> None:
    """Refuse a plan that would deadlock for want of CPUs or GPUs, now or once its elastic trainers have grown.

    Raises:
        CapacityError: with the arithmetic.
    """
    for unit, total, have, terms in _short(needs(config), cpus, gpus):
        raise CapacityError(
            f"the plan needs {total:g} {unit} at once and Ray has {have:g}: {terms}; lower workers or "
            "cpus_per_worker, start Ray with more (--set ray.cpus=N), or join a larger cluster (ray.address)"
        )
    check_growth(config, cpus, gpus)


def check_nodes(config: PipelineConfig, nodes: Sequence[Node]) -> None:
    """Refuse a plan whose parts would wait for ever for nodes with their labels, or for room on them.

    A cluster that grows has its nodes later: where ``ray.max_cpus`` or ``ray.max_gpus`` says so, nothing is checked.

    Raises:
        CapacityError: naming the labels, and what the nodes have.
    """
    if any(config.ray.largest):
        return
    wanted: dict[tuple[tuple[str, str], ...], list[Need]] = {}
    for need in needs(config):
        if need.nodes:
            wanted.setdefault(tuple(sorted(need.nodes.items())), []).append(need)
    for selector, parts in wanted.items():
        labels = ", ".join(f"{key}: {value}" for key, value in selector)
        found = [node for node in nodes if matches(dict(selector), node.labels)]
        if not found:
            raise CapacityError(
                f"no node of the cluster has {{{labels}}}, where {', '.join(need.part for need in parts)} should run: "
                "start nodes with it (ray start --labels), mend ray.nodes, or, where an autoscaler brings them, say "
                "how large the cluster grows (ray.max_cpus, ray.max_gpus)"
            )
        cpus, gpus = sum(node.cpus for node in found), sum(node.gpus for node in found)
        for unit, total, have, terms in _short(parts, cpus, gpus):
            raise CapacityError(
                f"the plan needs {total:g} {unit} at once on nodes with {{{labels}}}, and the {len(found)} of them "
                f"have {have:g}: {terms}; lower workers, replicas or what each takes, start more such nodes, or, where "
                "an autoscaler brings them, say how large the cluster grows (ray.max_cpus, ray.max_gpus)"
            )


def _short(parts: Sequence[Need], cpus: float, gpus: float) -> Iterator[tuple[str, float, float, str]]:
    """What there is too little of: (unit, how much is needed, how much there is, the sum)."""
    for unit, have, amounts in (
        ("CPUs", cpus, [need.cpus for need in parts]),
        ("GPUs", gpus, [need.gpus for need in parts]),
    ):
        if sum(amounts) > have + 1e-9:
            yield unit, sum(amounts), have, _terms(parts, amounts)


def _terms(parts: Sequence[Need], amounts: Sequence[float]) -> str:
    """The sum, part by part."""
    return " + ".join(f"{amount:g} {need.part}" for need, amount in zip(parts, amounts, strict=True) if amount)
