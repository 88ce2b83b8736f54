"""A run with a poisoned day: the version trained on it is published and not promoted, and the next good one is.

Days 1, 3, 4 and 5 are alike; of day 2 no click has arrived in the log. A version of day d is judged on day d + 1.
"""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from example_store import DAY_US, every_feature_rows
from small_pipeline import FIRST_DAY_US, mapping

from rayfm.data.prepare import source_hash
from rayfm.data.sources.base import SOURCES
from rayfm.data.store import ExampleStore, LaneFile, PeriodManifest, file_sha256
from rayfm.metrics import MetricState
from rayfm.operations.alerts import AlertsConfig
from rayfm.operations.metrics import (
    ALERT,
    CALIBRATION,
    COVERAGE,
    LABELLED_ROWS,
    LAG_SECONDS,
    LOGLOSS,
    LOSS,
    NE,
    PERIODS,
    PROMOTED,
    REFUSED,
    REFUSED_NOW,
    RMSE,
    SERVED_PERIOD,
    SERVED_PUBLISHED,
    SWAP_SECONDS,
    SWAPS,
    TEACHER_FRESHNESS,
    TRAINED_THROUGH,
    Captured,
    capture,
)
from rayfm.pipeline.alerts import read_alerts
from rayfm.pipeline.config import PipelineConfig
from rayfm.pipeline.follow import Lag
from rayfm.pipeline.here import run_here
from rayfm.pipeline.observers import observers
from rayfm.pipeline.stream import Pipeline
from rayfm.report.operations import operations
from rayfm.report.run import Run
from rayfm.report.sections import Listing
from rayfm.serving.versions import NewestFollower
from rayfm.snapshots import Collector, Pointer, SnapshotStore, SQLiteMetadataStore
from rayfm.snapshots.promotion import Promotion, override
from rayfm.snapshots.state import details, states
from rayfm.snapshots.updater import Updater

DAYS = tuple(f"2024-01-0{day}" for day in range(1, 6))
POISONED = DAYS[1]
VM, FM = "vm.none.1", "fm.teacher.0"


def config(folder: Path) -> PipelineConfig:
    values: dict[str, Any] = mapping(folder)
    training = {"batch_size": 32, "tables": {"lr": 0.2}, "dense": {"lr": 0.02}}
    values["students"]["vm"]["variants"] = {"none": [], "direct": [{"type": "direct", "teacher": "fm"}]}
    values["teachers"]["fm"]["training"] |= training
    values["groups"]["students"] |= training
    values["keep_snapshots"] = 5
    values["promotion"] = {
        "rules": [{"metric": "ne", "margin": 0.05}, {"metric": "calibration", "margin": 0.3, "task": "click"}],
        "roles": ["students", "teachers"],
    }
    return PipelineConfig.model_validate(values)


def write_days(settings: PipelineConfig, log_folder: Path) -> None:
    """The log, and the store as `rayfm prepare` would leave it: row i of a day in lane ``i % lanes``."""
    log_folder.mkdir(parents=True)
    store, lanes = ExampleStore(settings.storage), settings.data.lanes
    tables = {}
    for number, day in enumerate(DAYS):
        table = every_feature_rows(1200, seed=number + 1, start=FIRST_DAY_US + number * DAY_US)
        if day == POISONED:
            lost = pa.array([0.0] * table.num_rows, pa.float32())
            table = table.set_column(table.schema.get_field_index("click"), "click", lost)
        tables[day] = table
        pq.write_table(table, log_folder / f"{day}.parquet")
    digest = source_hash(SOURCES.build(settings.data.source, settings.schema_), settings.schema_, lanes)
    for number, (day, table) in enumerate(tables.items()):
        files = []
        for lane in range(lanes):
            path = store.lane_path(day, "impression", lane)
            path.parent.mkdir(parents=True, exist_ok=True)
            part = table.take(pa.array(range(lane, table.num_rows, lanes)))
            pq.write_table(part, path)
            size, sha256 = path.stat().st_size, file_sha256(path)
            files.append(LaneFile(kind="impression", lane=lane, rows=part.num_rows, bytes=size, sha256=sha256))
        columns = {field.name: str(field.type) for field in table.schema}
        end = f"2024-01-0{number + 2}"
        store.commit(
            PeriodManifest(
                period=day, start=day, end=end, lanes=lanes, files=tuple(files), columns=columns, source=digest
            )
        )


