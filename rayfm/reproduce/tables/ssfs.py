"""UKDSL's table of semi-supervised feature selection (the paper's section 4.2). Considerations are the simulator's."""

from __future__ import annotations

import hashlib
import json

from rayfm import __version__
from rayfm.config import ConfigError, validate
from rayfm.metrics import Comparison
from rayfm.metrics.intervals import Estimate, Sample, estimate
from rayfm.pipeline.config import PipelineConfig
from rayfm.reproduce import study as numbers
from rayfm.reproduce.parts import CLICK, model, student, teacher
from rayfm.reproduce.runner import Runner
from rayfm.reproduce.scope import SIMULATOR, Mapping, Scope
from rayfm.reproduce.splits import progressive
from rayfm.reproduce.study import Study, pipeline_mapping
from rayfm.reproduce.table import TABLES, Claim, Result, Row, Table, judge
from rayfm.selection.combine import WAYS

TEACHER, VARIANT = "dcnv2", "mixed"
ALL = "all"
"""Stands for the list of all candidates."""

KINDS = ("impression", "consideration")

GROUP, BATCH_PER_LANE = "selected", 16
"""The students' worker group, and its batch in rows a lane. With the tables' common batch, the simulator's warm-up days
are fewer steps than a learning rate takes to rise, and what a model has not learned has no importance."""

LABELS = {**WAYS, "union_of_size": "union of equal size", ALL: "all candidates"}

BASE = "impressions_only"
"""What the paper compares with."""


