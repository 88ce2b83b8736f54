"""Values against their bars."""

from __future__ import annotations

import pytest

from rayfm.operations import alerts
from rayfm.operations.alerts import AlertsConfig

BARS = AlertsConfig(calibration=0.1, calibration_rows=100, coverage=0.95, stale_teacher_s=7200, lag_s=3600)


@pytest.mark.parametrize(
    ("value", "firing"), [(1.0, False), (1.09, False), (0.91, False), (1.11, True), (0.89, True), (0.0, True)]
)
def test_calibration_may_be_so_far_from_one(value: float, firing: bool):
    (finding,) = alerts.calibration(BARS, "vm.none.1/click", value, 100)
    assert finding.firing is firing


def test_few_rows_or_no_value_say_nothing_of_calibration():
    assert alerts.calibration(BARS, "vm.none.1/click", 5.0, 99) == []
    assert alerts.calibration(BARS, "vm.none.1/click", None, 1000) == []


@pytest.mark.parametrize(
    ("finding", "firing", "words"),
    [
        (alerts.coverage(BARS, "fm", 0.95), False, "fm: labels cover 95.0% of the impressions, the bar is 95.0%"),
        (alerts.coverage(BARS, "fm", 0.94), True, "fm: labels cover 94.0% of the impressions, the bar is 95.0%"),
        (alerts.stale_teacher(BARS, "fm", 7200), False, "rest on data 7,200 s old"),
        (alerts.stale_teacher(BARS, "fm", 7201), True, "the bar is 7,200 s"),
        (alerts.lag(BARS, "students", 3600), False, "3,600 s behind the newest complete period"),
        (alerts.lag(BARS, "students", 3601), True, "students: 3,601 s behind"),
        (alerts.promotion_refused(BARS, "vm.none.1", True), True, "vm.none.1: the newest version was not promoted"),
        (alerts.promotion_refused(BARS, "vm.none.1", False), False, ""),
    ],
)
def test_a_bar_is_where_an_alert_begins(finding: list, firing: bool, words: str):
    (only,) = finding
    assert only.firing is firing
    assert words in str(only)


def test_by_default_no_bar_is_set_but_for_refused_versions():
    config = AlertsConfig()
    assert not alerts.calibration(config, "m/click", 9.0, 1e6)
    assert not alerts.coverage(config, "fm", 0.0)
    assert not alerts.stale_teacher(config, "fm", 1e9)
    assert not alerts.lag(config, "students", 1e9)
    assert alerts.promotion_refused(config, "m", True)
