"""What can be said of a search without Ray: spaces, targets, trials, scores, tables."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from example_store import write_store
from rich.console import Console
from small_pipeline import PERIODS, mapping, small_pipeline, write_config, write_log

from rayfm.cli import display
from rayfm.cli.main import main
from rayfm.config import CapacityError, ConfigError, LabelError, RayfmError
from rayfm.data.store import ExampleStore
from rayfm.labels import LabelStore, write_lane_file
from rayfm.metrics import MetricState, lines
from rayfm.pipeline.config import PipelineConfig, load_config
from rayfm.pipeline.trial import TrialRecord, TrialSettings, choose_target, read_records, run_trial
from rayfm.pipeline.tune import Study, best_overrides, load_search, ranked
from rayfm.pipeline.tune_config import TuneConfig, parse_space
from rayfm.serving.labelling import StoredLabels
from rayfm.training.spec import PinnedLabels

RATE = "groups.students.tables.lr"


def searching(folder: Path, *, warmup: int = 2, **tune: Any) -> PipelineConfig:
    section = {"model": "vm", "parameters": {RATE: "choice(1e-6, 0.2)"}, **tune}
    return small_pipeline(folder, schedule={"warmup": warmup}, tune=section)


# -- spaces ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind", "arguments"),
    [
        ("choice(8, 16, 32)", "choice", (8, 16, 32)),
        ("choice([64], [128, 64])", "choice", ([64], [128, 64])),
        ("choice(adam, adagrad)", "choice", ("adam", "adagrad")),
        ("choice(null, {relative: 0.5})", "choice", (None, {"relative": 0.5})),
        (" loguniform( 1e-4, 1e-2 ) ", "loguniform", (1e-4, 1e-2)),
        ("qrandint(8, 64, 8)", "qrandint", (8, 64, 8)),
    ],
)
def test_a_space_is_a_call(text: str, kind: str, arguments: tuple) -> None:
    space = parse_space(text)
    assert (space.kind, space.arguments) == (kind, arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8, 16", "no search space; write e.g."),
        ("loguniforn(1, 2)", "unknown search space 'loguniforn'; did you mean 'loguniform'"),
        ("choice(8)", "two values or more"),
        ("choice([8)", "not valid YAML"),
        ("uniform(1)", "uniform takes low, high, which are numbers"),
        ("uniform(low, high)", "which are numbers"),
        ("randint(1.5, 4)", "which are whole numbers"),
        ("quniform(0, 1)", "takes low, high, step"),
        ("quniform(0, 1, 0)", "step must be above 0"),
        ("uniform(2, 1)", "low must be below high"),
        ("uniform(0, .inf)", "low must be below high"),
        ("loguniform(0, 1)", "above 0 on a logarithmic scale"),
    ],
)
def test_what_is_no_space_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_space(text)
    with pytest.raises(ValueError, match=message):
        TuneConfig.model_validate({"parameters": {"a.b": text}})


def test_values_stay_in_their_space_and_are_short() -> None:
    assert parse_space("loguniform(1e-4, 1e-2)").value(0.00123456) == 0.001235
    assert parse_space("uniform(0.12344, 1)").value(0.12344) == 0.12344, "not rounded out of the space"
    assert parse_space("randint(1, 9)").value(7.0) == 7
    assert parse_space("choice([64], [128, 64])").value(1) == [128, 64]
    assert parse_space("randint(1, 9)").examples() == [1, 8], "the upper end is left out, as in Ray Tune"


# -- what is searched -----------------------------------------------------------------------------------------------


def test_the_target_has_defaults(tmp_path: Path) -> None:
    target = choose_target(searching(tmp_path))
    assert (target.model, target.variant, target.task, target.metric, target.mode) == (
        "vm", "none", "click", "ne", "min",
    )  # fmt: skip
    target = choose_target(searching(tmp_path, model="fm", task="watch", metric="rmse"))
    assert (target.name, target.task) == ("fm.teacher", "watch")
    assert choose_target(searching(tmp_path, metric="auc")).mode == "max"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"model": None}, r"tune.model: which of vm, fm\? Name it"),
        ({"model": "wm"}, "unknown model 'wm'; known: fm, vm"),
        ({"variant": "dirct"}, "vm has no variant 'dirct'; did you mean 'direct'"),
        ({"model": "fm", "variant": "none"}, "fm has no variant 'none'; known: teacher"),
        ({"task": "watch"}, "vm has no task 'watch'; known: click"),
        ({"model": "fm", "task": "watch"}, "ne is for binary tasks and 'watch' is a regression; take rmse"),
        ({"parameters": {}}, "nothing to tune: add --param"),
        ({"parameters": {"student.vm.model.embedding_dim": "choice(4, 8)"}}, "no key of a config; did you mean 'stu"),
        ({"parameters": {"ray.cpus": "choice(1, 2)"}}, "'ray' does not shape what a trial trains; tune keys of"),
        ({"parameters": {"seeds": "choice([1], [2])"}}, "'seeds' does not shape what a trial trains"),
        ({"parameters": {"groups.student.batch_size": "choice(16, 32)"}}, "no group 'student'; did you mean 'stu"),
        ({"parameters": {"students.vm.model.embeding_dim": "choice(4, 8)"}}, "did you mean 'embedding_dim'"),
        ({"parameters": {"students.vm.model.embedding_dim": "choice(4, 6)"}}, "multiple of 4"),
        ({"parameters": {"groups.students.dense.lr": "uniform(-1, 1)"}}, "greater than 0"),
        ({"parameters": {"students.vm.variants.none.0.weight": "uniform(0, 1)"}}, "not a position in a list of 0"),
        ({"parameters": {"teachers.fm.training.dense.lr": "uniform(0.1, 1)"}}, "changes nothing of what is trained"),
        ({"parameters": {"groups.students.workers": "choice(1, 2)"}}, "changes nothing of what is trained"),
        ({"parameters": {"students.vm.variants.direct.0.weight": "uniform(0.1, 1)"}}, "changes nothing of what is"),
    ],
)  # fmt: skip
def test_what_cannot_be_searched_is_refused(tmp_path: Path, section: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Study(searching(tmp_path, **section))


def test_a_metric_without_a_direction_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tune\.metric"):
        load_search(write_config(tmp_path), [f"{RATE}=uniform(0.1, 1)"], {"model": "vm", "metric": "calibration"})


def test_a_warm_up_without_a_scored_period_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"warmup 1 leaves no period to score .* raise schedule\.warmup by 1 or more"):
        Study(searching(tmp_path, warmup=1))
    with pytest.raises(ConfigError, match=r"trains on the first 2 .* raise schedule\.warmup by 1"):
        Study(searching(tmp_path, score_from=2))


def test_bounds_of_the_schedule_that_lie_in_the_test_are_not_the_search_s(tmp_path: Path) -> None:
    section = {"model": "vm", "parameters": {RATE: "choice(0.1, 0.2)"}}
    late = {"warmup": 2, "students_through": PERIODS[2], "teachers_through": PERIODS[2]}
    study = Study(small_pipeline(tmp_path, schedule=late, tune=section))
    assert (study.periods, study.spec.periods, study.spec.trained) == (PERIODS[:2], PERIODS[:2], None)
    early = {"warmup": 2, "students_through": PERIODS[0]}
    assert Study(small_pipeline(tmp_path, schedule=early, tune=section)).spec.trained == 1
    with pytest.raises(ConfigError, match=f"from students_from {PERIODS[1]} on; raise schedule.warmup by 1"):
        Study(small_pipeline(tmp_path, schedule={"warmup": 2, "students_from": PERIODS[1]}, tune=section))
    teacher = {"model": "fm", "parameters": {"teachers.fm.model.embedding_dim": "choice(4, 8)"}}
    through = {"fm": {"through": PERIODS[2]}}
    study = Study(small_pipeline(tmp_path, schedule={"warmup": 2}, teachers=through, tune=teacher))
    assert (study.spec.periods, study.spec.trained) == (PERIODS[:2], None)


def test_the_command_line_changes_the_section(tmp_path: Path) -> None:
    path = write_config(tmp_path, tune={"model": "vm", "parameters": {RATE: "uniform(0.1, 1)"}, "trials": 3})
    config = load_search(path, None, {"trials": 5})
    assert config.tune == TuneConfig(model="vm", parameters={RATE: "uniform(0.1, 1)"}, trials=5)
    other = load_search(path, ["students.vm.model.embedding_dim = choice(4, 8)"])
    assert other.tune is not None
    assert other.tune.parameters == {"students.vm.model.embedding_dim": "choice(4, 8)"}
    with pytest.raises(ConfigError, match="write it as KEY=SPACE"):
        load_search(path, ["choice(4, 8)"])


def test_few_choices_are_all_tried(tmp_path: Path) -> None:
    both = {RATE: "choice(0.1, 0.2)", "students.vm.model.embedding_dim": "choice(4, 8, 16)"}
    every = Study(searching(tmp_path, parameters=both, trials=6)).combinations()
    assert every == [{"p0": i, "p1": j} for i in range(2) for j in range(3)]
    assert Study(searching(tmp_path, parameters=both, trials=5)).combinations() is None
    assert Study(searching(tmp_path, parameters={RATE: "uniform(0.1, 1)"})).combinations() is None


def test_as_many_trials_as_fit_run_at_once(tmp_path: Path) -> None:
    assert Study(searching(tmp_path))._at_once(2.0, 0.0) == 4, "half a CPU each"
    assert Study(searching(tmp_path, concurrent=3))._at_once(2.0, 0.0) == 3
    with pytest.raises(CapacityError, match=r"a trial needs 0\.5 CPUs and Ray has 0\.25 CPUs"):
        Study(searching(tmp_path))._at_once(0.25, 0.0)


def test_without_optuna_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"needs Optuna; pip install 'rayfm\[tune\]'"):
        Study(searching(tmp_path))._algorithm([], 0)


def test_a_variant_with_a_teacher_needs_stored_labels(tmp_path: Path) -> None:
    config = searching(
        tmp_path, variant="direct", parameters={"students.vm.variants.direct.0.weight": "uniform(0.1, 1)"}
    )
    study = Study(config)
    with pytest.raises(LabelError, match=r"learns from labels, and trials train no teacher: .* run `rayfm label`"):
        study.labels()
    study.pipeline.tickets.put(
        "labelled", "fm", PERIODS[1], {"coverage": {"impression": 1.0}, "version": "v", "table_version": 3}
    )
    labels = study.labels()
    assert labels[PERIODS[0]] == {}, "no teacher was trained before the first period"
    assert (labels[PERIODS[1]]["fm"].version, labels[PERIODS[1]]["fm"].table_version) == ("v", 3)
    assert set(labels) == set(PERIODS[:2]), "labels of test periods are not even looked at"


# -- a trial --------------------------------------------------------------------------------------------------------


@pytest.fixture
def settings(tmp_path: Path) -> TrialSettings:
    """Three warm-up periods in a store that has no other; the last is only scored."""
    write_log(tmp_path / "log")
    write_store(tmp_path / "data", list(PERIODS), impressions=600)
    config = small_pipeline(
        tmp_path, schedule={"warmup": 2}, tune={"model": "vm", "parameters": {RATE: "choice(1e-6, 0.2)"}}
    )
    return TrialSettings(
        config=config.dump(), target=choose_target(config), periods=PERIODS, folder=str(tmp_path / "trials")
    )


class Reports(list):
    def __call__(self, number: int, score: float) -> None:
        self.append((number, score))


def test_a_trial_scores_each_period_before_it_trains_on_it(settings: TrialSettings) -> None:
    reports = Reports()
    record = run_trial(settings, {RATE: 0.2}, reports)
    assert record.data["ended"] == "complete"
    assert list(record.scores) == list(PERIODS[1:])
    assert reports == list(enumerate(record.scores.values(), 1))
    folder = record.folder / "trainers" / "students"
    first = MetricState.load(folder / "metrics" / PERIODS[1] / "vm.none.1.npz")
    second = MetricState.load(folder / "metrics" / PERIODS[2] / "vm.none.1.npz")
    ne = {row["metric"]: row["value"] for row in lines(first, PERIODS[1], "vm", "none", 1) if row["traffic"] == "all"}
    assert record.scores[PERIODS[1]] == pytest.approx(ne["ne"], rel=1e-9)
    first.merge(second)
    pooled = {r["metric"]: r["value"] for r in lines(first, "both", "vm", "none", 1) if r["traffic"] == "all"}
    assert record.scores[PERIODS[2]] == pytest.approx(pooled["ne"], rel=1e-9), "from pooled sums, not a mean of ratios"
    assert sorted(path.stem for path in (folder / "periods").iterdir()) == list(PERIODS[:2]), "the last is only scored"
    assert not (record.folder / "snapshots").exists(), "a trial publishes nothing"
    assert not (folder / "checkpoints").exists()


def test_the_score_is_the_mean_over_the_seeds(settings: TrialSettings, tmp_path: Path) -> None:
    def score(seeds: list[int]) -> float:
        changed = settings.model_copy(
            update={"config": settings.config | {"seeds": seeds}, "folder": str(tmp_path / str(seeds))}
        )
        return run_trial(changed, {RATE: 0.2}, Reports()).scores[PERIODS[2]]

    assert score([1, 2]) == pytest.approx((score([1]) + score([2])) / 2, rel=1e-6)


def test_a_trial_that_ended_is_not_trained_again(settings: TrialSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    first, again = Reports(), Reports()
    record = run_trial(settings, {RATE: 0.2}, first, sampled={"p0": 1})
    before = record.path.read_bytes()
    monkeypatch.setattr("rayfm.pipeline.trial._train", lambda *_: pytest.fail("trained twice"))
    run_trial(settings, {RATE: 0.2}, again, sampled={"p0": 1})
    assert again == first, "but what it found is said again"
    assert record.path.read_bytes() == before
    assert [found.values for found in read_records(Path(settings.folder))] == [{RATE: 0.2}]


def test_a_trial_that_was_cut_short_goes_on_to_the_same_score(settings: TrialSettings, tmp_path: Path) -> None:
    whole = run_trial(settings.model_copy(update={"folder": str(tmp_path / "whole")}), {RATE: 0.2}, Reports())

    def stop(number: int, score: float) -> None:
        raise SystemExit  # as Ray Tune ends the thread of a trial

    with pytest.raises(SystemExit):
        run_trial(settings, {RATE: 0.2}, stop)
    (cut,) = read_records(Path(settings.folder))
    assert cut.data["ended"] is None
    assert list(cut.scores) == [PERIODS[1]]
    reports = Reports()
    record = run_trial(settings, {RATE: 0.2}, reports)
    assert record.data["ended"] == "complete"
    assert record.scores == pytest.approx(whole.scores, rel=1e-6)
    assert [number for number, _ in reports] == [1, 2]


def test_a_trial_that_the_scheduler_stopped_stays_so(settings: TrialSettings) -> None:
    with pytest.raises(SystemExit):
        run_trial(settings, {RATE: 0.2}, lambda *_: sys.exit(0))
    TrialRecord(Path(settings.folder), {RATE: 0.2}).end("stopped")
    reports = Reports()
    assert run_trial(settings, {RATE: 0.2}, reports).data["ended"] == "stopped"
    assert len(reports) == 1


def test_values_that_fail_end_their_trial_alone(settings: TrialSettings) -> None:
    bad = run_trial(settings, {"students.vm.model.embedding_dim": 6}, Reports())
    assert bad.data["ended"] == "failed"
    assert "multiple of 4" in bad.data["error"]
    diverged = run_trial(settings, {RATE: 1e30}, Reports())
    assert diverged.data["ended"] == "failed"
    assert "not finite" in diverged.data["error"]


def test_the_same_values_are_not_trained_twice_at_once(settings: TrialSettings) -> None:
    record = TrialRecord(Path(settings.folder), {RATE: 0.2})
    reports, thread = Reports(), None
    with record.lock():
        thread = threading.Thread(target=run_trial, args=(settings, {RATE: 0.2}, reports))
        thread.start()
        thread.join(0.5)
        assert thread.is_alive(), "waits for who holds the lock"
        record.write(first_started=0.0, started=0.0, scores={PERIODS[1]: 0.5}, ended="stopped")
    thread.join()
    assert reports == [(1, 0.5)], "and takes over what that one found"


def test_a_distilled_variant_learns_from_stored_labels(settings: TrialSettings, tmp_path: Path) -> None:
    """The labels of one period in the label store; a weight of the distillation changes the score."""
    root, period = tmp_path / "labels", PERIODS[1]
    schema = PipelineConfig.model_validate(settings.config).schema_
    store = ExampleStore(settings.config["storage"])
    records = []
    for lane in range(4):
        ids = pq.read_table(store.lane_path(period, "impression", lane), columns=["example_id"], partitioning=None)
        labels = ids.append_column("click", pa.array(np.linspace(0.1, 0.9, len(ids)), pa.float32()))
        records.append(
            write_lane_file(
                root, teacher="fm", version="v1", trained_through=PERIODS[0], period=period, kind="impression",
                lane=lane, labels=labels, tasks=[schema.task("click")],
            )
        )  # fmt: skip
    committed = LabelStore(root).commit(records)
    distilled = settings.model_copy(
        update={
            "target": settings.target.model_copy(update={"variant": "direct"}),
            "labels": {period: {"fm": PinnedLabels(version="v1", table_version=committed.table_version)}},
        }
    )
    key = "students.vm.variants.direct.0.weight"
    found = {
        weight: run_trial(distilled, {RATE: 0.2, key: weight}, Reports(), StoredLabels(str(root)))
        for weight in (0.001, 10.0)
    }
    assert [record.data["ended"] for record in found.values()] == ["complete", "complete"]
    one, ten = found.values()
    assert one.scores[period] == ten.scores[period], "no label was read before the first scored period"
    assert one.scores[PERIODS[2]] < ten.scores[PERIODS[2]] - 0.001, "labels that are noise, at a high weight"


def test_an_undefined_score_is_a_failure(settings: TrialSettings) -> None:
    config = json.loads(json.dumps(settings.config))
    target = settings.target.model_copy(update={"metric": "auc"})
    store = Path(config["storage"])
    for path in (store / "examples").glob(f"period={PERIODS[1]}/kind=impression/*.parquet"):
        table = pq.read_table(path, partitioning=None)
        column = table.column_names.index("click")
        pq.write_table(table.set_column(column, "click", pa.array([1.0] * len(table), pa.float32())), path)
    record = run_trial(settings.model_copy(update={"target": target}), {RATE: 0.2}, Reports())
    assert record.data["ended"] == "failed"
    assert "auc of click" in record.data["error"]
    assert "tune.score_from" in record.data["error"]


# -- what comes out -------------------------------------------------------------------------------------------------


def finished(
    folder: Path, value: float, scores: list[float], ended: str | None, error: str | None = None
) -> TrialRecord:
    record = TrialRecord(folder, {RATE: value, "groups.students.dense.lr": value})
    named = {f"2024-01-{day:02d}": score for day, score in enumerate(scores, 2)}
    record.write(scores=named, ended=ended, error=error, first_started=value, started=value, seconds=value)
    return record


def test_trials_are_ranked_by_how_far_they_came(tmp_path: Path) -> None:
    target = choose_target(searching(tmp_path))
    for value, scores, ended in (
        (0.1, [0.9, 0.8], "complete"), (0.2, [0.7], "stopped"), (0.3, [0.9, 0.7], "complete"), (0.4, [], "failed"),
        (0.5, [0.6], "stopped"), (0.6, [0.5, 0.5], None),
    ):  # fmt: skip
        finished(tmp_path / "trials", value, scores, ended)
    records = read_records(tmp_path / "trials")
    assert [r.values[RATE] for r in records] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], "as they were started"
    assert [r.values[RATE] for r in ranked(records, target)] == [0.3, 0.1, 0.6, 0.5, 0.2, 0.4]
    best_auc = ranked(records, target.model_copy(update={"metric": "auc"}))
    assert [r.values[RATE] for r in best_auc] == [0.1, 0.3, 0.6, 0.2, 0.5, 0.4]


def test_the_result_is_a_table_and_a_file_of_overrides(tmp_path: Path) -> None:
    study = Study(searching(tmp_path))
    study.open(resume=False, overwrite=False)
    with pytest.raises(RayfmError, match="no trial of 0 was scored on every period; go on with --resume"):
        study.result()
    finished(study.trials, 0.5, [], "failed", "a long reason " * 20)
    with pytest.raises(RayfmError, match=r"no trial of 1 .* the first failed with: a long reason"):
        study.result()
    finished(study.trials, 0.1, [0.9], "complete")
    finished(study.trials, 0.2, [0.8], "complete")
    result = study.result()
    assert [record.values[RATE] for record in result.trials] == [0.2, 0.1, 0.5]
    text = result.best.read_text()
    assert text.startswith("# ne 0.800000 of vm.none, task click, on 2024-01-02 .. 2024-01-02\n")
    assert yaml.safe_load(text) == {"groups": {"students": {"tables": {"lr": 0.2}, "dense": {"lr": 0.2}}}}
    config = load_config(write_config(tmp_path), [f"@{result.best}"])
    assert config.groups["students"].tables.lr == 0.2
    assert config.groups["students"].batch_size == 16, "the rest stays"
    console = Console(width=80, record=True, file=(tmp_path / "out").open("w"))
    console.print(display.trial_table(result))
    shown = console.export_text()
    assert all(len(line) <= 80 for line in shown.splitlines()), shown
    for part in ("0.80000", "tables.lr=0.2", "dense.lr=0.2", "failed", "1/1", "0/1"):
        assert part in shown, part


def test_an_override_inside_a_list_comes_with_the_whole_list(tmp_path: Path) -> None:
    config = small_pipeline(tmp_path)
    found = best_overrides(config, {"students.vm.variants.direct.0.weight": 0.5, "consideration_share": 0.1})
    (objective,) = found["students"]["vm"]["variants"]["direct"]
    assert objective["weight"] == 0.5
    assert objective["teacher"] == "fm"
    assert found["consideration_share"] == 0.1
    path = tmp_path / "best.yaml"
    path.write_text(yaml.safe_dump(found))
    applied = load_config(write_config(tmp_path), [f"@{path}"])
    assert applied.students["vm"].variants["direct"][0].weight == 0.5


def test_a_search_is_taken_up_only_as_itself(tmp_path: Path) -> None:
    Study(searching(tmp_path, trials=2)).open(resume=False, overwrite=False)
    with pytest.raises(ConfigError, match="holds a search; --resume goes on with it, --overwrite starts anew"):
        Study(searching(tmp_path)).open(resume=False, overwrite=False)
    Study(searching(tmp_path, trials=9, concurrent=1)).open(resume=True, overwrite=False)
    changed = searching(tmp_path, metric="auc")
    with pytest.raises(ConfigError, match="'target' differs from the search asked for"):
        Study(changed).open(resume=True, overwrite=False)
    other = searching(tmp_path).model_copy(update={"consideration_share": 0.5})
    with pytest.raises(ConfigError, match="'consideration_share' differs"):
        Study(other).open(resume=True, overwrite=False)
    Study(changed).open(resume=False, overwrite=True)


def test_the_command_refuses_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, schedule={"warmup": 2})
    arguments = ["tune", str(path), "--model", "vm", "--param", "students.vm.model.embeding_dim=choice(4, 8)"]
    monkeypatch.setattr(sys, "argv", ["rayfm", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert "did you mean 'embedding_dim'?" in error
    assert len(error.splitlines()) == 1


def test_a_config_may_have_the_section(tmp_path: Path) -> None:
    config = PipelineConfig.model_validate(mapping(tmp_path) | {"tune": {"parameters": {RATE: "uniform(0, 1)"}}})
    assert PipelineConfig.model_validate(config.dump()) == config
