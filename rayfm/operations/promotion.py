"""The guard before a promotion: is a new version worse than its predecessor on rows that neither has seen?

A pure decision over metric values; where they come from is `rayfm.serving.validation`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field, model_validator

from rayfm.config import Config

GuardedMetric = Literal["ne", "logloss", "calibration", "auc", "rmse"]
OF_REGRESSIONS = frozenset({"calibration", "rmse"})
"""Metrics that a regression has too; all are of binary tasks."""

Values = Mapping[tuple[str, str], float]
"""(task, metric) -> value."""


class PromotionRule(Config):
    """How much worse a new version may be in one metric."""

    metric: GuardedMetric = "ne"
    margin: float = Field(ge=0)
    """How much worse, in the metric's own units. Of ``calibration`` it is the distance from 1 that counts."""
    task: str | None = None
    """Only this task; by default every task that has the metric."""


class PromotionConfig(Config):
    """Which published versions may become current by themselves.

    A version is scored, beside its predecessor (the newest older version that was promoted), on the period after the
    last one that it was trained on. Where it is worse by more than a rule's margin it is published, but not promoted.
    """

    rules: tuple[PromotionRule, ...] = Field(min_length=1)
    """One that is broken is enough."""
    roles: tuple[Literal["students", "teachers"], ...] = Field(("students",), min_length=1)
    """Whose versions are guarded. A guarded teacher's labels come from its newest promoted version."""
    rows: int | None = Field(None, ge=1)
    """Score about so many impressions, the first of the period; by default all."""
    cpus: float = Field(0.25, gt=0)
    """CPUs of the task that scores a version; one for each guarded trainer runs at a time."""

    @model_validator(mode="after")
    def _once(self) -> PromotionConfig:
        seen: set[tuple[str, str | None]] = set()
        for rule in self.rules:
            if (rule.metric, rule.task) in seen:
                of = "every task" if rule.task is None else f"task {rule.task!r}"
                raise ValueError(f"two rules for {rule.metric} of {of}; leave one out")
            seen.add((rule.metric, rule.task))
        return self


class Figure(Config):
    """One comparison behind a decision."""

    task: str
    metric: GuardedMetric
    value: float | None
    """The new version's; None where it is undefined or not finite."""
    predecessor: float | None
    margin: float
    worse_by: float | None
    """How much worse the new version is, negative where it is better; None where that cannot be said."""
    broken: bool = False
    """Whether it is worse by more than the margin."""

    def __str__(self) -> str:
        if self.worse_by is None:
            words = "is undefined" if not self.broken else "is not finite"
            return f"{self.metric} of {self.task} {words}"
        way = "worse" if self.worse_by >= 0 else "better"
        return (
            f"{self.metric} of {self.task} is {self.value:.5f}, the predecessor's {self.predecessor:.5f}: "
            f"{way} by {abs(self.worse_by):.5f}, margin {self.margin:g}"
        )


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a version is promoted, with the comparisons."""

    promoted: bool
    reason: str
    figures: tuple[Figure, ...]


def badness(metric: GuardedMetric, value: float) -> float:
    """A metric as a number that is lower for a better model: the distance of calibration from 1, minus the AUC."""
    if metric == "calibration":
        return abs(value - 1)
    return -value if metric == "auc" else value


def judge(rules: Sequence[PromotionRule], tasks: Mapping[str, str], new: Values, old: Values) -> Verdict:
    """Compare a new version with its predecessor over the same rows.

    A rule is broken where ``badness(new) - badness(old) > margin``, or where the new version's value is not finite and
    the old one's is. A metric that is undefined for both (one class alone, no rows) says nothing.

    Args:
        rules: what is compared.
        tasks: task -> ``binary`` or ``regression``, of the tasks that the models have.
        new, old: the versions' metrics.
    """
    figures = []
    for rule in rules:
        for task, kind in tasks.items():
            if rule.task not in (None, task) or (kind != "binary" and rule.metric not in OF_REGRESSIONS):
                continue
            one, other = new.get((task, rule.metric), math.nan), old.get((task, rule.metric), math.nan)
            known, both = math.isfinite(other), math.isfinite(one) and math.isfinite(other)
            worse_by = badness(rule.metric, one) - badness(rule.metric, other) if both else None
            figures.append(
                Figure(
                    task=task,
                    metric=rule.metric,
                    value=one if math.isfinite(one) else None,
                    predecessor=other if known else None,
                    margin=rule.margin,
                    worse_by=worse_by,
                    broken=worse_by > rule.margin if worse_by is not None else known,
                )
            )
    broken = [figure for figure in figures if figure.broken]
    if broken:
        return Verdict(False, "; ".join(str(figure) for figure in broken), tuple(figures))
    if not any(figure.worse_by is not None for figure in figures):
        return Verdict(True, "nothing could be compared", tuple(figures))
    return Verdict(True, "; ".join(str(figure) for figure in figures if figure.worse_by is not None), tuple(figures))
