"""ExFM's public tables and figures (the paper's section 4; numbers of its Tables 2, 4 and 5 on its own data)."""

from __future__ import annotations

import dataclasses
import itertools
import math

from rayfm.metrics import Comparison
from rayfm.metrics.intervals import estimate
from rayfm.reproduce.parts import CLICK, METHOD_NAMES, METHODS, adapted, auxiliary, domains, student, teacher
from rayfm.reproduce.runner import Runner
from rayfm.reproduce.scope import Mapping, Scope
from rayfm.reproduce.splits import exfm_slides, exfm_warmup, progressive
from rayfm.reproduce.study import Study
from rayfm.reproduce.table import TABLES, Claim, Contest, Figure, Result, Row, Series, Table, judge

TEACHERS = ("dmin", "dcn", "dcnv2")
STUDENTS = ("fm", "fmfm", "deepfm")

TABLE_2: dict[tuple[str, str], tuple[float, ...]] = {
    ("", "none"): (0.5389, 0.7228, 0.5477, 0.5388, 0.5488, 0.5713),
    ("dmin", "direct"): (0.5408, 0.6484, 0.5482, 0.5349, 0.5576, 0.2943),
    ("dmin", "auxiliary"): (0.5449, 0.6451, 0.5494, 0.5223, 0.5630, 0.2885),
    ("dmin", "aux_adapter"): (0.5462, 0.6411, 0.5521, 0.5208, 0.5648, 0.2871),
    ("dcn", "direct"): (0.5397, 0.6587, 0.5479, 0.5359, 0.5556, 0.3183),
    ("dcn", "auxiliary"): (0.5438, 0.6565, 0.5495, 0.5228, 0.5612, 0.2918),
    ("dcn", "aux_adapter"): (0.5458, 0.6449, 0.5517, 0.5213, 0.5624, 0.2901),
    ("dcnv2", "direct"): (0.5401, 0.6580, 0.5481, 0.5351, 0.5561, 0.3119),
    ("dcnv2", "auxiliary"): (0.5440, 0.6538, 0.5498, 0.5219, 0.5626, 0.2899),
    ("dcnv2", "aux_adapter"): (0.5463, 0.6401, 0.5525, 0.5199, 0.5639, 0.2879),
}
"""TaobaoAd: (teacher, method) -> AUC and logloss of FM, FmFM and DeepFM."""


@TABLES.register("exfm-table2")
class ExFMTable2(Table):
    """Three teachers, three students: none, direct, auxiliary head, and with the student adapter."""

    title = "ExFM Table 2: methods by teacher and student (paper: TaobaoAd)"

    def studies(self, scope: Scope) -> list[Study]:
        days = [*exfm_slides(scope), *([warmup] if (warmup := exfm_warmup(scope)) else [])]
        return [self._study(scope, schedule) for schedule in days]

    def _study(self, scope: Scope, schedule: dict[str, object]) -> Study:
        variants: Mapping = {"none": []} | {
            f"{method}-{name}": terms(name) for name in TEACHERS for method, terms in METHODS.items()
        }
        tasks = scope.has_tasks(CLICK, "long_view")
        return Study(
            f"split-{schedule['last']}",
            schedule,
            {name: teacher(scope, name, tasks) for name in TEACHERS},
            {name: student(scope, name, variants) for name in STUDENTS},
        )

    def fill(self, scope: Scope, runner: Runner) -> Result:
        studies = [self._study(scope, schedule) for schedule in exfm_slides(scope)]
        warmup = exfm_warmup(scope)
        rows: list[Row] = []
        claims: list[Claim] = []
        apart: list[Claim] = []
        chosen: list[str] = []
        for position, name in enumerate(STUDENTS):
            comparison = runner.comparison(studies, name)
            contest, ranked = (Contest(comparison, name, metric, CLICK) for metric in ("logloss", "auc"))
            early = runner.comparison([self._study(scope, warmup)], name) if warmup else None
            for (source, method), numbers in TABLE_2.items():
                ours = contest.values(f"{method}-{source}" if source else method, "auc", "logloss")
                labels = (name, source or "-", METHOD_NAMES[method])
                rows.append(Row(labels, numbers[2 * position : 2 * position + 2], ours))
            for source in TEACHERS:
                variants = {"none": "none"} | {method: f"{method}-{source}" for method in METHODS}
                pair = f"{source} -> {name}"
                for worse, good in itertools.pairwise(variants):
                    text = f"{pair}: {METHOD_NAMES[good]} ahead of {METHOD_NAMES[worse]}"
                    claims += [each.better(text, variants[good], variants[worse]) for each in (ranked, contest)]
                if early is not None:
                    best = _best(early, name, [variants[method] for method in METHODS])
                    chosen.append(f"{pair}: {best.removesuffix(f'-{source}')}")
                    text = f"{pair}: the variant chosen on the warm-up days ahead of none"
                    apart.append(contest.better(text, best, "none"))
        notes = ["Chosen on the warm-up slide by logloss: " + "; ".join(chosen) + "."] if chosen else []
        labels, metrics = ("student", "teacher", "method"), ("auc", "logloss")
        return Result("exfm-table2", labels, metrics, rows, judge(claims), notes, apart=judge(apart))


