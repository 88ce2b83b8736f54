"""UKDSL's tables (the paper's sections 4.1.2 and 4.3). Considerations are the simulator's."""

from __future__ import annotations

from rayfm.config import ConfigError
from rayfm.reproduce.parts import CLICK, student, teacher
from rayfm.reproduce.runner import Runner
from rayfm.reproduce.scope import SIMULATOR, Mapping, Scope
from rayfm.reproduce.splits import progressive
from rayfm.reproduce.study import Study
from rayfm.reproduce.table import TABLES, Contest, Result, Row, Table, judge

KINDS = ("impression", "consideration")


def _needs_considerations(scope: Scope, table: str) -> None:
    if scope.base["data"]["source"]["type"] != SIMULATOR:
        raise ConfigError(f"{table}: it needs considerations, which {scope.source} has not; run it on the simulator")


@TABLES.register("ukdsl-table1")
class UKDSLTable1(Table):
    """A stage that learns the next stage's logged predictions on considerations too."""

    title = "UKDSL Table 1: cross-stage distillation on considerations, against the next stage"
    source = SIMULATOR
    stages = {"retrieval": ("two_tower", "logged/early"), "early": ("fm", "logged/ranking")}
    """Student -> (model, whose logged predictions)."""
    paper = {
        ("impression", "none"): (1.01, None),
        ("impression", "cross_stage"): (1.03, None),
        ("consideration", "none"): (1.27, None),
        ("consideration", "cross_stage"): (1.12, None),
    }
    """(kind, method) -> calibration, NE (the paper gives its relative change: +0.01 % and -1.98 %)."""

    def studies(self, scope: Scope) -> list[Study]:
        _needs_considerations(scope, "ukdsl-table1")
        students = {}
        for name, (type_, stage) in self.stages.items():
            variants: Mapping = {"none": [], "cross_stage": [{"type": "cross_stage", "next_stage": stage}]}
            reference = {CLICK: f"{stage}/{CLICK}"}
            students[f"{name}_stage"] = student(scope, type_, variants, stage=name, reference=reference)
        return [Study("cascade", progressive(scope), students=students, consideration_share=1.0)]

    def fill(self, scope: Scope, runner: Runner) -> Result:
        rows, claims = [], []
        for name in self.stages:
            key = f"{name}_stage"
            comparison = runner.comparison(self.studies(scope), key)
            for kind in KINDS:
                contest = Contest(comparison, key, "ne", CLICK, kind)
                for method, label in (("none", "none"), ("cross_stage", "cross-stage")):
                    ours = contest.values(method, "calibration", "ne")
                    rows.append(Row((name, f"{kind}s", label), self.paper[kind, method], ours))
            for metric in ("miscalibration", "ne"):
                contest = Contest(comparison, key, metric, CLICK, "consideration")
                text = f"{name}: cross-stage ahead on considerations"
                claims.append(contest.better(text, "cross_stage", "none"))
        notes = [
            "On impressions against clicks, on considerations against the next stage's logged prediction. The paper's "
            "NE changes by +0.01 % on impressions and -1.98 % on considerations."
        ]
        return Result("ukdsl-table1", ("stage", "rows", "method"), ("calibration", "ne"), rows, judge(claims), notes)


@TABLES.register("ukdsl-table3")
class UKDSLTable3(Table):
    """A foundation model's labels on unlabelled rows: dependent task, auxiliary task, both."""

    title = "UKDSL Table 3: dependent task, auxiliary task, both, on unlabelled rows"
    source = SIMULATOR
    labels = {"none": "none", "dependent": "dependent", "auxiliary_task": "auxiliary", "both_tasks": "both"}

    def studies(self, scope: Scope) -> list[Study]:
        _needs_considerations(scope, "ukdsl-table3")
        dependent = [{"type": "dependent_task", "teacher": "dcnv2"}]
        auxiliary = [{"type": "auxiliary_task", "teacher": "dcnv2"}]
        variants: Mapping = {
            "none": [], "dependent": dependent, "auxiliary_task": auxiliary, "both_tasks": [*dependent, *auxiliary],
        }  # fmt: skip
        reference = {CLICK: f"truth/{CLICK}"}
        teachers = {"dcnv2": teacher(scope, "dcnv2", scope.tasks)}
        students = {"deepfm_unlabelled": student(scope, "deepfm", variants, reference=reference)}
        return [Study("cascade", progressive(scope), teachers, students, consideration_share=1.0)]

    def fill(self, scope: Scope, runner: Runner) -> Result:
        name = "deepfm_unlabelled"
        comparison = runner.comparison(self.studies(scope), name)
        contest = Contest(comparison, name, "ne", CLICK)
        considered = Contest(comparison, name, "ne", CLICK, "consideration")
        rows = [
            Row((label,), (None, None), (*contest.values(variant), *considered.values(variant)))
            for variant, label in self.labels.items()
        ]
        claims = [
            contest.better("dependent task ahead of none", "dependent", "none"),
            contest.better("auxiliary task ahead of none", "auxiliary_task", "none"),
            contest.better("both ahead of none", "both_tasks", "none"),
            contest.better("both ahead of the dependent task alone", "both_tasks", "dependent"),
        ]
        notes = [
            "NE on impressions, and on considerations against the true probability. The paper's relative changes on "
            "impressions: dependent -0.151 %, auxiliary -0.159 %, both -0.163 %."
        ]
        metrics = ("ne", "ne, considerations")
        return Result("ukdsl-table3", ("tasks",), metrics, rows, judge(claims), notes)
