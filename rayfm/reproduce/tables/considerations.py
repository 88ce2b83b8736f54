"""What share of the considerations to train on, and which: cost against gain, on the simulator.

UKDSL section 4.1 learns from all of them, and section 5 names better sampling as future work; it has no such table.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from rayfm.config import ConfigError
from rayfm.metrics import Comparison
from rayfm.metrics.intervals import Estimate, Sample, estimate
from rayfm.reproduce.parts import CLICK, student
from rayfm.reproduce.runner import Runner
from rayfm.reproduce.scope import SIMULATOR, Mapping, Scope
from rayfm.reproduce.splits import progressive
from rayfm.reproduce.study import Study
from rayfm.reproduce.table import TABLES, Claim, Contest, Figure, Result, Row, Series, Table, judge

STAGES = {"retrieval": ("two_tower", "logged/early"), "early": ("fm", "logged/ranking")}
"""Stage -> (its student's model, whose logged predictions it learns): the next stage's."""

EQUIVALENT = 0.005
"""Largest relative change of NE on impressions that counts as none, fixed before any run: a quarter of what UKDSL gains
on considerations (1.98 %)."""

BUDGET = 0.74
"""Considerations for each impression, of all but the uniform policies: 30 % of the 2.47 that the simulator logs."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """One way to choose considerations."""

    label: str
    share: Mapping
    """A sampling policy, as in YAML. It is never the plain number 0, which would leave considerations unscored."""
    distilled: bool = True
    quick: bool = False
    """Part of a quick run too."""


def _uniform(share: float) -> Mapping:
    return {"type": "uniform", "share": share}


def _budgeted(type_: str, **options: object) -> Mapping:
    return {"type": type_, "budget": {"per_impression": BUDGET}, **options}


def _bands(retrieval: float, early: tuple[int, float, float], ranking: tuple[int, float, float]) -> Mapping:
    """Two bands for early and ranking: (last rank of the first, its share, the other's)."""
    bands: Mapping = {"retrieval": [{"share": retrieval}]}
    for stage, (through, near, far) in (("early", early), ("ranking", ranking)):
        bands[stage] = [{"through": through, "share": near}, {"share": far}]
    return bands


CHOICES = {
    "none": Choice("none", _uniform(0.0), distilled=False, quick=True),
    "impressions": Choice("impressions", _uniform(0.0)),
    "uniform_10": Choice("uniform .1", _uniform(0.1)),
    "uniform_30": Choice("uniform .3", _uniform(0.3), quick=True),
    "uniform_100": Choice("uniform 1", _uniform(1.0)),
    # The rows that ranking scored and did not show: the only ones that have its prediction.
    "by_stage": Choice("by stage", _budgeted("by_stage", shares={"retrieval": 0.0, "early": 0.0, "ranking": 1.0})),
    # Of early's ranks 21 to 40, and ranking's 4 to 20, the first nine and six; the last nine and six.
    "near_cut": Choice("near cut", _budgeted("by_rank", bands=_bands(0, (29, 1, 0), (9, 1, 0)))),
    "far": Choice("far", _budgeted("by_rank", bands=_bands(0, (31, 0, 1), (14, 0, 1)))),
    "importance": Choice("importance", _budgeted("importance", column="logged/early/click"), quick=True),
    "gap": Choice("by gap", _budgeted("importance", column="logged/early/click", minus="logged/retrieval/click")),
}
"""Variant -> how its considerations are chosen."""


def need_considerations(scope: Scope, table: str) -> None:
    """Refuse a source without considerations.

    Raises:
        ConfigError: it has none.
    """
    if scope.base["data"]["source"]["type"] != SIMULATOR:
        raise ConfigError(f"{table}: it needs considerations, which {scope.source} has not; run it on the simulator")


@TABLES.register("considerations-share")
class ConsiderationsShare(Table):
    """Cost against gain of ways to choose considerations, each learning the next stage's logged predictions."""

    title = "What share of the considerations to train on, and which: cost against gain"
    source = SIMULATOR

    def choices(self, scope: Scope) -> dict[str, Choice]:
        """The choices that this run compares."""
        return {name: choice for name, choice in CHOICES.items() if choice.quick or not scope.quick}

    def studies(self, scope: Scope) -> list[Study]:
        need_considerations(scope, "considerations-share")
        studies = []
        for name, choice in self.choices(scope).items():
            students = {}
            for stage, (type_, teacher) in STAGES.items():
                terms = [{"type": "cross_stage", "next_stage": teacher}] if choice.distilled else []
                reference = {CLICK: f"{teacher}/{CLICK}"}
                students[f"{stage}_share"] = student(scope, type_, {name: terms}, stage=stage, reference=reference)
            study = Study(f"considerations-{name}", progressive(scope), students=students)
            studies.append(dataclasses.replace(study, consideration_share=choice.share))
        return studies

    def fill(self, scope: Scope, runner: Runner) -> Result:
        choices, studies = self.choices(scope), self.studies(scope)
        costs = dict(zip(choices, costs_of(runner, studies, list(choices)), strict=True))
        rows, claims, series = [], [], []
        for stage in STAGES:
            key = f"{stage}_share"
            comparison = runner.comparison(studies, key)
            considered = Contest(comparison, key, "ne", CLICK, "consideration")
            shown = Contest(comparison, key, "ne", CLICK)
            for name, choice in choices.items():
                ours = (*costs[name], *considered.values(name, "calibration", "ne"), *shown.values(name))
                rows.append(Row((stage, choice.label), (None,) * len(ours), ours))
            claims += _claims(stage, considered, shown, choices)
            series += _series(stage, comparison, key, choices, {name: cost[0].value for name, cost in costs.items()})
        notes = [
            "per imp.: considerations trained on for each impression. CPU: of training, prediction left out, both "
            "stages and all seeds together, over that of 'none'. calibration, ne: on considerations, against the next "
            "stage's logged prediction; then NE on impressions, against clicks.",
            f"All but 'none' learn the next stage's logged predictions. From 'by stage' on, all have {BUDGET} "
            "considerations for each impression, as 'uniform .3' has; 'importance' and 'by gap' weigh by the inverse "
            "probability.",
        ]
        title = "NE on considerations gained over no distillation"
        figure = Figure(title, "considerations for each impression", "NE gained", tuple(series))
        metrics = ("per imp.", "CPU", "calibration", "ne", "ne, imp.")
        return Result("considerations-share", ("stage", "chosen"), metrics, rows, [], notes, figure, judge(claims))


def costs_of(runner: Runner, studies: list[Study], variants: list[str]) -> list[tuple[Estimate, Estimate]]:
    """For each study: considerations for each impression, and CPU time over that of the first, which reads none."""
    found = []
    for study, variant in zip(studies, variants, strict=True):
        records = runner.records(study, next(iter(study.students)), variant)
        found.append((sum(r.examples for r in records), sum(r.cpu_seconds for r in records)))
    impressions, seconds = found[0]
    return [
        (_exact(examples / impressions - 1), _exact(cpu / seconds if seconds else math.nan)) for examples, cpu in found
    ]


def _exact(value: float) -> Estimate:
    return Estimate(value, math.nan, math.nan, 1)


def gain(comparison: Comparison, key: str, variant: str) -> Sample | None:
    """NE on considerations of 'none' minus that of a variant: above 0 where the variant is better."""
    return comparison.difference((key, "none"), (key, variant), "ne", CLICK, "consideration")


def keeps_most(less: Sample, more: Sample, part: float = 0.5) -> Sample:
    """``less - part * more``: above 0 where a gain is more than ``part`` of another one."""
    return Sample(less.points - part * more.points, less.replicates - part * more.replicates)


def _claims(stage: str, considered: Contest, shown: Contest, choices: dict[str, Choice]) -> list[Claim]:
    claims = []
    comparison, key = considered.comparison, considered.student
    less, more = (gain(comparison, key, name) for name in ("uniform_30", "uniform_100"))
    if less is not None and more is not None:
        claims.append(Claim(f"{stage}: uniform .3 keeps over half of the gain of all", "gain", keeps_most(less, more)))
    questions = [
        ("uniform_30", "none"),
        ("uniform_30", "impressions"),
        ("by_stage", "uniform_30"),
        ("near_cut", "far"),
        ("importance", "uniform_30"),
        ("gap", "uniform_30"),
    ]
    for one, other in questions:
        if one in choices and other in choices:
            text = f"{stage}: {choices[one].label} ahead of {choices[other].label} on considerations"
            claims.append(considered.better(text, one, other))
    for name in ("uniform_30", "importance"):
        text = f"{stage}: {choices[name].label}, NE on impressions within {EQUIVALENT:.1%} of none's"
        claims.append(shown.equivalent(text, name, "none", EQUIVALENT))
    return claims


def _series(
    stage: str, comparison: Comparison, key: str, choices: dict[str, Choice], cost: dict[str, float]
) -> list[Series]:
    """The uniform shares as a line; of the early stage, every other choice as a point too."""
    drawn = [name for name in choices if name == "impressions" or name.startswith("uniform") or stage == "early"]
    gains = {name: gain(comparison, key, name) for name in drawn if name != "none"}
    points = {name: (cost[name], estimate(sample)) for name, sample in gains.items() if sample is not None}
    lines = {"uniform": [name for name in points if name == "impressions" or name.startswith("uniform")]}
    lines |= {choices[name].label: [name] for name in points if name not in lines["uniform"]}
    found = []
    for label, names in lines.items():
        x, y = zip(*(points[name] for name in names), strict=True) if names else ((), ())
        found.append(Series(f"{stage}, {label}", tuple(np.array(x, float).tolist()), tuple(y)))
    return found
