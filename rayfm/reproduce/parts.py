"""The teachers, students and sets of objectives that several tables use."""

from __future__ import annotations

from typing import Any

from rayfm.config import ConfigError
from rayfm.reproduce.scope import Mapping, Scope

CLICK = "click"

_QUICK: dict[str, Mapping] = {
    "fm": {},
    "fmfm": {},
    "two_tower": {"hidden": [16], "vector_dim": 8},
    "dlrm": {"dense": [16], "over": [16]},
}
"""Sizes in a quick run, of the models that differ from ``hidden: [16]``."""


def model(scope: Scope, type_: str, *, everything: bool = False, **sizes: Any) -> Mapping:
    """A model's config: on the students' features, or on ``everything`` that the source has."""
    mapping: Mapping = {"type": type_, **sizes}
    if not everything:
        mapping["features"] = list(scope.cheap)
    if type_ == "two_tower":
        mapping["item_features"] = list(scope.item)
    if scope.quick:
        mapping |= {"embedding_dim": 4, **_QUICK.get(type_, {"hidden": [16]})}
    return mapping


def teacher(scope: Scope, type_: str, tasks: tuple[str, ...], **options: Any) -> Mapping:
    """A teacher on all features, with embeddings twice as wide as its students'."""
    sizes = {"low_rank": 64} if type_ == "dcnv2" else {}
    return {
        "model": model(scope, type_, everything=True, **({"embedding_dim": 32} | sizes)),
        "tasks": list(tasks),
        **options,
    }


def student(scope: Scope, type_: str, variants: Mapping, tasks: tuple[str, ...] = (CLICK,), **options: Any) -> Mapping:
    """A student on the students' features."""
    sizes = options.pop("sizes", {})
    return {"model": model(scope, type_, **sizes), "tasks": list(tasks), "variants": variants, **options}


def direct(teacher: str, **options: Any) -> list[Mapping]:
    """ExFM Eq. 2."""
    return [{"type": "direct", "teacher": teacher, **options}]


def auxiliary(teacher: str, **options: Any) -> list[Mapping]:
    """ExFM Eq. 3 to 5."""
    return [{"type": "auxiliary_head", "teacher": teacher, **options}]


def adapted(teacher: str, **options: Any) -> list[Mapping]:
    """The auxiliary head with the student adapter (ExFM Eq. 3 to 7)."""
    return [*auxiliary(teacher, **options), {"type": "student_adapter", "teacher": teacher, **options}]


DOMAINS = {"kuairand": ("1", "0", "4"), "simulator": ("feed", "video", "sidebar")}
"""Source -> three traffics that stand for domains, the largest first (of KuaiRand: tabs)."""


def domains(scope: Scope) -> tuple[str, ...]:
    """Up to three traffics that stand for a paper's domains.

    Raises:
        ConfigError: the source has one traffic alone.
    """
    found = DOMAINS.get(scope.source, scope.traffics[:3])
    if len(found) < 2:
        raise ConfigError(f"{scope.source} has one traffic, and this table compares several; run it on another source")
    return found


METHODS = {"direct": direct, "auxiliary": auxiliary, "aux_adapter": adapted}
"""Distillation methods in the order of ExFM's tables."""

METHOD_NAMES = {
    "none": "w/o distillation",
    "direct": "direct",
    "auxiliary": "auxiliary head",
    "aux_adapter": "aux. head + adapter",
}
