"""One foundation model as the teacher of all stages, against next-stage teachers (UKDSL section 5, future work)."""

from __future__ import annotations

from rayfm.reproduce.parts import CLICK, model, student, teacher
from rayfm.reproduce.runner import Runner
from rayfm.reproduce.scope import SIMULATOR, Mapping, Scope
from rayfm.reproduce.splits import progressive
from rayfm.reproduce.study import Study
from rayfm.reproduce.table import TABLES, Claim, Result, Row, Table, judge
from rayfm.reproduce.tables.considerations import EQUIVALENT, STAGES, need_considerations

FOUNDATION = "dcnv2"

REGIMES = {"none": "none", "next": "next stage", "foundation": "foundation"}
"""Who teaches both stages -> how the table says it."""


def _terms(stage: str, regime: str) -> list[Mapping]:
    """A stage's objective: it learns its teacher's predictions on impressions and considerations."""
    # The early stage of the same cascade teaches retrieval; ranking is production's, whose predictions are logged.
    source = {"next": {"retrieval": "early_next", "early": STAGES["early"][1]}[stage], "foundation": FOUNDATION}
    return [] if regime == "none" else [{"type": "cross_stage", "next_stage": source[regime]}]


def _early(scope: Scope, regime: str) -> Mapping:
    """The early stage as retrieval's next one: a teacher, so that it labels what retrieval is scored against."""
    terms = _terms("early", regime)
    own = {"model": model(scope, STAGES["early"][0]), "tasks": [CLICK], "objectives": terms}
    return own | ({"consideration_share": 1.0} if terms else {})


@TABLES.register("ukdsl-foundation")
class UKDSLFoundation(Table):
    """Cross-stage consistency where one foundation model teaches retrieval and early, and where the next stage does."""

    title = "UKDSL section 5: one foundation model for all stages, against next-stage teachers"
    source = SIMULATOR

    @staticmethod
    def student_name(stage: str, against: str, regime: str) -> str:
        """The student of a stage that is scored against ``next`` (its next stage) or ``truth`` on considerations."""
        return f"{stage}_{against}_{regime}"

    def references(self, scope: Scope) -> tuple[str, ...]:
        """What the stages are scored against; one alone in a quick run."""
        return ("next",) if scope.quick else ("next", "truth")

    def studies(self, scope: Scope) -> list[Study]:
        need_considerations(scope, "ukdsl-foundation")
        studies = []
        for against in self.references(scope):
            teachers = {FOUNDATION: teacher(scope, "dcnv2", scope.tasks)}
            teachers |= {f"early_{regime}": _early(scope, regime) for regime in REGIMES}
            students = {}
            for stage, (type_, logged) in STAGES.items():
                for regime in REGIMES:
                    next_stage = f"early_{regime}" if stage == "retrieval" else logged
                    reference = {CLICK: f"{next_stage if against == 'next' else 'truth'}/{CLICK}"}
                    variants = {regime: _terms(stage, regime)}
                    own = student(scope, type_, variants, stage=stage, reference=reference)
                    students[self.student_name(stage, against, regime)] = own
            if against == "truth":
                teachers = {name: teachers[name] for name in (FOUNDATION, "early_next")}
            study = Study(f"foundation-{against}", progressive(scope), teachers, students, consideration_share=1.0)
            studies.append(study)
        return studies

    def fill(self, scope: Scope, runner: Runner) -> Result:
        studies, references = self.studies(scope), self.references(scope)
        rows: list[Row] = []
        claims: list[Claim] = []
        for stage in STAGES:
            names = [self.student_name(stage, against, regime) for against in references for regime in REGIMES]
            comparison = runner.comparison(studies, *names)
            compared = [(against, "consideration", against) for against in references]
            for against, kind, label in [*compared, ("next", "impression", "clicks")]:
                models = {regime: (self.student_name(stage, against, regime), regime) for regime in REGIMES}
                for regime, called in REGIMES.items():
                    ours = [comparison.value(*models[regime], metric, CLICK, kind) for metric in ("calibration", "ne")]
                    rows.append(Row((stage, label, called), (None, None), tuple(ours)))
                metrics = ("miscalibration", "ne") if kind == "consideration" else ("ne",)
                for metric in metrics:
                    text = f"{stage}, against {label}: is the foundation model's student ahead of the next stage's?"
                    sample = comparison.difference(models["foundation"], models["next"], metric, CLICK, kind)
                    claims.append(Claim(text, metric, sample))
                if kind == "impression":
                    text = f"{stage}: is its NE on impressions within {EQUIVALENT:.1%} of no teacher's?"
                    pair = models["foundation"], models["none"]
                    sample = comparison.relative_difference(*pair, metrics[0], CLICK, kind)
                    claims.append(Claim(text, "ne, relative", sample, EQUIVALENT))
        notes = [
            "On considerations: 'next' is the next stage of the same cascade (for retrieval the early stage that has "
            "the same kind of teacher, one seed; for early production's ranking, as logged), 'truth' the simulator's "
            "probability. 'clicks': on impressions.",
            "The foundation model is a DCNv2 on all features, trained on impressions; it labels the next period.",
        ]
        labels = ("stage", "against", "teacher")
        return Result("ukdsl-foundation", labels, ("calibration", "ne"), rows, [], notes, apart=judge(claims))