def _best(comparison: Comparison, student: str, variants: list[str]) -> str:
    """The variant of least logloss."""
    values = {variant: comparison.value(student, variant, "logloss", CLICK) for variant in variants}
    return min(values, key=lambda variant: math.inf if (e := values[variant]) is None else e.value)


Numbers = tuple[float | None, float | None]
"""AUC and logloss."""

TABLE_4: tuple[tuple[Numbers, Numbers], ...] = (
    ((0.5025, 2.2831), (0.5416, 1.8964)),
    ((0.5024, 2.5663), (0.5306, 1.8812)),
    ((0.4923, 3.6295), (0.5456, 1.9003)),
)
"""Domain -> without, with."""

TABLE_5: dict[str, tuple[Numbers, Numbers]] = {
    CLICK: ((0.7034, 0.4693), (0.7101, 0.4678)),
    "follow": ((0.7613, 0.00891), (0.7743, 0.00885)),
    "like": ((0.8531, 0.01871), (0.8647, 0.01869)),
}


@dataclasses.dataclass(frozen=True)
class _Part:
    """One student of a table with and without a teacher."""

    label: str
    student: str
    task: str
    paper: tuple[Numbers, Numbers]
    """Without, with."""


def _with_and_without(table: str, what: str, studies: list[Study], runner: Runner, parts: list[_Part]) -> Result:
    rows, claims = [], []
    for part in parts:
        comparison = runner.comparison(studies, part.student)
        for name, variant, paper in (("w/o FM", "none", part.paper[0]), ("with FM", "aux_adapter", part.paper[1])):
            ours = Contest(comparison, part.student, "auc", part.task).values(variant, "auc", "logloss")
            rows.append(Row((part.label, name), paper, ours))
        for metric in ("auc", "logloss"):
            contest = Contest(comparison, part.student, metric, part.task)
            text = f"{what} {part.label}: with the teacher ahead in {metric}"
            claims.append(contest.better(text, "aux_adapter", "none"))
    return Result(table, (what, "method"), ("auc", "logloss"), rows, judge(claims), [])


@TABLES.register("exfm-table4")
class ExFMTable4(Table):
    """One teacher for students of several domains, each an FM on its own domain's rows."""

    title = "ExFM Table 4: one teacher, students of three domains (paper: TaobaoAd)"

    def studies(self, scope: Scope) -> list[Study]:
        variants = {"none": [], "aux_adapter": adapted("dmin")}
        students = {f"fm_{domain}": student(scope, "fm", variants, traffics=[domain]) for domain in domains(scope)}
        teachers = {"dmin": teacher(scope, "dmin", scope.has_tasks(CLICK, "long_view"))}
        return [Study(f"split-{days['last']}", days, teachers, students) for days in exfm_slides(scope)]

    def fill(self, scope: Scope, runner: Runner) -> Result:
        parts = [_Part(d, f"fm_{d}", CLICK, TABLE_4[i]) for i, d in enumerate(domains(scope))]
        return _with_and_without("exfm-table4", "domain", self.studies(scope), runner, parts)