class Ran:
    """The run, what it logged and what it counted."""

    def __init__(self, folder: Path, pipeline: Pipeline, seen: Captured, logged: list[str]) -> None:
        self.folder, self.pipeline, self.seen, self.logged = folder, pipeline, seen, logged
        self.store = SnapshotStore(pipeline.run_dir)

    def version(self, model: str, day: str) -> str:
        """The version of a model that was trained through a day."""
        return next(version for version in self.store.versions(model) if version.startswith(day))

    def promotion(self, model: str, day: str) -> Promotion | None:
        return self.store.promotion(model, self.version(model, day))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("poisoned")
    write_days(config(folder), folder / "log")
    logged: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logged.append(record.getMessage())

    handler = Keep()
    logging.getLogger("rayfm").addHandler(handler)
    try:
        with capture() as seen:
            pipeline = run_here(config(folder), check_exports=False)
    finally:
        logging.getLogger("rayfm").removeHandler(handler)
    return Ran(folder, pipeline, seen, logged)


def test_the_version_of_the_poisoned_day_is_published_and_refused_the_next_is_promoted(ran: Ran) -> None:
    for model in (VM, "vm.direct.1", FM):
        decisions = [(ran.promotion(model, day) or _WAITS).decision for day in DAYS[:4]]
        reasons = [str((ran.promotion(model, day) or _WAITS).reason) for day in DAYS[:4]]
        assert decisions == ["promoted", "refused", "promoted", "promoted"], reasons
        assert len(ran.store.versions(model)) == 5, "all are published"
    assert ran.promotion(VM, DAYS[4]) is None, "no period follows the last one"
    assert ran.store.newest(VM) == ran.version(VM, DAYS[3])
    ran.store.verify(VM, ran.version(VM, POISONED))


def test_the_reason_is_written_with_figures_margin_and_periods(ran: Ran) -> None:
    refused = ran.promotion(VM, POISONED)
    assert refused is not None
    assert (refused.period, refused.predecessor, refused.rows) == (DAYS[2], ran.version(VM, DAYS[0]), 1200)
    ne = refused.figures[0]
    assert (ne.metric, ne.task, ne.margin, ne.broken) == ("ne", "click", 0.05, True)
    assert ne.value is not None
    assert ne.predecessor is not None
    assert ne.worse_by == pytest.approx(ne.value - ne.predecessor)
    assert ne.worse_by > 0.05
    assert str(ne) in refused.reason


def test_the_next_is_compared_with_the_last_promoted_one_and_not_with_the_refused(ran: Ran) -> None:
    following = ran.promotion(VM, DAYS[2])
    assert following is not None
    assert following.predecessor == ran.version(VM, DAYS[0])
    assert (ran.promotion(VM, DAYS[3]) or _WAITS).predecessor == ran.version(VM, DAYS[2])


def test_the_figure_is_the_metric_of_progressive_validation(ran: Ran) -> None:
    """The version of day 2, as published, scores on day 3 as the learner did that predicted it with these weights."""
    refused = ran.promotion(VM, POISONED)
    assert refused is not None
    path = ran.pipeline.run_dir / "trainers" / "students" / "metrics" / DAYS[2] / f"{VM}.npz"
    sums = MetricState.load(path).cell(0, "click").sums.sum(0)
    rate = float(sums[2] / sums[1])
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
    assert refused.figures[0].value == pytest.approx(float(sums[4] / sums[1]) / entropy, rel=1e-4)


def test_a_refused_teacher_does_not_label(ran: Ran) -> None:
    tickets = [ran.pipeline.tickets.get("labelled", "fm", day) for day in DAYS[1:]]
    assert [ticket["trained_through"] for ticket in tickets if ticket] == [DAYS[0], DAYS[0], DAYS[2], DAYS[3]]


def test_label_jobs_record_coverage_and_freshness(ran: Ran) -> None:
    labels = {"run": "small", "teacher": "fm"}
    assert ran.seen.get(COVERAGE, kind="impression", **labels) == 1.0
    assert ran.seen.get(LABELLED_ROWS, **labels) == 4 * 1200
    assert ran.seen.get(TEACHER_FRESHNESS, **labels) == 86_400, "the day before labelled the last one"


