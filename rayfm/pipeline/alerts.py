"""The alerts of a run: held against their bars at the end of each period, logged, kept in ``alerts.jsonl``, exported.

A line of ``alerts.jsonl`` is written where an alert begins or ends to fire. A run that is gone on with holds the
periods that stand against the bars again, which gives the same lines; none is written twice.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rayfm.config import SnapshotError
from rayfm.operations import alerts
from rayfm.operations.alerts import Finding
from rayfm.operations.logs import fields
from rayfm.operations.metrics import ALERT
from rayfm.pipeline.follow import Lag
from rayfm.pipeline.label_jobs import freshness
from rayfm.pipeline.state import RunState
from rayfm.pipeline.watch_metrics import quality
from rayfm.schema import KINDS
from rayfm.snapshots.promotion import Promotion
from rayfm.training.period import PeriodRecord
from rayfm.training.spec import TrainerSpec

log = logging.getLogger(__name__)

ALERTS = "alerts.jsonl"


class RunAlerts:
    """Holds a run's periods against the bars of its config.

    Args:
        run: the run.
    """

    def __init__(self, run: RunState) -> None:
        self.run, self.config = run, run.config.alerts
        self._path = run.run_dir / ALERTS
        lines = read_alerts(self._path)
        self._written = {(line["alert"], line["subject"], line["period"], line["firing"]) for line in lines}
        # What is looked at once a period begins anew with the first one; of the rest only the newest is looked at.
        self._firing = {
            (line["alert"], line["subject"]): bool(line["firing"])
            for line in lines
            if line["alert"] in ("lag", "promotion_refused")
        }

    def period(self, spec: TrainerSpec, record: PeriodRecord, rows: Sequence[Mapping[str, Any]]) -> None:
        """A trainer has finished a period."""
        found: list[Finding] = []
        for (model, task, metric), (value, count) in quality(rows).items():
            if metric == "calibration":
                found += alerts.calibration(self.config, f"{model}/{task}", value, count)
        for teacher in spec.teachers:
            found += self._labels(teacher, record.period)
        self._judge(found, record.period)

    def _labels(self, teacher: str, period: str) -> list[Finding]:
        """Of the labels that a trainer has just read."""
        ticket = self.run.tickets.get("labelled", teacher, period)
        if ticket is None:
            return []
        found = alerts.coverage(self.config, teacher, float(ticket["coverage"].get(KINDS[0], 0.0)))
        seconds = freshness(self.run, ticket)
        return found if seconds is None else found + alerts.stale_teacher(self.config, teacher, seconds)

    def look(self, lags: Mapping[str, Lag]) -> None:
        """Every few seconds."""
        for trainer, behind in lags.items():
            self._judge(alerts.lag(self.config, trainer, behind.seconds), behind.newest)
        for spec in self.run.specs:
            if not spec.guarded:
                continue
            for learner in spec.learners:
                decided = self._newest_decision(learner.key)
                if decided is not None:
                    found = alerts.promotion_refused(self.config, learner.key, not decided.promoted)
                    self._judge(found, decided.period or "")

    def _newest_decision(self, model: str) -> Promotion | None:
        """What stands beside the newest version that was decided on, by people too. Of the versions that are kept: the
        tickets are of all that ever were, and this is asked every few seconds of a run without an end.
        """
        store = self.run.snapshots
        for version in reversed(store.versions(model)):
            with contextlib.suppress(SnapshotError):  # one that cannot be read is said elsewhere
                decided = store.promotion(model, version)
                if decided is not None:
                    return decided
        return None

    def _judge(self, findings: Sequence[Finding], period: str) -> None:
        for finding in findings:
            key = finding.alert, finding.subject
            before, self._firing[key] = self._firing.get(key, False), finding.firing
            ALERT.set(float(finding.firing), run=self.run.config.name, alert=finding.alert, subject=finding.subject)
            if before == finding.firing or (*key, period, finding.firing) in self._written:
                continue
            self._written.add((*key, period, finding.firing))
            line = {
                "alert": finding.alert,
                "subject": finding.subject,
                "period": period,
                "firing": finding.firing,
                "value": finding.value,
                "bar": finding.bar,
                "at": round(time.time(), 3),
            }
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            if finding.firing:
                log.warning("alert %s, %s: %s", finding.alert, period, finding, extra=fields(**line))
            else:
                log.info("alert %s is over, %s: %s", finding.alert, period, finding.subject, extra=fields(**line))

    def close(self) -> None:
        """Nothing to do."""


def read_alerts(path: Path) -> list[dict[str, Any]]:
    """The lines of ``alerts.jsonl``, as far as it is there; a last one that was cut off is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