@TABLES.register("exfm-table5")
class ExFMTable5(Table):
    """One multi-task teacher (hard-shared) for students of one task each."""

    title = "ExFM Table 5: one teacher, students of three tasks (paper: KuaiVideo)"

    def studies(self, scope: Scope) -> list[Study]:
        tasks = self._tasks(scope)
        variants = {"none": [], "aux_adapter": adapted("dmin_tasks")}
        students = {f"fm_task_{task}": student(scope, "fm", variants, (task,)) for task in tasks}
        teachers = {"dmin_tasks": teacher(scope, "dmin", tasks)}
        return [Study(f"split-{days['last']}", days, teachers, students) for days in exfm_slides(scope)]

    def _tasks(self, scope: Scope) -> tuple[str, ...]:
        binary = [task["name"] for task in scope.base["schema"]["tasks"] if task["kind"] == "binary"]
        return scope.has_tasks(*TABLE_5) if len(scope.has_tasks(*TABLE_5)) > 1 else tuple(binary)

    def fill(self, scope: Scope, runner: Runner) -> Result:
        unknown: tuple[Numbers, Numbers] = ((None, None), (None, None))
        parts = [_Part(task, f"fm_task_{task}", task, TABLE_5.get(task, unknown)) for task in self._tasks(scope)]
        result = _with_and_without("exfm-table5", "task", self.studies(scope), runner, parts)
        if "follow" in self._tasks(scope) and scope.source == "kuairand":
            result.notes.append("follow has few positives in KuaiRand: read its rows with its intervals.")
        return result


STAGES = (("retrieval", "two_tower"), ("early", "two_tower"), ("ranking", "dlrm"))


@TABLES.register("exfm-fig6")
class ExFMFig6(Table):
    """One teacher for students of three stages: a small two-tower, a wider one, a DLRM."""

    title = "ExFM Figure 6: one teacher, students of three stages (paper: internal data)"

    def studies(self, scope: Scope) -> list[Study]:
        variants = {"none": [], "aux_adapter": adapted("dcnv2")}
        wide = {} if scope.quick else {"hidden": [512, 256], "vector_dim": 128}
        students = {
            stage: student(scope, type_, variants, stage=stage, sizes=wide if stage == "early" else {})
            for stage, type_ in STAGES
        }
        teachers = {"dcnv2": teacher(scope, "dcnv2", scope.has_tasks(CLICK, "long_view"))}
        return [Study("stream", progressive(scope), teachers, students)]

    def fill(self, scope: Scope, runner: Runner) -> Result:
        rows, claims, gains = [], [], {}
        for stage, _ in STAGES:
            contest = Contest(runner.comparison(self.studies(scope), stage), stage, "ne", CLICK)
            for variant in ("none", "aux_adapter"):
                rows.append(Row((stage, METHOD_NAMES[variant]), (None,), contest.values(variant)))
            claims.append(contest.better(f"{stage}: with the teacher ahead", "aux_adapter", "none"))
            gains[stage] = claims[-1].sample
        first, last = gains["retrieval"], gains["ranking"]
        both = first - last if first is not None and last is not None else None
        claims.append(Claim("the earlier stage gains more: retrieval against ranking", "ne", both))
        series = [(i, s) for i, (stage, _) in enumerate(STAGES) if (s := gains[stage]) is not None]
        line = Series("aux. head + adapter", tuple(float(i) for i, _ in series), tuple(estimate(s) for _, s in series))
        figure = Figure("NE against none, by stage", "", "NE difference", (line,), tuple(stage for stage, _ in STAGES))
        return Result("exfm-fig6", ("stage", "method"), ("ne",), rows, judge(claims), [], figure)


