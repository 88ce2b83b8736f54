"""Tables without training: splits, studies and their fingerprints, verdicts, and what is printed."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import rayfm
from rayfm.config import ConfigError, DataError
from rayfm.data.lock import alone
from rayfm.metrics.intervals import Estimate, Sample
from rayfm.pipeline.plan import choose_periods, periods_to_label, student_specs, teacher_spec
from rayfm.reproduce import study as study_module
from rayfm.reproduce.html import write_tables
from rayfm.reproduce.parts import auxiliary, direct, student, teacher
from rayfm.reproduce.run import reproduce
from rayfm.reproduce.runner import DONE, LOCK, Runner
from rayfm.reproduce.scope import Scope, example_of, open_scope
from rayfm.reproduce.show import show
from rayfm.reproduce.splits import exfm_slides, exfm_warmup, progressive
from rayfm.reproduce.study import Study, fingerprint, merge, study_config
from rayfm.reproduce.table import TABLES, Claim, Figure, Result, Row, Series, judge
from rayfm.reproduce.tables import ukdsl


@pytest.fixture(scope="module")
def quick() -> Scope:
    return open_scope("simulator", quick=True)


@pytest.fixture(scope="module")
def scope() -> Scope:
    return open_scope("simulator")


def sample(difference: float, noise: float = 0.001) -> Sample:
    draws = np.random.default_rng(1).normal(0, noise, (3, 100))
    return Sample(np.full(3, difference), difference + draws)


def study(scope: Scope, **students: dict) -> Study:
    teachers = {"big": teacher(scope, "dcnv2", ("click",)), "other": teacher(scope, "deepfm", ("click",))}
    return Study("s", progressive(scope), teachers, students)


def test_the_exfm_split_slides_three_times(scope: Scope) -> None:
    days = scope.periods
    slides = exfm_slides(scope)
    assert [slide["last"] for slide in slides] == list(days[-3:])
    first = slides[0]
    start = days.index(first["first"])
    # Four days for the teacher, the fifth for the student, the sixth to test on.
    assert first["teachers_through"] == days[start + 3]
    assert first["students_from"] == first["students_through"] == days[start + 4]
    assert first["last"] == days[start + 5]
    assert first["warmup"] == 5
    with pytest.raises(ConfigError, match="needs 8 periods, and it has 4"):
        exfm_slides(dataclasses.replace(scope, periods=days[:4]))
    # Choices may not see the days that are tested on.
    warmup = exfm_warmup(dataclasses.replace(scope, periods=tuple(f"2024-01-{d:02}" for d in range(1, 15))))
    assert warmup is not None
    assert warmup["last"] == "2024-01-06"
    assert exfm_warmup(dataclasses.replace(scope, periods=days[:8])) is None


def test_a_slide_as_a_pipeline(scope: Scope) -> None:
    slide = exfm_slides(scope)[0]
    students = {"fm": student(scope, "fm", {"none": [], "direct": direct("big")})}
    config = study_config(Study("s", slide, {"big": teacher(scope, "dcnv2", ("click",))}, students), scope, "x", "run")
    periods = choose_periods(config, list(scope.periods))
    (students_spec,) = student_specs(config, periods)
    assert teacher_spec(config, "big", periods).trained == 4
    assert (len(students_spec.periods), students_spec.trained) == (2, 1)
    assert periods_to_label(config, periods, "big") == (periods[4],)


def test_studies_of_one_name_are_run_once(scope: Scope) -> None:
    one = study(scope, fm=student(scope, "fm", {"none": [], "direct": direct("big")}))
    deep = student(scope, "deepfm", {"none": []})
    two = study(scope, fm=student(scope, "fm", {"none": [], "aux": auxiliary("other")}), deep=deep)
    (both,) = merge([one, two])
    assert both.variants == [("fm", "none"), ("fm", "direct"), ("fm", "aux"), ("deep", "none")]
    assert both.only([("fm", "aux")]).variants == [("fm", "aux")]
    other_model = study(scope, fm=student(scope, "deepfm", {"none": []}))
    with pytest.raises(ConfigError, match="student 'fm' is defined twice, differently"):
        merge([one, other_model])
    other_terms = study(scope, fm=student(scope, "fm", {"none": [], "direct": direct("other")}))
    with pytest.raises(ConfigError, match="'direct' is defined twice, differently"):
        merge([one, other_terms])
    with pytest.raises(ConfigError, match="different days"):
        merge([one, dataclasses.replace(one, schedule={"warmup": 2})])


def test_a_fingerprint_is_of_what_a_variant_depends_on(scope: Scope) -> None:
    base = study(scope, fm=student(scope, "fm", {"none": [], "direct": direct("big")}))
    beside = study(
        scope,
        fm=student(scope, "fm", {"none": [], "direct": direct("big"), "aux": auxiliary("other")}),
        deep=student(scope, "deepfm", {"none": []}),
    )
    for variant in ("none", "direct"):
        assert fingerprint(base, scope, "fm", variant) == fingerprint(beside, scope, "fm", variant)
    wider = dataclasses.replace(base, teachers=base.teachers | {"big": teacher(scope, "dcnv2", ("click", "long_view"))})
    assert fingerprint(wider, scope, "fm", "direct") != fingerprint(base, scope, "fm", "direct")
    assert fingerprint(wider, scope, "fm", "none") == fingerprint(base, scope, "fm", "none"), "it reads no label"
    seeds = dataclasses.replace(scope, seeds=(1, 2))
    assert fingerprint(base, seeds, "fm", "none") != fingerprint(base, scope, "fm", "none")


@pytest.mark.parametrize("name", ["NUMBERS", "__version__"])
def test_what_other_code_trained_is_not_found(
    name: str, scope: Scope, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = study(scope, fm=student(scope, "fm", {"none": []}))
    done = tmp_path / "runs" / "s" / DONE
    done.parent.mkdir(parents=True)
    done.write_text(json.dumps({"study": "s", "fingerprints": [fingerprint(base, scope, "fm", "none")]}))
    assert Runner(scope, tmp_path).missing(base).variants == []
    storage = study_config(base, scope, "x", "run").storage
    monkeypatch.setattr(study_module, name, "1234.5" if name == "__version__" else 1234)
    assert Runner(scope, tmp_path).missing(base).variants == [("fm", "none")]
    # A source that changed is prepared again as well.
    assert (study_config(base, scope, "x", "run").storage == storage) == (name == "__version__")


def test_two_do_not_train_in_one_folder(scope: Scope, tmp_path: Path) -> None:
    base = study(scope, fm=student(scope, "fm", {"none": []}))
    busy = f"process {os.getpid()} .* is reproducing tables here; wait until it is done, or choose another --folder"
    with alone(tmp_path / LOCK, "training"), pytest.raises(DataError, match=busy):
        Runner(scope, tmp_path).run([base])


def test_verdicts_by_hand() -> None:
    claims = [
        Claim("clearly better", "ne", sample(-0.01)),
        Claim("clearly worse", "ne", sample(0.01)),
        Claim("better in a metric that rises", "auc", sample(0.01)),
        Claim("unclear", "ne", sample(-0.0005, noise=0.001)),
        Claim("not measured", "ne", None),
    ]
    judged = judge(claims)
    assert [found.verdict for found in judged] == ["held", "not", "held", "open", "open"]
    # Holm: the smallest of four p values is multiplied by four.
    alone = judge(claims[:1])[0].p
    assert judged[0].p == pytest.approx(4 * alone, abs=1e-12) or judged[0].p < 1e-9
    weak = Claim("weak", "ne", sample(-0.0013))
    assert judge([weak])[0].verdict == "held"
    assert judge([weak] + [Claim("noise", "ne", sample(1e-5))] * 9)[0].verdict == "open", "one of ten is no finding"


def test_equivalence_is_the_whole_interval_within_the_margin() -> None:
    def verdict(difference: float, noise: float = 0.001) -> str:
        return judge([Claim("the same", "ne, relative", sample(difference, noise), margin=0.005)])[0].verdict

    assert verdict(0.0) == verdict(0.002) == verdict(-0.002) == "held"
    assert verdict(0.0, noise=0.01) == "open", "no difference is seen, and none of 2 % either"
    assert verdict(0.004) == verdict(-0.006) == "open", "the interval has the margin's end in it"
    assert verdict(0.012) == verdict(-0.012) == "not", "better by more than the margin is no equivalence either"
    # The p is that of the interval: held where it lies within.
    for difference in (0.0025, 0.003, 0.0035):
        (found,) = judge([Claim("the same", "ne, relative", sample(difference), margin=0.005)])
        assert (found.verdict == "held") == (found.estimate.lo > -0.005 and found.estimate.hi < 0.005)


def filled() -> Result:
    def value(x: float) -> Estimate:
        return Estimate(x, x - 0.0123, x + 0.0123, 3)

    rows = [
        Row(("deepfm", "dcnv2", "w/o distillation"), (0.5462, 0.7228), (value(0.7), value(0.65))),
        Row(("deepfm", "dcnv2", "aux. head + adapter"), (0.5462, None), (value(0.71), None)),
    ]
    claims = judge(
        [Claim("dcnv2 -> deepfm: " + "a long claim " * 8, "logloss", sample(-0.01)), Claim("x", "auc", None)]
    )
    figure = Figure("A figure", "days", "AUC", (Series("line", (0.0, 1.0), (value(0.5), value(0.6))),), ("a", "b"))
    labels, metrics = ("student", "teacher", "method"), ("auc", "logloss")
    return Result("exfm-table2", labels, metrics, rows, claims, ["A <note>."], figure)


def test_a_table_fits_80_columns() -> None:
    out = io.StringIO()
    show(filled(), "A title", Console(file=out, width=80))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80, text
    assert ".7000±.0123" in text
    assert ".5462" in text
    assert "1 of the paper's 2 signs held; 1 undecided, 0 the other way" in text


def test_a_page_shows_numbers_figures_and_verdicts(tmp_path) -> None:
    page = write_tables([filled()], {"seeds": "1, 2, 3"}, tmp_path / "deep" / "tables.html").read_text()
    for expected in ("exfm-table2", ".7100±.0123", "held", "<svg", "A &lt;note&gt;.", "undecided"):
        assert expected in page, expected
    assert "Configuration" not in page
    assert f"rayfm {rayfm.__version__}, numbers {study_module.NUMBERS}" in page


def test_a_page_does_not_speak_of_a_paper_that_has_no_numbers(tmp_path) -> None:
    rows = [dataclasses.replace(row, paper=(None, None)) for row in filled().rows]
    page = write_tables([dataclasses.replace(filled(), rows=rows, claims=[])], {}, tmp_path / "own.html").read_text()
    assert "The paper&#39;s" not in page.split("<main", 1)[-1]
    assert "Our numbers" in page
    shown = write_tables([filled()], {}, tmp_path / "paper.html").read_text()
    assert "The paper&#39;s claims" in shown
    assert "The paper&#39;s numbers beside ours" in shown


class FilledRunner:
    """Gives every variant the same value, and every pair the same difference."""

    def comparison(self, studies: list[Study], *students: str) -> FilledRunner:
        return self

    def value(self, *of: str) -> Estimate:
        return Estimate(0.7, 0.69, 0.71, 3)

    def difference(self, one: tuple[str, str], other: tuple[str, str], *of: str) -> Sample:
        return sample(-0.0013)

    def relative_difference(self, one: tuple[str, str], other: tuple[str, str], *of: str) -> Sample:
        return sample(-0.0013)


def test_what_the_paper_does_not_claim_is_judged_and_counted_apart(scope: Scope) -> None:
    days = dataclasses.replace(scope, periods=tuple(f"2024-01-{d:02}" for d in range(1, 15)))
    result = TABLES["exfm-table2"]().fill(days, FilledRunner())
    # Three steps of three teachers for three students, in two metrics.
    assert len(result.claims) == 54
    assert not any("chosen" in judged.claim.text for judged in result.claims)
    assert len(result.apart) == 9
    assert all("chosen on the warm-up days ahead of none" in judged.claim.text for judged in result.apart)
    assert sum(result.counted().values()) == 54
    # Of equal p values Holm multiplies each by the number of claims in the family.
    p = judge([result.apart[0].claim])[0].p
    assert [judged.p for judged in result.apart] == pytest.approx([9 * p] * 9)
    assert result.claims[0].p == pytest.approx(min(1.0, 54 * p))


def test_a_mean_age_may_end_in_half_a_day(scope: Scope) -> None:
    days = dataclasses.replace(scope, periods=tuple(f"2024-01-{d:02}" for d in range(1, 15)))
    result = TABLES["exfm-fig9"]().fill(days, FilledRunner())
    # Eight test days, the teachers trained through the day before the first one and two days earlier: 1 to 8 days old,
    # and 3 to 10.
    assert [row.labels[0] for row in result.rows] == ["-", *["1 d", "4.5 d", "6.5 d"] * 2]
    assert result.figure is not None
    assert [line.x for line in result.figure.series] == [(1.0, 4.5, 6.5)] * 2
    assert "teacher 6.5 d old" in result.claims[-1].claim.text


def test_what_is_apart_is_shown_apart(tmp_path) -> None:
    result = dataclasses.replace(filled(), apart=judge([Claim("chosen beside them", "auc", sample(0.01))]))
    out = io.StringIO()
    show(result, "A title", Console(file=out, width=80))
    assert "not counted:\nheld       chosen beside them: auc +0.0100" in out.getvalue()
    assert "1 of the paper's 2 signs held; 1 undecided, 0 the other way" in out.getvalue()
    page = write_tables([result], {}, tmp_path / "tables.html").read_text()
    assert page.index("Tested beside them") < page.index("chosen beside them")
    assert "1 of the paper&#39;s 2 signs held" in page
    assert "Tested beside them" not in write_tables([filled()], {}, tmp_path / "other.html").read_text()


def test_cross_stage_is_judged_on_both_kinds_and_its_value_apart(scope: Scope, monkeypatch: pytest.MonkeyPatch) -> None:
    cascades = ("production", *ukdsl.CASCADES, *(f"{name} copied" for name in ukdsl.COPIES))
    monkeypatch.setattr(ukdsl, "served_shares", lambda *of: {name: sample(0.4) for name in cascades})
    result = TABLES["ukdsl-table1"]().fill(scope, FilledRunner())
    assert [judged.claim.margin for judged in result.claims] == [None, None, ukdsl.EQUIVALENT] * 2
    assert result.claims[2].verdict == "held"
    assert [judged.claim.text for judged in result.apart] == [
        *(f"value served: {name} distilled ahead of neither" for name in ("retrieval", "early", "both")),
        *(f"value served: {name} copied of ranking ahead of production" for name in ("early", "both")),
    ]
    assert [row.labels for row in result.rows[-7:]] == [
        ("cascade", "logged", ""),
        *(("cascade", name, "taught") for name in ("neither", "retrieval", "early", "both")),
        ("cascade", "early", "copied"),
        ("cascade", "both", "copied"),
    ]
    assert result.figure is not None
    assert result.figure.ticks == tuple(name.replace(" ", "\n") for name in cascades)
    published = TABLES["ukdsl-table1"]().studies(scope)[0]
    assert published.publish
    with pytest.raises(ConfigError, match="publishes its students in one table alone"):
        merge([published, dataclasses.replace(published, publish=False)])


@pytest.mark.parametrize("name", list(TABLES))
def test_every_table_asks_for_studies_that_are_valid(name: str, quick: Scope, scope: Scope, tmp_path) -> None:
    for each in (quick, scope):
        for wanted in merge(TABLES[name]().studies(each)):
            config = study_config(wanted, each, str(tmp_path), "run")
            choose_periods(config, list(each.periods))
            assert wanted.variants
            assert Runner(each, tmp_path).missing(wanted).variants == wanted.variants


def test_all_tables_of_a_source_go_together(scope: Scope) -> None:
    studies = merge(study for name in TABLES for study in TABLES[name]().studies(scope))
    assert len({study.name for study in studies}) == len(studies)
    # Ways to choose the rows of a batch, and worlds, have a study each.
    shared = [study for study in studies if not study.name.startswith(("considerations-", "sweep-"))]
    assert len(shared) <= 14


def test_bad_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown table 'exfm-tabel2'; did you mean 'exfm-table2'"):
        reproduce(["exfm-tabel2"])
    with pytest.raises(ConfigError, match="source 'kuairnd': no pipeline of that name; did you mean 'kuairand'"):
        example_of("kuairnd")