@TABLES.register("ukdsl-table2")
class UKDSLTable2(Table):
    """Six ways of combining the feature rankings of impressions and of considerations (SSFS)."""

    title = "UKDSL Table 2: feature rankings of impressions and considerations, combined"
    source = SIMULATOR
    paper = {
        "impressions_only": (0.0, 0.0),
        "considerations_only": (-0.023, -0.079),
        "average_rank": (0.209, -0.371),
        "average_importance": (-0.009, -0.094),
        "intersection": (0.018, -0.079),
        "union": (-0.137, -0.725),
    }
    """Way -> relative change of NE in percent, on impressions and on considerations."""

    def __init__(self) -> None:
        self.lists = {}

    def selection(self, scope: Scope, folder: str) -> PipelineConfig | None:
        if scope.base["data"]["source"]["type"] != SIMULATOR:
            raise ConfigError(
                f"ukdsl-table2: it needs considerations, which {scope.source} has not; run it on the simulator"
            )
        features = self._candidates(scope)
        quick = {"shuffles": 2, "sigmas": 0.0, "threshold": 0.0}
        select: Mapping = {
            "teacher": TEACHER,
            # The student's architecture, with embeddings and layers of a quarter of their widths.
            "model": {
                **model(scope, "deepfm", everything=True),
                "embedding_dim": 4,
                "hidden": [16] if scope.quick else [64, 32],
            },
            "batch_size": 256,
            "top_k": len(features) // 4,
            **(quick if scope.quick else {}),
        }
        study = self._study(scope, {ALL: features})
        mapping = pipeline_mapping(study, scope, folder, "ssfs") | {"select": select}
        # The students' seeds are those of the retrained ones: no other features are chosen for them.
        chosen_by = mapping | {"storage": "", "runs": "", "seeds": [], "evaluation": {}}
        code = json.dumps([chosen_by, __version__, numbers.NUMBERS], sort_keys=True)
        digest = hashlib.sha256(code.encode()).hexdigest()[:10]
        return validate(PipelineConfig, mapping | {"name": f"ssfs-{scope.source}-{digest}"}, "ukdsl-table2")

    def studies(self, scope: Scope) -> list[Study]:
        lists = {way: names for way, names in self.lists.items() if names} | {ALL: self._candidates(scope)}
        return [self._study(scope, lists)]

    def _study(self, scope: Scope, lists: dict[str, tuple[str, ...]]) -> Study:
        """A teacher, and a student for each different list."""
        batch = {"batch_size": BATCH_PER_LANE * scope.base["data"]["lanes"]}
        terms = [{"type": "direct", "teacher": TEACHER, "rows": "considerations"}]
        students = {}
        for names in lists.values():
            reference = {CLICK: f"truth/{CLICK}"}
            wide = student(scope, "deepfm", {VARIANT: terms}, reference=reference, group=GROUP)
            wide["model"]["features"] = sorted(names)
            students[_student(names)] = wide
        teachers = {TEACHER: teacher(scope, "dcnv2", (CLICK,), training=scope.base["training"] | batch)}
        schedule = self._schedule(scope)
        return Study("selection", schedule, teachers, students, consideration_share=1.0, groups={GROUP: batch})

    def _candidates(self, scope: Scope) -> tuple[str, ...]:
        return tuple(feature["name"] for feature in scope.base["schema"]["features"])

    def _schedule(self, scope: Scope) -> Mapping:
        """Progressive validation, with a warm-up long enough to select on."""
        schedule = progressive(scope)
        return {**schedule, "warmup": max(3, schedule["warmup"])}

    def fill(self, scope: Scope, runner: Runner) -> Result:
        lists = {**self.lists, ALL: self._candidates(scope)}
        names = {way: _student(features) for way, features in lists.items() if features}
        comparison = runner.comparison(self.studies(scope), *names.values())
        rows = []
        for way in (way for way in LABELS if way in lists):
            changes = [_percent(comparison, names.get(way), names.get(BASE), kind) for kind in KINDS]
            ours = tuple(None if change is None else estimate(change) for change in changes)
            rows.append(Row((LABELS[way], str(len(lists[way]))), self.paper.get(way, (None, None)), ours))

        def claim(text: str, better: str, worse: str, kind: str) -> Claim:
            pair = names.get(better), names.get(worse)
            return Claim(f"{text} on {kind}s", "ne", _difference(comparison, *pair, kind))

        claims = [
            claim("union ahead of IMP only", "union", BASE, "impression"),
            claim("union ahead of IMP only", "union", BASE, "consideration"),
            claim("CD only ahead of IMP only", "considerations_only", BASE, "consideration"),
            claim("average rank ahead of IMP only", "average_rank", BASE, "consideration"),
            claim("IMP only ahead of average rank", BASE, "average_rank", "impression"),
            claim("union ahead of average rank", "union", "average_rank", "consideration"),
        ]
        apart = [
            claim(f"{LABELS[better]} ahead of {other}", better, worse, kind)
            for better, worse, other in (("union_of_size", BASE, "IMP only"), (ALL, "union", "the union"))
            for kind in KINDS
        ]
        metrics = ("imp., %", "cons., %")
        return Result(
            "ukdsl-table2",
            ("features of", "#"),
            metrics,
            rows,
            judge(claims),
            self._notes(comparison, names),
            apart=judge(apart),
        )

    def _notes(self, comparison: Comparison, names: dict[str, str]) -> list[str]:
        """What the numbers are."""
        base = names.get(BASE, names[ALL])
        values = [comparison.value(base, VARIANT, "ne", CLICK, kind) for kind in KINDS]
        known: list[Estimate] = [value for value in values if value is not None]
        whose = LABELS[BASE] if BASE in names else LABELS[ALL]
        return [
            "Relative change of NE against IMP only; less is better. On impressions against clicks, on considerations "
            f"against the true probability. NE of {whose}: {', '.join(f'{value.value:.4f}' for value in known)}.",
            "Features are chosen once, on the warm-up periods; students are retrained with each list. The union has "
            "more features than the other lists; 'union of equal size' has not.",
        ]


def _student(features: tuple[str, ...]) -> str:
    """Name of the student with these features: equal lists are trained once."""
    return "ssfs_" + hashlib.sha256(" ".join(sorted(features)).encode()).hexdigest()[:8]


def _difference(comparison: Comparison, one: str | None, other: str | None, kind: str) -> Sample | None:
    """Difference of NE; None where a list is empty."""
    if one is None or other is None:
        return None
    return comparison.difference((one, VARIANT), (other, VARIANT), "ne", CLICK, kind)


def _percent(comparison: Comparison, one: str | None, other: str | None, kind: str) -> Sample | None:
    """Relative difference of NE in percent; None where a list is empty. The base's own error is left out: it is of
    second order."""
    difference = _difference(comparison, one, other, kind)
    if difference is None or other is None:
        return None
    base = comparison.value(other, VARIANT, "ne", CLICK, kind)
    if base is None:
        return None
    factor = 100 / base.value
    return Sample(factor * difference.points, factor * difference.replicates)