@TABLES.register("exfm-fig9")
class ExFMFig9(Table):
    """A teacher that stops training: what it is still worth, with and without the adapter."""

    title = "ExFM Figure 9: a teacher that stopped training, with and without the adapter"

    def _stops(self, scope: Scope) -> dict[str, tuple[str | None, float]]:
        """Teacher -> (last period it trains on, its mean age in days over the test periods)."""
        days = progressive(scope)
        periods = scope.periods[: scope.periods.index(days["last"]) + 1]
        warmup, tests = days["warmup"], len(periods) - days["warmup"]
        stops: dict[str, tuple[str | None, float]] = {"dmin_fresh": (None, 1.0)}
        for back in (1,) if scope.quick else (1, 3):
            if warmup - back >= 1:
                # Trained through periods[warmup - back]; test period j lies j + back days later.
                age = back + (tests - 1) / 2
                stops[f"dmin_{back}_before"] = (periods[warmup - back], age)
        return stops

    def studies(self, scope: Scope) -> list[Study]:
        tasks = scope.has_tasks(CLICK, "long_view")
        stops = self._stops(scope)
        teachers = {n: teacher(scope, "dmin", tasks, **({"through": t} if t else {})) for n, (t, _) in stops.items()}
        variants: Mapping = {"none": []}
        for name in stops:
            variants |= {f"auxiliary-{name}": auxiliary(name), f"aux_adapter-{name}": adapted(name)}
        return [Study("stale", progressive(scope), teachers, {"fm": student(scope, "fm", variants)})]

    def fill(self, scope: Scope, runner: Runner) -> Result:
        contest = Contest(runner.comparison(self.studies(scope), "fm"), "fm", "ne", CLICK)
        stops = self._stops(scope)
        rows = [Row(("-", METHOD_NAMES["none"]), (None, None), contest.values("none", "auc", "ne"))]
        claims, lines = [], []
        fresh, *stale = stops
        for method in ("auxiliary", "aux_adapter"):
            points = []
            for name, (_, age) in stops.items():
                ours = contest.values(f"{method}-{name}", "auc", "ne")
                rows.append(Row((f"{age:g} d", METHOD_NAMES[method]), (None, None), ours))
                if ours[0] is not None:
                    points.append((age, ours[0]))
            lines.append(Series(METHOD_NAMES[method], tuple(x for x, _ in points), tuple(y for _, y in points)))
            text = f"{METHOD_NAMES[method]}: a fresh teacher ahead of the stalest"
            claims.append(contest.better(text, f"{method}-{fresh}", f"{method}-{stale[-1]}"))
        for name, (_, age) in stops.items():
            text = f"teacher {age:g} d old: the adapter adds to the auxiliary head"
            claims.append(contest.better(text, f"aux_adapter-{name}", f"auxiliary-{name}"))
        figure = Figure("AUC by the teacher's age", "mean age of the teacher, days", "AUC", tuple(lines))
        return Result("exfm-fig9", ("age", "method"), ("auc", "ne"), rows, judge(claims), [], figure)


BIASES: dict[str, str] = {
    "fresh": "fresh, calibrated",
    "shifted": "+0.7 on its logits",
    "stale": "stopped before the test days",
    "foreign": "another domain's",
}
"""Teacher -> what is wrong with it."""


