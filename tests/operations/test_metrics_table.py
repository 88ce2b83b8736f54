"""The table of metrics: its form, and that each row can be recorded as what it says it is."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from rayfm.operations import metrics
from rayfm.operations.metrics import ALERT, COVERAGE, EXAMPLES, METRICS, SWAP_SECONDS, capture

ROOT = Path(__file__).parents[2]


def test_names_follow_prometheus_and_are_unique():
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names)) >= 30
    for metric in METRICS:
        assert re.fullmatch(r"rayfm_[a-z_]+", metric.name), metric.name
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert bool(metric.buckets) == (metric.kind == "histogram"), metric.name
        assert metric.exported == f"ray_{metric.name}"
        assert metric.labels[0] == "run"
        assert "period" not in metric.labels, "a series a period has no end"
        assert metric.help.endswith(".") or ": " in metric.help, metric.name


def test_the_file_that_is_named_as_source_records_the_metric():
    constants = {value.name: name for name, value in vars(metrics).items() if isinstance(value, metrics.Metric)}
    for metric in METRICS:
        path = ROOT / metric.source.partition(":")[0]
        assert re.search(rf"\b{constants[metric.name]}\b", path.read_text()), f"{path} does not record {metric.name}"


def test_a_counter_adds_up_a_gauge_keeps_the_last_a_histogram_lists():
    with capture() as seen:
        EXAMPLES.add(3, run="r", trainer="t", phase="train")
        EXAMPLES.add(4, run="r", trainer="t", phase="train")
        EXAMPLES.add(5, run="r", trainer="t", phase="predict")
        COVERAGE.set(0.5, run="r", teacher="fm", kind="impression")
        COVERAGE.set(0.75, run="r", teacher="fm", kind="impression")
        COVERAGE.set(math.nan, run="r", teacher="fm", kind="impression")
        SWAP_SECONDS.observe(1.5, run="r", model="m")
        SWAP_SECONDS.observe(2.5, run="r", model="m")
    assert seen.get(EXAMPLES, run="r", trainer="t", phase="train") == 7
    assert seen.get(EXAMPLES, run="r", trainer="t", phase="predict") == 5
    assert seen.get(EXAMPLES, run="r", trainer="u", phase="train") is None
    assert seen.get(COVERAGE, run="r", teacher="fm", kind="impression") == 0.75
    assert seen.get(SWAP_SECONDS, run="r", model="m") == [1.5, 2.5]


def test_other_labels_or_another_kind_are_refused():
    with capture():
        with pytest.raises(ValueError, match=r"rayfm_alert is a gauge with labels \('run', 'alert', 'subject'\)"):
            ALERT.set(1, run="r", alert="lag")
        with pytest.raises(ValueError, match="rayfm_examples_total is a counter"):
            EXAMPLES.set(1, run="r", trainer="t", phase="train")


def test_outside_ray_nothing_is_recorded_and_ray_is_not_imported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metrics, "_instruments", {})
    monkeypatch.setitem(metrics.sys.modules, "ray", None)
    EXAMPLES.add(3, run="r", trainer="t", phase="train")
    assert metrics._instruments == {}


def test_what_goes_wrong_in_ray_is_logged_once_and_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    class Broken:
        def inc(self, value: float, tags: dict[str, str]) -> None:
            raise RuntimeError("the agent is away")

    monkeypatch.setattr(metrics, "_instruments", {EXAMPLES.name: Broken()})
    monkeypatch.setattr(metrics, "_failed", set())
    monkeypatch.setattr(metrics, "_in_ray", lambda: True)
    for _ in range(3):
        EXAMPLES.add(3, run="r", trainer="t", phase="train")
    assert [record.getMessage() for record in caplog.records] == [f"metric {EXAMPLES.name} cannot be recorded"]
