"""UKDSL's effect along a sweep of worlds whose undistilled baselines overestimate considerations more and more.

The worlds were chosen by their undistilled baselines alone, on `CALIBRATION_SEEDS`, and written down before any
distillation ran on them; the results are of `SEEDS`, which took no part in that.
"""

from __future__ import annotations

import dataclasses
import math

from rayfm.metrics.intervals import Estimate, estimate
from rayfm.reproduce.parts import CLICK, student
from rayfm.reproduce.runner import Runner
from rayfm.reproduce.scope import SIMULATOR, Mapping, Scope
from rayfm.reproduce.splits import progressive
from rayfm.reproduce.study import Study
from rayfm.reproduce.table import TABLES, Contest, Figure, Result, Row, Series, Table, judge
from rayfm.reproduce.tables.considerations import EQUIVALENT, STAGES, need_considerations

SIZE: Mapping = {"periods": 8, "requests_per_period": 3000}
"""Of every world of the sweep: smaller than the default one."""

QUICK_SIZE: Mapping = {"periods": 5, "requests_per_period": 150}

LEVELS: dict[str, Mapping] = {
    "exploring": {"exploration": 0.4},
    "default": {},
    "greedy": {"exploration": 0.0},
    "crowded": {"exploration": 0.0, "candidates": 400},
}
"""Level -> what its worlds change of the simulator's defaults. Frozen. Undistilled production models over ranking, on
considerations of the two calibration seeds: retrieval 1.12 and 1.13, 1.28 and 1.25, 1.33 and 1.30, 1.26 and 1.51;
early 1.01 and 1.07, 1.12 and 1.18, 1.14 and 1.26, 1.10 and 1.37."""

CALIBRATION_SEEDS = (20, 21)
SEEDS = (301, 302, 303, 304)
"""Of the worlds."""


def world(level: str, seed: int, quick: bool = False) -> Mapping:
    """The changes of the simulator's defaults that make one world of a level."""
    return {**(QUICK_SIZE if quick else SIZE), **LEVELS[level], "seed": seed}


@TABLES.register("ukdsl-sweep")
class UKDSLSweep(Table):
    """Calibration and NE of a stage against the next one, undistilled and distilled, over baselines from 1.05 on."""

    title = "UKDSL Table 1 along a sweep of worlds: undistilled baselines on considerations from 1.05 to 1.5"
    source = SIMULATOR

    def levels(self, scope: Scope) -> dict[str, tuple[int, ...]]:
        """Level -> the seeds of its worlds; few and small ones in a quick run."""
        return dict.fromkeys(list(LEVELS)[: 2 if scope.quick else None], SEEDS[:1] if scope.quick else SEEDS)

    def of_level(self, scope: Scope, level: str) -> list[Study]:
        """The studies of a level: one a world, each with one student seed."""
        days = dataclasses.replace(scope, periods=scope.periods[: (QUICK_SIZE if scope.quick else SIZE)["periods"]])
        studies = []
        for seed in self.levels(scope)[level]:
            students = {}
            for stage, (type_, teacher) in STAGES.items():
                variants: Mapping = {"none": [], "cross_stage": [{"type": "cross_stage", "next_stage": teacher}]}
                reference = {CLICK: f"{teacher}/{CLICK}"}
                students[f"{stage}_sweep"] = student(scope, type_, variants, stage=stage, reference=reference)
            study = Study(f"sweep-{level}-{seed}", progressive(days), students=students, consideration_share=1.0)
            studies.append(dataclasses.replace(study, world=world(level, seed, scope.quick), seeds=scope.seeds[:1]))
        return studies

    def studies(self, scope: Scope) -> list[Study]:
        need_considerations(scope, "ukdsl-sweep")
        return [study for level in self.levels(scope) for study in self.of_level(scope, level)]

    def fill(self, scope: Scope, runner: Runner) -> Result:
        rows, claims = [], []
        lines: dict[str, list[tuple[float, Estimate]]] = {stage: [] for stage in STAGES}
        for stage in STAGES:
            key = f"{stage}_sweep"
            for level in self.levels(scope):
                comparison = runner.over_worlds(self.of_level(scope, level), key)
                considered = Contest(comparison, key, "ne", CLICK, "consideration")
                shown = Contest(comparison, key, "ne", CLICK)
                before, after = (considered.values(name, "calibration")[0] for name in ("none", "cross_stage"))
                pair = (key, "cross_stage"), (key, "none")
                changes = [
                    comparison.relative_difference(*pair, "ne", CLICK, contest.kind) for contest in (considered, shown)
                ]
                estimates = [None if change is None else estimate(change) for change in changes]
                rows.append(Row((stage, level), (None,) * 4, (before, after, *estimates)))
                if before is not None and after is not None:
                    lines[stage].append((before.value, after))
                where = f"{stage}, {level}"
                for metric in ("miscalibration", "ne"):
                    contest = dataclasses.replace(considered, metric=metric)
                    claims.append(contest.better(f"{where}: ahead on considerations", "cross_stage", "none"))
                text = f"{where}: NE on impressions within {EQUIVALENT:.1%} of none's"
                claims.append(shown.equivalent(text, "cross_stage", "none", EQUIVALENT))
        worlds = ", ".join(map(str, next(iter(self.levels(scope).values()))))
        notes = [
            "Calibration on considerations, against the next stage's logged prediction: undistilled, distilled; then "
            "the relative change of NE there and on impressions. The paper: 1.27, 1.12, -.0198, +.0001.",
            f"Worlds of a level: seeds {worlds}, one student each; ± is half the 95 % interval over users and worlds.",
        ]
        series = [Series(stage, *_columns(points)) for stage, points in lines.items() if points]
        ends = sorted(x for points in lines.values() for x, _ in points)
        if ends:
            same = [(x, Estimate(x, math.nan, math.nan, 1)) for x in (ends[0], ends[-1])]
            series.append(Series("no change", *_columns(same)))
        figure = Figure("Calibration on considerations", "undistilled", "distilled", tuple(series))
        metrics = ("none", "distilled", "ne, cons.", "ne, imp.")
        return Result("ukdsl-sweep", ("stage", "level"), metrics, rows, judge(claims), notes, figure)


def _columns(points: list[tuple[float, Estimate]]) -> tuple[tuple[float, ...], tuple[Estimate, ...]]:
    return tuple(x for x, _ in points), tuple(y for _, y in points)
