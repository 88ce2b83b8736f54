from __future__ import annotations

import json

import pytest
import torch
from example_store import write_store
from small_pipeline import PERIODS, small_pipeline

from rayfm.data.batch import IMPRESSION
from rayfm.data.store import write_json_atomic
from rayfm.metrics import MetricState, bootstrap_weights
from rayfm.pipeline.plan import student_specs, teacher_spec
from rayfm.pipeline.records import RunRecords
from rayfm.pipeline.tickets import Tickets, metadata_path
from rayfm.snapshots import SQLiteMetadataStore
from rayfm.training.period import PeriodRecord

ROWS = 200


@pytest.fixture
def run(tmp_path):
    config = small_pipeline(tmp_path)
    specs = [teacher_spec(config, "fm", PERIODS), *student_specs(config, PERIODS)]
    return config, specs, Tickets(SQLiteMetadataStore(metadata_path(config.run_dir)), config.name)


def leave_period(spec, period: str, seed: int = 0) -> None:
    """What a trainer leaves of a period: metrics of what it predicted, then the record."""
    rng = torch.Generator().manual_seed(seed)
    folder = spec.folder / "metrics" / period
    if period != PERIODS[0]:
        for position, learner in enumerate(spec.learners):
            state = MetricState([("click", "binary")], ("feed", "search"), replicates=10)
            user = torch.arange(ROWS) // 4
            label = torch.bernoulli(torch.full((ROWS,), 0.3), generator=rng)
            logits = label * (1 + position) - 1
            shown, weight = torch.ones(ROWS, dtype=torch.bool), torch.ones(ROWS)
            state.update(
                "click", IMPRESSION, logits, label, shown, weight, torch.zeros(ROWS, dtype=torch.long), user,
                weights=bootstrap_weights(user, 10),
            )  # fmt: skip
            folder.mkdir(parents=True, exist_ok=True)
            state.save(folder / f"{learner.key}.npz")
        write_json_atomic(folder / "rates.json", {"click": 0.25})
    record = PeriodRecord(
        trainer=spec.name,
        period=period,
        examples=ROWS,
        seconds=1.0,
        parts={"read": 0.5},
        losses={},
        versions={learner.key: f"{period}-v" for learner in spec.learners},
    )
    write_json_atomic(spec.folder / "periods" / f"{period}.json", record.dump())


def read_lines(config) -> list[dict]:
    return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]


def test_metrics_grow_with_the_periods_that_trainers_finish(run):
    config, specs, tickets = run
    records = RunRecords(config, specs, tickets)
    records.start()
    assert records.refresh() == []
    teacher, students = specs
    leave_period(teacher, PERIODS[0])
    assert [record.trainer for record in records.refresh()] == ["fm"]
    assert read_lines(config) == [], "the first period is not predicted"
    leave_period(teacher, PERIODS[1])
    leave_period(students, PERIODS[0])
    leave_period(students, PERIODS[1])
    assert [(r.trainer, r.period) for r in records.refresh()] == [
        ("fm", PERIODS[1]),
        ("students", PERIODS[0]),
        ("students", PERIODS[1]),
    ]
    assert records.refresh() == [], "each period once"
    found = read_lines(config)
    assert {(row["model"], row["variant"], row["seed"]) for row in found} == {
        ("fm", "teacher", 0),
        ("vm", "none", 1),
        ("vm", "direct", 1),
    }
    assert {row["period"] for row in found} == {PERIODS[1]}
    pooled = [row for row in found if row["traffic"] == "all" and row["metric"] == "ne"]
    assert [row["n"] for row in pooled] == [ROWS] * 3
    direct = next(row for row in pooled if row["variant"] == "direct")
    none = next(row for row in pooled if row["variant"] == "none")
    assert direct["value"] < none["value"], "it was given the better logits"
    assert any(row["metric"] == "ne_train" and row["value"] is not None for row in found)


def test_a_resumed_run_ends_with_the_same_file(run):
    config, specs, tickets = run
    for spec in specs:
        for period in PERIODS[:2]:
            leave_period(spec, period)
    before = RunRecords(config, specs, tickets)
    before.start()
    before.refresh()
    # Killed in the middle of a line; the other records object is the resumed process's.
    with (config.run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"period": "2024-')
    for spec in specs:
        leave_period(spec, PERIODS[2])
    after = RunRecords(config, specs, tickets)
    after.start()
    after.refresh()
    whole = RunRecords(config, specs, tickets)
    found = read_lines(config)
    whole.start()
    whole.refresh()
    assert read_lines(config) == found
    keys = [tuple(row[key] for key in row if key not in ("value", "n")) for row in found]
    assert len(set(keys)) == len(keys), "no line stands twice"
    assert {row["period"] for row in found} == set(PERIODS[1:])


def test_the_summary_is_of_the_test_periods(run):
    config, specs, tickets = run
    for spec in specs:
        for period in PERIODS:
            leave_period(spec, period)
    summary = RunRecords(config, specs, tickets).summary()
    assert json.loads((config.run_dir / "summary.json").read_text()) == json.loads(json.dumps(summary))
    text = json.dumps(summary)
    assert '"direct"' in text
    later = small_pipeline(config.run_dir.parent.parent, schedule={"warmup": 2})
    shorter = RunRecords(later, specs, tickets).summary()
    assert shorter != summary, "one test period instead of two"


def test_events_tell_what_happened_in_order(run):
    config, specs, tickets = run
    write_store(config.run_dir.parent.parent / "data", list(PERIODS[:2]), impressions=8, considerations=4)
    tickets.put("labelled", "fm", PERIODS[1], {"period": PERIODS[1], "version": "v", "rows": 12})
    leave_period(specs[0], PERIODS[0])
    found = RunRecords(config, specs, tickets).events()
    assert [(event["event"], event["period"]) for event in found] == [
        ("prepared", PERIODS[0]),
        ("trained", PERIODS[0]),
        ("published", PERIODS[0]),
        ("prepared", PERIODS[1]),
        ("labelled", PERIODS[1]),
    ]
    assert found[0]["rows"] == {"impression": 8, "consideration": 4}
    assert found[4]["teacher"] == "fm"
    assert found[2] == {
        "event": "published",
        "model": "fm.teacher.0",
        "version": f"{PERIODS[0]}-v",
        "period": PERIODS[0],
    }
    written = [json.loads(line) for line in (config.run_dir / "progress.jsonl").read_text().splitlines()]
    assert written == json.loads(json.dumps(found))
