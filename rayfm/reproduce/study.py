"""A study: teachers and students over some days of a source. Tables say which they need; equal ones are run once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable

from rayfm import __version__
from rayfm.config import ConfigError, validate
from rayfm.pipeline.config import PipelineConfig
from rayfm.pipeline.opening import OPERATIONS
from rayfm.reproduce.scope import Mapping, Scope

NUMBERS = 3
"""Raise it with every change of the code that changes a number of a table: of a source, model, objective, trainer or
metric. What was prepared and trained before is not found any more then."""


@dataclasses.dataclass(frozen=True)
class Study:
    """One pipeline to run; ``teachers`` and ``students`` are as in a pipeline's YAML."""

    name: str
    schedule: Mapping
    teachers: dict[str, Mapping] = dataclasses.field(default_factory=dict)
    students: dict[str, Mapping] = dataclasses.field(default_factory=dict)
    consideration_share: float | Mapping = 0.0
    """A share, or a sampling policy as in YAML. Where it is not 0, all considerations are scored."""
    groups: dict[str, Mapping] = dataclasses.field(default_factory=dict)
    """Worker groups besides ``students``, as changes of the common training."""
    publish: bool = False
    """Whether students are published after each period, for tables that ask them for more than their metrics."""
    world: Mapping = dataclasses.field(default_factory=dict)
    """Changes of the source's config, for a study in a world of its own: such as another seed of the simulator."""
    seeds: tuple[int, ...] | None = None
    """Student seeds, if not the scope's."""

    @property
    def variants(self) -> list[tuple[str, str]]:
        """(student, variant) of all that it trains."""
        return [(name, variant) for name, student in self.students.items() for variant in student["variants"]]

    def only(self, wanted: Iterable[tuple[str, str]]) -> Study:
        """The study with those variants alone."""
        wanted = set(wanted)
        students = {}
        for name, student in self.students.items():
            variants = {v: terms for v, terms in student["variants"].items() if (name, v) in wanted}
            if variants:
                students[name] = {**student, "variants": variants}
        return dataclasses.replace(self, students=students)


def merge(studies: Iterable[Study]) -> list[Study]:
    """Studies of one name as one, so that they share teachers, labels and readers.

    Raises:
        ConfigError: two of one name differ in a teacher, a student's model, a variant or the days.
    """
    merged: dict[str, Study] = {}
    for study in studies:
        into = merged.get(study.name)
        if into is None:
            merged[study.name] = study
            continue
        alike = ("schedule", "consideration_share", "world", "seeds")
        if any(getattr(into, name) != getattr(study, name) for name in alike):
            raise ConfigError(f"study {study.name!r} is defined twice with different days, rows or seeds; rename one")
        if into.publish != study.publish:
            raise ConfigError(f"study {study.name!r} publishes its students in one table alone; rename one")
        students = dict(into.students)
        for name, student in study.students.items():
            if name not in students:
                students[name] = student
                continue
            before = students[name]
            if {k: v for k, v in before.items() if k != "variants"} != {
                k: v for k, v in student.items() if k != "variants"
            }:
                raise ConfigError(f"study {study.name!r}: student {name!r} is defined twice, differently; rename one")
            students[name] = {**before, "variants": _union(study.name, before["variants"], student["variants"])}
        merged[study.name] = dataclasses.replace(
            into,
            teachers=_union(study.name, into.teachers, study.teachers),
            students=students,
            groups=_union(study.name, into.groups, study.groups),
        )
    return list(merged.values())


def _union(study: str, one: Mapping, other: Mapping) -> Mapping:
    for name in one.keys() & other.keys():
        if one[name] != other[name]:
            raise ConfigError(f"study {study!r}: {name!r} is defined twice, differently; rename one")
    return {**one, **other}


def pipeline_mapping(study: Study, scope: Scope, folder: str, run: str) -> Mapping:
    """The study as a pipeline's YAML, with its run called ``run`` below ``folder``."""
    training, data = scope.base["training"], scope.base["data"]
    teachers = {name: {"training": training, **teacher} for name, teacher in study.teachers.items()}
    mapping: Mapping = {
        "name": run,
        "storage": f"{folder}/data/{scope.source}{'-quick' if scope.quick else ''}-{NUMBERS}{_suffix(study.world)}",
        "runs": f"{folder}/runs",
        "seeds": list(study.seeds or scope.seeds),
        "data": {**data, "source": {**data["source"], **study.world}},
        "schema": scope.base["schema"],
        "schedule": study.schedule,
        "teachers": teachers,
        "groups": {
            name: {**training, **changes}
            for name, changes in {"students": {}, **study.groups}.items()
            if any(student.get("group", "students") == name for student in study.students.values())
        },
        "students": study.students,
        "consideration_share": study.consideration_share,
        "publish_students": study.publish,
        "evaluation": {
            "replicates": scope.replicates,
            "consideration_share": 1.0 if study.consideration_share else 0.0,
        },
    }
    return mapping


def _suffix(world: Mapping) -> str:
    """Of the folder of a world's examples."""
    return "-" + hashlib.sha256(json.dumps(world, sort_keys=True).encode()).hexdigest()[:8] if world else ""


def study_config(study: Study, scope: Scope, folder: str, run: str) -> PipelineConfig:
    """The study as a validated pipeline."""
    return validate(PipelineConfig, pipeline_mapping(study, scope, folder, run), f"study {study.name}")


def fingerprint(study: Study, scope: Scope, student: str, variant: str) -> str:
    """A hash of all that one variant's numbers depend on, the code included; equal ones are not trained again.

    Whether other students are trained beside it does not matter: they share no parameter and no random number.
    """
    config = study_config(study.only([(student, variant)]), scope, "", "x")
    dump = config.dump()
    read = {
        column.partition("/")[0]
        for part in config.students.values()
        for terms in part.variants.values()
        for term in terms
        for column in term.supervision(config.tasks_of(part))
    }
    read |= {column.partition("/")[0] for column in config.students[student].reference.values()}
    for name in reversed(config.teacher_order()):  # each before those that it learns from
        if name in read:
            read |= set(config.teachers_read(config.teachers[name]))
    dump["teachers"] = {name: teacher for name, teacher in dump["teachers"].items() if name in read}
    for key in ("ray", "serving", "runs", "storage", "label_store", "name", "select", *OPERATIONS):
        dump.pop(key)
    dump["code"] = [__version__, NUMBERS]
    text = json.dumps(dump, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
