"""Rows of a summary that compare a stage with the next one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rayfm.metrics import IMPRESSION_REFERENCE, SCORED, Entry, MetricState, summarise
from rayfm.metrics.stages import AGAINST_NEXT, stage_rows

REFERENCES = {"early": {"click": "logged/ranking/click"}, "ranking": {}}


def entry(model: str) -> Entry:
    """20 rows, half of them shown: impressions with a label of 0.5 and a reference of 0.25; considerations of 0.2."""
    state = MetricState([("click", "binary")], ("feed",), replicates=10)
    shown, ones, zero = torch.arange(20) < 10, torch.ones(20), torch.zeros(20, dtype=torch.long)
    logit = torch.zeros(20)  # predicts 0.5
    for kind, label, rows in ((0, 0.5, shown), (1, 0.2, ~shown), (IMPRESSION_REFERENCE, 0.25, shown)):
        state.update("click", kind, logit, torch.full((20,), label), rows, ones, zero, torch.arange(20))
    return Entry(model, "none", 1, "2024-01-01", state, {"click": 0.5})


def found(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["kind"], row["metric"]): row for row in rows}


def test_calibration_is_over_the_next_stage_on_both_kinds() -> None:
    assert set(AGAINST_NEXT) < set(SCORED)
    summary = summarise([entry("early"), entry("ranking")])
    rows = stage_rows(summary["metrics"], REFERENCES)
    assert {(row["model"], row["against"]) for row in rows} == {("early", "logged/ranking/click")}
    by = found(rows)
    assert set(by) == {(kind, m) for kind in ("impression", "consideration") for m in ("calibration", "ne", "rmse")}
    assert by["impression", "calibration"]["value"] == pytest.approx(2.0)  # 0.5 over 0.25, not over the label
    assert by["consideration", "calibration"]["value"] == pytest.approx(2.5)
    assert by["impression", "calibration"]["n"] == 10
    labelled = [row for row in summary["metrics"] if (row["model"], row["kind"]) == ("early", "impression")]
    assert next(row["value"] for row in labelled if row["metric"] == "calibration") == pytest.approx(1.0)


def test_no_reference_no_rows() -> None:
    assert stage_rows(summarise([entry("ranking")])["metrics"], REFERENCES) == []
