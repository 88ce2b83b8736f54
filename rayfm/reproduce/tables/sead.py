"""SEAD's tables (its section 3): what the auxiliary head learns, and labels that a policy hides."""

from __future__ import annotations

from rayfm.reproduce.parts import CLICK, domains, student, teacher
from rayfm.reproduce.runner import Runner
from rayfm.reproduce.scope import Mapping, Scope
from rayfm.reproduce.splits import progressive
from rayfm.reproduce.study import Study
from rayfm.reproduce.table import TABLES, Claim, Contest, Result, Row, Table, judge

DOUBLE = "double_rate"
"""The worker group with twice the learning rates."""


def _self_auxiliary(**options: object) -> list[Mapping]:
    return [{"type": "self_auxiliary", **options}]


@TABLES.register("sead-table1")
class SEADTable1(Table):
    """Self-auxiliary distillation and its ablations, on two click models and one of a later signal."""

    title = "SEAD Table 1: self-auxiliary distillation and its ablations, AUC"
    models = {"pctr_1": ("deepfm", CLICK), "pctr_2": ("dlrm", CLICK), "pcvr": ("deepfm", "long_view")}
    variants: Mapping = {
        "none": [],
        "sead": _self_auxiliary(),
        "ogl": _self_auxiliary(selector="original"),
        "dtl": _self_auxiliary(selector="distilled"),
        "sga": _self_auxiliary(gradient_scale=0.0),
        "min": _self_auxiliary(selector="min"),
    }
    labels = {
        "none": "none",
        "sead": "max(y, y')",
        "ogl": "original labels (OGL)",
        "dtl": "distilled (DTL)",
        "sga": "no gradient (SGA)",
        "min": "min(y, y')",
    }
    paper = {
        "pctr_1": {"sead": 0.35, "ogl": 0.35, "lr": 0.03, "min": 0.20},
        "pctr_2": {"sead": 0.20, "min": -0.03},
        "pcvr": {"sead": 0.26, "ogl": 0.26, "lr": 0.22, "min": -0.05},
    }
    """Relative change of AUC in per cent, where the paper has a number."""

    def _models(self, scope: Scope) -> dict[str, tuple[str, str]]:
        return {name: (type_, task) for name, (type_, task) in self.models.items() if task in scope.tasks}

    def studies(self, scope: Scope) -> list[Study]:
        training = scope.base["training"]
        rates = {
            "tables": {**training["tables"], "lr": 2 * training["tables"]["lr"]},
            "dense": {**training["dense"], "lr": 2 * training["dense"]["lr"]},
        }
        students = {}
        for name, (type_, task) in self._models(scope).items():
            students[name] = student(scope, type_, self.variants, (task,))
            students[f"{name}_lr"] = student(scope, type_, {"none": []}, (task,), group=DOUBLE)
        return [Study("self", progressive(scope), students=students, groups={DOUBLE: rates})]

    def fill(self, scope: Scope, runner: Runner) -> Result:
        rows: list[Row] = []
        claims: list[Claim] = []
        for name, (_, task) in self._models(scope).items():
            comparison = runner.comparison(self.studies(scope), name, f"{name}_lr")
            contest = Contest(comparison, name, "auc", task)
            for variant, label in self.labels.items():
                rows.append(Row((name, label), (None,), contest.values(variant)))
            doubled = Contest(comparison, f"{name}_lr", "auc", task).values("none")
            rows.append(Row((name, "twice the rate (LR)"), (None,), doubled))
            claims += [
                contest.better(f"{name}: max(y, y') ahead of none", "sead", "none"),
                contest.better(f"{name}: max(y, y') ahead of distilled labels alone", "sead", "dtl"),
                contest.better(f"{name}: max(y, y') ahead of stopped gradients", "sead", "sga"),
                contest.better(f"{name}: max(y, y') ahead of min(y, y')", "sead", "min"),
            ]
        paper = "; ".join(
            f"{name}: " + ", ".join(f"{key} {value:+.2f} %" for key, value in numbers.items())
            for name, numbers in self.paper.items()
        )
        notes = [
            f"The paper's relative changes of AUC: {paper}; DTL and SGA are neutral, OGL and LR blow up in pctr_2."
        ]
        return Result("sead-table1", ("model", "auxiliary head learns"), ("auc",), rows, judge(claims), notes)


@TABLES.register("sead-table2")
class SEADTable2(Table):
    """Signal loss: positives of some traffics turn into false negatives, in training alone."""

    title = "SEAD Table 2: a teacher with an unbiased main head, a student on max(y, y')"
    kept = 0.2
    """Share of the affected traffics' positives that is still reported."""

    def _affected(self, scope: Scope) -> tuple[str, tuple[str, ...]]:
        """The traffic whose labels are whole, and those that lose theirs."""
        consenting, *others = domains(scope)
        return consenting, tuple(others)

    def studies(self, scope: Scope) -> list[Study]:
        consenting, affected = self._affected(scope)
        lost: Mapping = {"lost_labels": {"traffics": list(affected), "kept": self.kept}}
        objectives = [
            {"type": "supervised", "traffics": [consenting]},
            {"type": "self_auxiliary", "selector": "original", "traffics": list(affected)},
        ]
        teachers = {"consented": teacher(scope, "dcnv2", (CLICK,), objectives=objectives, **lost)}
        selected = {"type": "selected_label", "teacher": "consented", "traffics": list(affected)}
        variants: Mapping = {"none": [], "max": [selected], "distilled": [{**selected, "selector": "distilled"}]}
        students = {
            "deepfm_lost": student(scope, "deepfm", variants, **lost),
            "deepfm_whole": student(scope, "deepfm", {"none": []}),
        }
        return [Study("lost", progressive(scope), teachers, students)]

    def fill(self, scope: Scope, runner: Runner) -> Result:
        comparison = runner.comparison(self.studies(scope), "deepfm_lost", "deepfm_whole")
        contest = Contest(comparison, "deepfm_lost", "auc", CLICK)
        whole = Contest(comparison, "deepfm_whole", "auc", CLICK)
        labels = {"none": "on what is reported", "max": "max(y, y')", "distilled": "y' alone"}
        rows = [Row((label,), (None, None), contest.values(v, "auc", "calibration")) for v, label in labels.items()]
        rows.append(Row(("on all labels (bound)",), (None, None), whole.values("none", "auc", "calibration")))
        claims = [contest.better("max(y, y') ahead of training on what is reported", "max", "none")]
        consenting, affected = self._affected(scope)
        notes = [
            f"{1 - self.kept:.0%} of the positives of traffics {', '.join(affected)} are hidden from training, none of "
            f"{consenting}; scoring sees all. The paper's AUC rises by 17 %. Calibration is before the calibrator on "
            "aggregated counts, which cannot change AUC within one cell."
        ]
        return Result("sead-table2", ("student learns",), ("auc", "calibration"), rows, judge(claims), notes)