@TABLES.register("teacher-bias")
class TeacherBias(Table):
    """Direct distillation, auxiliary head and adapter, as the teacher's bias grows."""

    title = "ExFM sections 3.3 and 3.4: what the auxiliary head and the adapter do about a biased teacher"

    def _teachers(self, scope: Scope) -> Mapping:
        tasks, days = scope.has_tasks(CLICK, "long_view"), progressive(scope)
        last_warmup = scope.periods[days["warmup"] - 1]
        foreign = domains(scope)[-1]
        return {
            "fresh": teacher(scope, "dcnv2", tasks),
            "shifted": teacher(scope, "dcnv2", tasks, logit_shift=0.7),
            "stale": teacher(scope, "dcnv2", tasks, through=last_warmup),
            "foreign": teacher(scope, "dcnv2", tasks, traffics=[foreign]),
        }

    def studies(self, scope: Scope) -> list[Study]:
        teachers = self._teachers(scope)
        variants: Mapping = {"none": []}
        for name in teachers:
            variants |= {f"{method}-{name}": terms(name) for method, terms in METHODS.items()}
        students = {name: student(scope, name, variants) for name in ("fm", "deepfm")}
        return [Study("bias", progressive(scope), teachers, students)]

    def fill(self, scope: Scope, runner: Runner) -> Result:
        rows, claims = [], []
        for name in ("fm", "deepfm"):
            comparison = runner.comparison(self.studies(scope), name)
            contest, mean = (Contest(comparison, name, metric, CLICK) for metric in ("ne", "miscalibration"))
            rows.append(
                Row((name, "-", METHOD_NAMES["none"]), (None, None), contest.values("none", "ne", "calibration"))
            )
            for source in BIASES:
                for method in METHODS:
                    ours = contest.values(f"{method}-{source}", "ne", "calibration")
                    rows.append(Row((name, source, METHOD_NAMES[method]), (None, None), ours))
                if source == "fresh":
                    continue
                where = f"{name}, {source} teacher"
                good, bad, best = (f"{method}-{source}" for method in ("auxiliary", "direct", "aux_adapter"))
                claims += [
                    contest.better(f"{where}: auxiliary head ahead of direct", good, bad),
                    mean.better(f"{where}: auxiliary head better calibrated than direct", good, bad),
                    contest.better(f"{where}: the adapter adds to the auxiliary head", best, good),
                ]
        notes = ["; ".join(f"{name}: {text}" for name, text in BIASES.items()) + "."]
        return Result(
            "teacher-bias", ("student", "teacher", "method"), ("ne", "calibration"), rows, judge(claims), notes
        )


GRID = tuple((lw, ls, gs) for lw in (1, 10, 100) for ls in (1, 10) for gs in (1, 10))


@TABLES.register("exfm-fig12")
class ExFMFig12(Table):
    """The grid of loss weight, label scale and gradient scale of the auxiliary head."""

    title = "ExFM Figure 12: loss weight, label scale, gradient scale (paper: TaobaoAd)"

    def studies(self, scope: Scope) -> list[Study]:
        variants: Mapping = {"none": []} | {
            f"lw{lw}-ls{ls}-gs{gs}": auxiliary("dcnv2", weight=lw, label_scale=ls, gradient_scale=gs)
            for lw, ls, gs in GRID
        }
        teachers = {"dcnv2": teacher(scope, "dcnv2", scope.has_tasks(CLICK, "long_view"))}
        return [
            Study(f"split-{days['last']}", days, teachers, {"fm_grid": student(scope, "fm", variants)})
            for days in exfm_slides(scope)
        ]

    def fill(self, scope: Scope, runner: Runner) -> Result:
        contest = Contest(runner.comparison(self.studies(scope), "fm_grid"), "fm_grid", "logloss", CLICK)

        def row(labels: tuple[str, ...], variant: str) -> Row:
            return Row(labels, (None, None), contest.values(variant, "auc", "logloss"))

        rows = [row(("-", "-", "-"), "none")]
        rows += [row((f"{lw}", f"{ls}", f"{gs}"), f"lw{lw}-ls{ls}-gs{gs}") for lw, ls, gs in GRID]
        claims = [
            contest.better("LW = LS = GS = 1 ahead of none", "lw1-ls1-gs1", "none"),
            contest.better("LW = LS = GS = 10 worse than none", "none", "lw10-ls10-gs10"),
            contest.better("LW = 100, LS = GS = 1 worse than none", "none", "lw100-ls1-gs1"),
        ]
        return Result("exfm-fig12", ("LW", "LS", "GS"), ("auc", "logloss"), rows, judge(claims), [])