def test_metrics_log_events_and_list_say_so(ran: Ran) -> None:
    counted = {"run": "small", "model": VM}
    assert ran.seen.get(PROMOTED, **counted) == 3
    assert ran.seen.get(REFUSED, **counted) == 1
    assert ran.seen.get(REFUSED_NOW, **counted) == 0
    (line,) = [text for text in ran.logged if text.startswith(f"{VM}@{ran.version(VM, POISONED)} is not promoted")]
    assert f"{ran.version(VM, DAYS[0])} stays: on {DAYS[2]} ne of click is" in line
    found = ran.pipeline.records.events()
    events = [event for event in found if event["event"] == "promotion" and event["model"] == VM]
    assert [event["decision"] for event in events] == ["promoted", "refused", "promoted", "promoted"]
    assert [event["period"] for event in events] == list(DAYS[:4])
    collector = Collector(ran.store, ran.pipeline.metadata)
    said = states(collector, VM)
    assert said[ran.version(VM, POISONED)][0].startswith("not promoted: ne of click is")
    assert said[ran.version(VM, DAYS[4])] == ("waits for the guard",)
    assert ran.version(VM, DAYS[0]) not in said
    lines = details(collector, VM, ran.version(VM, POISONED))
    assert any("refused by the guard, scored on 1,200 rows of 2024-01-03 beside" in line for line in lines)


def test_going_on_with_the_run_decides_nothing_again(ran: Ran) -> None:
    files = sorted(ran.pipeline.run_dir.glob("snapshots/*/*/promotion.json"))
    before = [(path, path.stat().st_mtime_ns, path.read_text()) for path in files]
    assert len(before) == 12
    with capture() as seen:
        run_here(config(ran.folder), check_exports=False)
    assert [(path, path.stat().st_mtime_ns, path.read_text()) for path in files] == before
    assert seen.get(REFUSED, run="small", model=VM) is None


def test_a_decision_that_was_lost_is_made_again_alike(ran: Ran) -> None:
    """As after a crash between the score and the decision: the same versions and rows give the same figures."""
    version = ran.version(VM, POISONED)
    path = ran.store.folder(VM, version) / "promotion.json"
    before = Promotion.model_validate_json(path.read_text())
    path.unlink()
    ran.pipeline.tickets.remove("promotion", VM, version)
    run_here(config(ran.folder), check_exports=False)
    after = ran.promotion(VM, POISONED)
    assert after is not None
    assert after.model_copy(update={"at": before.at}) == before


def test_nobody_serves_a_refused_or_undecided_version_by_itself(ran: Ran, tmp_path: Path) -> None:
    collector = Collector(ran.store, SQLiteMetadataStore(tmp_path / "metadata.sqlite"))
    Updater(collector, VM, "test").step()
    pointer = Pointer(collector, VM, "test")
    current = pointer.read()
    assert current is not None
    assert current.version == ran.version(VM, DAYS[3])
    assert ran.version(VM, POISONED) not in pointer.older(current)
    with capture() as seen:
        follower = NewestFollower(ran.store, VM, poll_s=60.0)
    assert follower.current().version == ran.version(VM, DAYS[3])
    follower.close()
    served = {"run": "small", "model": VM}
    assert seen.get(SWAPS, **served) == 1
    assert len(seen.get(SWAP_SECONDS, **served)) == 1
    assert seen.get(SERVED_PERIOD, **served) == FIRST_DAY_US / 1e6 + 3 * 86_400
    assert time.time() - 600 < seen.get(SERVED_PUBLISHED, **served) <= time.time()


def test_people_may_pin_or_promote_what_the_guard_refused(ran: Ran, tmp_path: Path) -> None:
    collector = Collector(ran.store, SQLiteMetadataStore(tmp_path / "metadata.sqlite"))
    pointer, refused = Pointer(collector, FM, "somebody"), ran.version(FM, POISONED)
    assert pointer.pin(refused, "an experiment").version == refused
    pointer.unpin()
    Updater(collector, FM, "test").step()
    current = pointer.read()
    assert current is not None
    assert current.version == ran.version(FM, DAYS[3]), "the guard holds again"
    folder = ran.store.folder(FM, refused)
    before = (folder / "promotion.json").read_text()
    try:
        said = override(folder, "somebody", "looked at it")
        assert said.before is not None
        assert said.before.decision == "refused", "what the guard said is kept"
        assert refused in ran.store.takeable(FM)
        assert states(collector, FM)[refused] == ("promoted by somebody",)
    finally:
        (folder / "promotion.json").write_text(before)


def test_refused_versions_push_out_none_that_is_promoted(ran: Ran, tmp_path: Path) -> None:
    collector = Collector(ran.store, SQLiteMetadataStore(tmp_path / "metadata.sqlite"), keep=2)
    assert collector.expire(VM) == [ran.version(VM, DAYS[0]), ran.version(VM, POISONED)]
    assert set(collector.tombstones(VM)) == {ran.version(VM, DAYS[0]), ran.version(VM, POISONED)}


