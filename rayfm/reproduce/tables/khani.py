"""The tables of Khani et al. (their section 3)."""

from __future__ import annotations

from rayfm.config import ConfigError
from rayfm.reproduce.parts import CLICK, METHOD_NAMES, auxiliary, direct, student, teacher
from rayfm.reproduce.runner import Runner
from rayfm.reproduce.scope import Mapping, Scope
from rayfm.reproduce.splits import progressive
from rayfm.reproduce.study import Study
from rayfm.reproduce.table import TABLES, Contest, Result, Row, Table, judge

VALUE = "watch_time"
"""The noisy regression that stands for the paper's E(LTV)."""


@TABLES.register("khani-table1")
class KhaniTable1(Table):
    """Auxiliary against direct distillation of a noisy regression."""

    title = "Khani et al. Table 1: auxiliary against direct distillation of a regression"
    paper = {"none": 12.21, "direct": 12.20, "auxiliary": 12.15}

    def studies(self, scope: Scope) -> list[Study]:
        if VALUE not in scope.tasks:
            raise ConfigError(f"khani-table1: {scope.source} has no task {VALUE!r}, the regression that it distils")
        only = {"tasks": [VALUE]}
        variants = {"none": [], "direct": direct("dcnv2_value", **only), "auxiliary": auxiliary("dcnv2_value", **only)}
        teachers = {"dcnv2_value": teacher(scope, "dcnv2", scope.has_tasks(CLICK, VALUE))}
        students = {"deepfm_value": student(scope, "deepfm", variants, scope.has_tasks(CLICK, VALUE))}
        return [Study("stream", progressive(scope), teachers, students)]

    def fill(self, scope: Scope, runner: Runner) -> Result:
        contest = Contest(runner.comparison(self.studies(scope), "deepfm_value"), "deepfm_value", "rmse", VALUE)
        rows = [Row((METHOD_NAMES[v],), (number,), contest.values(v)) for v, number in self.paper.items()]
        claims = [
            contest.better(f"auxiliary head ahead of {METHOD_NAMES[worse]}", "auxiliary", worse)
            for worse in ("direct", "none")
        ]
        notes = ["rmse is of the transformed value (log1p of seconds), which all models train on."]
        return Result("khani-table1", ("method",), ("rmse",), rows, judge(claims), notes)


@TABLES.register("khani-table2")
class KhaniTable2(Table):
    """A teacher twice and four times the size of its student."""

    title = "Khani et al. Table 2: teachers twice and four times the student's size"
    paper = {"none": 77.86, "twice": 78.02, "four": 78.06}

    def studies(self, scope: Scope) -> list[Study]:
        teachers = {}
        for name, scale in (("twice", 2.0), ("four", 4.0)):
            big = teacher(scope, "dcnv2", scope.has_tasks(CLICK, "long_view"))
            # The paper's teachers share the student's architecture and features; only their size differs.
            big["model"] = {**student(scope, "dcnv2", {})["model"], "scale": scale}
            teachers[name] = big
        variants: Mapping = {"none": []} | {name: auxiliary(name) for name in teachers}
        students = {"dcnv2_small": student(scope, "dcnv2", variants)}
        return [Study("stream", progressive(scope), teachers, students)]

    def fill(self, scope: Scope, runner: Runner) -> Result:
        comparison = runner.comparison(self.studies(scope), "dcnv2_small")
        contest = Contest(comparison, "dcnv2_small", "auc", CLICK)
        labels = {"none": "no teacher", "twice": "2x", "four": "4x"}
        rows = [Row((labels[v],), (number / 100,), contest.values(v)) for v, number in self.paper.items()]
        claims = [
            contest.better("2x teacher ahead of none", "twice", "none"),
            contest.better("4x teacher ahead of 2x", "four", "twice"),
        ]
        big = [comparison.value(teacher_name, "teacher", "auc", CLICK) for teacher_name in ("twice", "four")]
        known = [f"{value.value:.4f}" for value in big if value is not None]
        notes = [f"AUC of the teachers themselves, 2x and 4x: {', '.join(known)}; the paper's: .7834, .7865."]
        return Result("khani-table2", ("teacher",), ("auc",), rows, judge(claims), notes)


ENGAGEMENT, SATISFACTION = (CLICK, "long_view"), ("like", "follow")


@TABLES.register("khani-table3")
class KhaniTable3(Table):
    """Which tasks of a multi-task student to distil: engagement, satisfaction, or all."""

    title = "Khani et al. Table 3: which tasks to distil"

    def _sets(self, scope: Scope) -> dict[str, tuple[str, ...]]:
        first, second = scope.has_tasks(*ENGAGEMENT), scope.has_tasks(*SATISFACTION)
        return {"pet": first, "pet_pst": (*first, *second), "everything": scope.tasks}

    def studies(self, scope: Scope) -> list[Study]:
        variants: Mapping = {"none": []} | {
            n: auxiliary("dcnv2_all", tasks=list(t)) for n, t in self._sets(scope).items()
        }
        teachers = {"dcnv2_all": teacher(scope, "dcnv2", scope.tasks)}
        students = {"deepfm_tasks": student(scope, "deepfm", variants, scope.tasks)}
        return [Study("stream", progressive(scope), teachers, students)]

    def fill(self, scope: Scope, runner: Runner) -> Result:
        comparison = runner.comparison(self.studies(scope), "deepfm_tasks")
        satisfaction = (scope.has_tasks(*SATISFACTION) or (CLICK,))[0]
        first, second = (Contest(comparison, "deepfm_tasks", "auc", task) for task in (CLICK, satisfaction))
        labels = {"none": "none", "pet": "PET", "pet_pst": "PET + PST", "everything": "PET + PST + others"}
        rows = [
            Row((label,), (None, None), (*first.values(variant), *second.values(variant)))
            for variant, label in labels.items()
        ]
        claims = [
            contest.better(f"{labels[one]} ahead of {labels[other]} in AUC of {contest.task}", one, other)
            for contest, one, other in (
                (first, "pet", "none"),
                (first, "pet_pst", "pet"),
                (first, "pet_pst", "everything"),
                (second, "pet_pst", "none"),
            )
        ]
        notes = [
            f"PET: {', '.join(scope.has_tasks(*ENGAGEMENT))}; PST: {', '.join(scope.has_tasks(*SATISFACTION)) or '-'}. "
            "The paper's numbers are online metrics (engagement +0.75 %, +1.13 %, +0.85 %), not AUC."
        ]
        metrics = (f"auc {CLICK}", f"auc {satisfaction}")
        return Result("khani-table3", ("distilled",), metrics, rows, judge(claims), notes)
