"""What a reproduced table is: studies to run, the paper's numbers beside ours, and the paper's claims as tests."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

from rayfm.config import Registry
from rayfm.metrics import LOWER_IS_BETTER, Comparison
from rayfm.metrics.intervals import CONFIDENCE, Estimate, Sample, estimate, holm, p_value
from rayfm.pipeline.config import PipelineConfig
from rayfm.reproduce.runner import Runner
from rayfm.reproduce.scope import Scope
from rayfm.reproduce.study import Study

TABLES = Registry("table", "rayfm.reproduce.tables")

Verdict = Literal["held", "not", "open"]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table: what it is, the paper's numbers, ours."""

    labels: tuple[str, ...]
    paper: tuple[float | None, ...]
    """One a metric of the table; None where the paper has none."""
    ours: tuple[Estimate | None, ...]


@dataclasses.dataclass(frozen=True)
class Claim:
    """A sign that the paper reports (or that is tested beside its own), and the measured difference behind it."""

    text: str
    metric: str
    sample: Sample | None
    """What is said to be better minus what is said to be worse; None where it could not be measured."""
    margin: float | None = None
    """Of a claim of equivalence: the difference lies between -margin and margin."""

    @property
    def sign(self) -> int:
        """Of the difference, if the claim is true."""
        return -1 if self.metric in LOWER_IS_BETTER else 1


@dataclasses.dataclass(frozen=True)
class Judged:
    """A claim with its estimate, the p value corrected for those that are judged with it, and what follows."""

    claim: Claim
    estimate: Estimate | None
    p: float
    verdict: Verdict
    """``held``: the paper's sign, significant; ``not``: the other sign, significant; ``open``: neither. Of equivalence:
    significantly within the margin, significantly outside, neither."""


def judge(claims: list[Claim]) -> list[Judged]:
    """Holm-corrected verdicts on the claims of one table, or on those that it lists apart."""
    adjusted = holm([math.nan if claim.sample is None else _p(claim, claim.sample) for claim in claims])
    judged = []
    for claim, p in zip(claims, adjusted, strict=True):
        result = None if claim.sample is None else estimate(claim.sample)
        verdict: Verdict = "open"
        if result is not None and p < 1 - CONFIDENCE:
            true = result.value * claim.sign > 0 if claim.margin is None else abs(result.value) < claim.margin
            verdict = "held" if true else "not"
        judged.append(Judged(claim, result, p, verdict))
    return judged


def _p(claim: Claim, sample: Sample) -> float:
    """Two-sided p of the difference being 0; for equivalence, of its being the nearer end of the margin.

    Below 1 - CONFIDENCE where the whole interval lies on one side of that end: within the margin (two one-sided tests,
    Schuirmann 1987, at half that level), or outside.
    """
    if claim.margin is None:
        return p_value(sample)
    end = math.copysign(claim.margin, float(sample.points.mean()))
    return p_value(Sample(sample.points - end, sample.replicates - end))


@dataclasses.dataclass(frozen=True)
class Series:
    """One line of a figure."""

    name: str
    x: tuple[float, ...]
    y: tuple[Estimate, ...]


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure, where the paper has one."""

    title: str
    x: str
    y: str
    series: tuple[Series, ...]
    ticks: tuple[str, ...] = ()
    """Names of x = 0, 1, ..., where they are not numbers."""


@dataclasses.dataclass(frozen=True)
class Result:
    """A filled table."""

    name: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    rows: list[Row]
    claims: list[Judged]
    notes: list[str]
    figure: Figure | None = None
    apart: list[Judged] = dataclasses.field(default_factory=list)
    """What is tested beside the paper's signs: corrected among themselves, and not counted."""

    def counted(self) -> dict[Verdict, int]:
        """How many of the paper's claims have which verdict."""
        return {
            verdict: sum(judged.verdict == verdict for judged in self.claims) for verdict in ("held", "not", "open")
        }


class Table:
    """Base of the tables. A subclass registers itself with ``@TABLES.register(name)``.

    ``studies`` and ``fill`` see the same scope; ``fill`` reads what the studies left.
    """

    title: ClassVar[str]
    """The paper, the table's number, what it shows."""
    source: ClassVar[str] = "kuairand"
    """The source it runs on by default: KuaiRand where its columns allow, else the simulator."""
    lists: dict[str, tuple[str, ...]]
    """What the table's `selection` found, set before `studies`: way -> features."""

    def selection(self, scope: Scope, folder: str) -> PipelineConfig | None:
        """A pipeline whose ``select`` section is run first, below ``folder``, since the studies depend on it."""
        return None

    def studies(self, scope: Scope) -> list[Study]:
        """What must be trained."""
        raise NotImplementedError

    def fill(self, scope: Scope, runner: Runner) -> Result:
        """The table's rows and claims from what the studies left."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Contest:
    """The variants of one student, compared in one metric of one task."""

    comparison: Comparison
    student: str
    metric: str
    task: str
    kind: str = "impression"

    def values(self, variant: str, *metrics: str) -> tuple[Estimate | None, ...]:
        """A variant's metrics, by default the contest's own."""
        names = metrics or (self.metric,)
        return tuple(self.comparison.value(self.student, variant, name, self.task, self.kind) for name in names)

    def better(self, text: str, one: str, other: str, student: str | None = None) -> Claim:
        """The claim that variant ``one`` (of another ``student``, where it is named) is better than ``other``."""
        pair = (student or self.student, one), (self.student, other)
        return Claim(text, self.metric, self.comparison.difference(*pair, self.metric, self.task, self.kind))

    def equivalent(self, text: str, one: str, other: str, margin: float) -> Claim:
        """The claim that variant ``one``'s metric is within ``margin`` of ``other``'s, as a share of the latter."""
        pair = (self.student, one), (self.student, other)
        sample = self.comparison.relative_difference(*pair, self.metric, self.task, self.kind)
        return Claim(text, f"{self.metric}, relative", sample, margin)