def observed(ran: Ran) -> Captured:
    """What a run that is gone on with tells its observers of the periods that stand."""
    bars = AlertsConfig(calibration=0.5, calibration_rows=100, coverage=0.99, stale_teacher_s=86_400)
    pipeline = Pipeline(config(ran.folder).model_copy(update={"alerts": bars}))
    with capture() as seen, observers(pipeline) as told:
        pipeline.records.start()
        pipeline.records.told = told.period
        pipeline.records.refresh()
        told.look({"students": Lag("students", DAYS[4], DAYS[2], 2, 172_800.0)})
    return seen


def test_observers_get_the_metrics_of_each_model(ran: Ran) -> None:
    seen = observed(ran)
    path = ran.pipeline.run_dir / "trainers" / "students" / "metrics" / DAYS[4] / f"{VM}.npz"
    sums = MetricState.load(path).cell(0, "click").sums.sum(0)
    labels = {"run": "small", "model": VM, "task": "click"}
    assert seen.get(CALIBRATION, **labels) == pytest.approx(float(sums[3] / sums[2]))
    assert seen.get(LOGLOSS, **labels) == pytest.approx(float(sums[4] / sums[1]))
    assert seen.get(NE, **labels) > 0
    assert seen.get(RMSE, run="small", model=FM, task="watch") > 0
    assert seen.get(LOSS, run="small", model=VM, term="supervised/click") > 0
    trainer = {"run": "small", "trainer": "students"}
    assert seen.get(LAG_SECONDS, **trainer) == 172_800
    assert seen.get(TRAINED_THROUGH, **trainer) == FIRST_DAY_US / 1e6 + 5 * 86_400
    assert seen.get(PERIODS, **trainer) is None, "what stood is not counted again"


def test_alerts_begin_and_end_with_the_periods_and_are_written_once(ran: Ran) -> None:
    seen = observed(ran)
    lines = read_alerts(ran.pipeline.run_dir / "alerts.jsonl")
    told = [(line["alert"], line["subject"], line["period"], line["firing"]) for line in lines]
    assert ("calibration", f"{VM}/click", DAYS[2], True) in told
    assert ("stale_teacher", "fm", DAYS[2], True) in told, "its newest version was refused"
    assert ("stale_teacher", "fm", DAYS[3], False) in told
    assert not any(alert == "coverage" for alert, *_ in told)
    ended = [line for line in told if line[:2] == ("calibration", f"{VM}/click") and not line[3]]
    assert ended, "calibration came back"
    (gap,) = [line["value"] for line in lines if line["alert"] == "stale_teacher" and line["firing"]]
    assert gap == 2 * 86_400
    assert seen.get(ALERT, run="small", alert="stale_teacher", subject="fm") == 0
    observed(ran)
    assert read_alerts(ran.pipeline.run_dir / "alerts.jsonl") == lines


def test_tensorboard_has_each_period_once(ran: Ran) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    observed(ran)
    events = EventAccumulator(str(ran.pipeline.run_dir / "tensorboard" / VM))
    events.Reload()
    assert {"loss/supervised/click", "ne/click", "calibration/click", "auc/click"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss/supervised/click")] == [0, 1, 2, 3, 4]
    assert [event.step for event in events.Scalars("calibration/click")] == [2, 3, 4], "no click, no calibration"
    trainer = EventAccumulator(str(ran.pipeline.run_dir / "tensorboard" / "trainer.students"))
    trainer.Reload()
    assert all(event.value > 0 for event in trainer.Scalars("examples_per_s"))


def test_the_report_says_what_was_not_promoted_and_what_fired(ran: Ran) -> None:
    observed(ran)
    ran.pipeline.records.start()
    ran.pipeline.records.refresh()
    ran.pipeline.write_events()
    section = operations(Run.read(ran.pipeline.run_dir))
    decisions, fired = section.parts
    assert isinstance(decisions, Listing)
    assert isinstance(fired, Listing)
    assert [row[0][0] for row in decisions.rows].count(VM) == 4
    assert any(row[2] == ("not promoted", "worse") and "ne of click is" in row[-1][0] for row in decisions.rows)
    assert any(row[1][0] == "stale_teacher" for row in fired.rows)


def test_without_the_key_nothing_is_guarded(ran: Ran) -> None:
    values = config(ran.folder).dump()
    assert values.pop("promotion")
    plain = Pipeline(PipelineConfig.model_validate(values))
    assert not any(spec.guarded for spec in plain.specs)
    assert json.loads(next(ran.pipeline.run_dir.glob(f"snapshots/{VM}/*/manifest.json")).read_text())["extra"] == {
        "guarded": True
    }


_WAITS = Promotion(decision="refused", by="nobody", reason="nothing was decided", at="")
