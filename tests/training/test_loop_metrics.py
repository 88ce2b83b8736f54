"""What a worker's loop tells the metrics: its sums, seldom."""

from __future__ import annotations

from pathlib import Path

import pytest
from example_store import write_store
from training_runs import PERIODS, learner, spec, train_here

from rayfm.operations.metrics import EXAMPLES, PART_SECONDS, STEPS, Metric, capture
from rayfm.training.telemetry import FLUSH_S, LoopMetrics


def test_sums_are_handed_over_when_it_is_time_and_never_twice(monkeypatch: pytest.MonkeyPatch):
    now, calls = [0.0], []
    monkeypatch.setattr(Metric, "add", lambda self, value=1.0, /, **labels: calls.append((self.name, value, labels)))
    seconds = {"read": 1.0}
    metrics = LoopMetrics("r", "t", lambda: now[0])
    metrics.begin(lambda: seconds)
    for _ in range(1000):
        metrics.count("train", 64)
    assert not calls, "half a second has not passed"
    now[0] = FLUSH_S
    metrics.count("train", 64)
    labels = {"run": "r", "trainer": "t"}
    assert calls == [
        (EXAMPLES.name, 64_064, {**labels, "phase": "train"}),
        (STEPS.name, 1001, {**labels, "phase": "train"}),
        (PART_SECONDS.name, 1.0, {**labels, "part": "read"}),
    ]
    calls.clear()
    seconds["read"] = 1.5
    metrics.flush()
    assert calls == [(PART_SECONDS.name, 0.5, {**labels, "part": "read"})]
    metrics.begin(lambda: {"read": 0.25})
    calls.clear()
    metrics.flush()
    assert calls == [(PART_SECONDS.name, 0.25, {**labels, "part": "read"})], "a period's seconds begin at 0"


def test_a_training_counts_every_row_and_where_its_time_went(tmp_path: Path):
    write_store(tmp_path / "store", list(PERIODS), impressions=200)
    with capture() as seen:
        train_here(spec(tmp_path / "store", tmp_path / "ads", learner("fm")))
    labels = {"run": "ads", "trainer": "group"}
    assert seen.get(EXAMPLES, phase="train", **labels) == 600
    assert seen.get(EXAMPLES, phase="predict", **labels) == 400, "all periods but the first"
    assert seen.get(STEPS, phase="train", **labels) == 3 * 4, "64 rows a step"
    for part in ("read", "predict", "forward", "backward", "optimizer", "checkpoint", "publish"):
        assert seen.get(PART_SECONDS, part=part, **labels) > 0, part
