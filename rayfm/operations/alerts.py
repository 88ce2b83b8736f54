"""Alerts: bars of the config, and which values are beyond them; `rayfm.pipeline.alerts` asks, logs and records."""

from __future__ import annotations

import dataclasses
from typing import Literal

from pydantic import Field

from rayfm.config import Config

AlertName = Literal["calibration", "coverage", "stale_teacher", "lag", "promotion_refused"]


class AlertsConfig(Config):
    """Bars that a run is held against at the end of each period. One that is not given is not looked at."""

    calibration: float | None = Field(None, gt=0)
    """Calibration of a model's task may be so far from 1, either way: 0.1 is 0.9 to 1.1."""
    calibration_rows: int = Field(1000, ge=1)
    """Periods with fewer labelled rows say nothing of calibration."""
    coverage: float | None = Field(None, gt=0, le=1)
    """Share of a period's impressions that must have a label of each teacher."""
    stale_teacher_s: float | None = Field(None, gt=0)
    """Seconds, in the data's time, from the end of what a teacher was trained on to the end of the period it labelled;
    the smallest possible is one period."""
    lag_s: float | None = Field(None, gt=0)
    """Seconds, in the data's time, that a trainer of a run that follows may be behind the newest complete period."""
    promotion_refused: bool = True
    """Whether a version that the guard refused is an alert, until one of its model is promoted."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """A value held against its bar."""

    alert: AlertName
    subject: str
    """What it is of: a model and task, a teacher, a trainer."""
    firing: bool
    value: float
    bar: float

    def __str__(self) -> str:
        words = {
            "calibration": f"calibration is {self.value:.3f}, more than {self.bar:g} from 1",
            "coverage": f"labels cover {self.value:.1%} of the impressions, the bar is {self.bar:.1%}",
            "stale_teacher": f"the teacher's labels rest on data {self.value:,.0f} s old, the bar is {self.bar:,.0f} s",
            "lag": f"{self.value:,.0f} s behind the newest complete period, the bar is {self.bar:,.0f} s",
            "promotion_refused": "the newest version was not promoted",
        }
        return f"{self.subject}: {words[self.alert]}"


def calibration(config: AlertsConfig, subject: str, value: float | None, rows: float) -> list[Finding]:
    """Of one model's task over one period; nothing where there are too few rows, or no value."""
    if config.calibration is None or value is None or rows < config.calibration_rows:
        return []
    return [Finding("calibration", subject, abs(value - 1) > config.calibration, value, config.calibration)]


def coverage(config: AlertsConfig, teacher: str, share: float) -> list[Finding]:
    """Of one teacher's labels of one period's impressions."""
    if config.coverage is None:
        return []
    return [Finding("coverage", teacher, share < config.coverage, share, config.coverage)]


def stale_teacher(config: AlertsConfig, teacher: str, seconds: float) -> list[Finding]:
    """Of one teacher's labels of one period."""
    if config.stale_teacher_s is None:
        return []
    return [Finding("stale_teacher", teacher, seconds > config.stale_teacher_s, seconds, config.stale_teacher_s)]


def lag(config: AlertsConfig, trainer: str, seconds: float) -> list[Finding]:
    """Of one trainer of a run that follows."""
    if config.lag_s is None:
        return []
    return [Finding("lag", trainer, seconds > config.lag_s, seconds, config.lag_s)]


def promotion_refused(config: AlertsConfig, model: str, refused: bool) -> list[Finding]:
    """Of one model's newest decision."""
    return [Finding("promotion_refused", model, refused, float(refused), 0.0)] if config.promotion_refused else []
