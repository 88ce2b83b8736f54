"""The run directory's files: metrics.jsonl, progress.jsonl and summary.json, made from durable records alone.

Nothing here is gathered in memory during the run, so that a run that was killed and resumed ends with the same files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rayfm.config.durable import write_whole
from rayfm.data.store import ExampleStore, write_json_atomic
from rayfm.metrics import Entry, MetricState, lines, summarise
from rayfm.metrics.stages import stage_rows
from rayfm.metrics.summary import Row
from rayfm.pipeline.config import PipelineConfig
from rayfm.pipeline.plan import teachers_of
from rayfm.pipeline.tickets import Tickets
from rayfm.training.period import PeriodRecord
from rayfm.training.spec import TrainerSpec


class RunRecords:
    """Reads what trainers and label jobs left, writes what people and the report read.

    Args:
        config: the run's config.
        specs: its trainers.
        tickets: its tickets; label jobs left theirs there.
        periods: its periods, by default the first trainer's.
    """

    def __init__(
        self, config: PipelineConfig, specs: list[TrainerSpec], tickets: Tickets, periods: tuple[str, ...] | None = None
    ) -> None:
        self.config, self.specs, self.tickets = config, specs, tickets
        self._warned: set[Path] = set()
        self.periods = specs[0].periods if periods is None else periods
        self.store = ExampleStore(config.storage)
        self._written: set[tuple[str, str]] = set()
        self.told: Callable[[TrainerSpec, PeriodRecord, Sequence[Row]], None] | None = None
        """Called by `refresh` with each period that a trainer has finished, and its lines of ``metrics.jsonl``."""

    @property
    def metrics_path(self) -> Path:
        return self.config.run_dir / "metrics.jsonl"

    def start(self) -> None:
        """Begin the metrics file anew; `refresh` fills it from the records."""
        self.metrics_path.parent.mkdir(parents=True, exist_ok=True)
        self.metrics_path.write_text("")
        self._written.clear()

    def warnings(self) -> list[str]:
        """What trainers warned of since the last call, each once."""
        fresh = [
            path
            for spec in self.specs
            for path in sorted((spec.folder / "warnings").glob("*.txt"))
            if path not in self._warned
        ]
        self._warned.update(fresh)
        return [path.read_text() for path in fresh]

    def refresh(self) -> list[PeriodRecord]:
        """Append the metrics of periods that trainers finished since the last call; returns their records."""
        fresh = []
        for spec in self.specs:
            for period in spec.periods:
                path = spec.folder / "periods" / f"{period}.json"
                if (spec.name, period) in self._written or not path.exists():
                    continue
                fresh.append(PeriodRecord.model_validate_json(path.read_text()))
                rows: list[Row] = []
                for entry in self._entries_of(spec, period):
                    rows += lines(entry.state, period, entry.model, entry.variant, entry.seed, entry.train_rate)
                with self.metrics_path.open("a") as file:
                    file.write("".join(json.dumps(row) + "\n" for row in rows))
                self._written.add((spec.name, period))
                if self.told is not None:
                    self.told(spec, fresh[-1], rows)
        return fresh

    def _entries_of(self, spec: TrainerSpec, period: str) -> Iterator[Entry]:
        folder = spec.folder / "metrics" / period
        if not (folder / "rates.json").exists():
            return
        rates = json.loads((folder / "rates.json").read_text())
        for learner in spec.learners:
            state = MetricState.load(folder / f"{learner.key}.npz")
            yield Entry(learner.model_name, learner.variant, learner.seed, period, state, rates)

    def entries(self, periods: tuple[str, ...]) -> Iterator[Entry]:
        """Every model's sums of the given periods."""
        for spec in self.specs:
            for period in periods:
                yield from self._entries_of(spec, period)

    def summary(self) -> dict[str, Any]:
        """Summarise the test periods and write ``summary.json``."""
        periods = self.periods[self.config.schedule.warmup :]
        summary: dict[str, Any] = summarise(
            self.entries(periods),
            reference_variant=self.config.evaluation.reference_variant,
            teacher=teachers_of(self.config),
        )
        references = {name: teacher.reference for name, teacher in self.config.teachers.items()}
        references |= {name: student.reference for name, student in self.config.students.items()}
        summary["stages"] = stage_rows(summary["metrics"], references)
        write_json_atomic(self.config.run_dir / "summary.json", summary)
        return summary

    def events(
        self, arrived: Mapping[str, float] | None = None, closing: Sequence[dict[str, Any]] = ()
    ) -> list[dict[str, Any]]:
        """What happened, period by period; also written to ``progress.jsonl``.

        Args:
            arrived: of a run that follows, when each period was seen to be complete (seconds since 1970).
            closing: events after those of the periods.
        """
        found: list[dict[str, Any]] = []
        prepared = set(self.store.periods())
        arrived = arrived or {}
        for period in self.periods:
            if period in arrived:
                found.append({"event": "arrived", "period": period, "at": round(arrived[period], 3)})
            if period in prepared:
                manifest = self.store.manifest(period)
                found.append(
                    {
                        "event": "prepared",
                        "period": period,
                        "rows": {kind: manifest.rows(kind) for kind in ("impression", "consideration")},
                        "rejected": manifest.rejected,
                        "marginals": [marginal.dump() for marginal in manifest.marginals],
                    }
                )
            for teacher in self.config.teachers:
                ticket = self.tickets.get("labelled", teacher, period)
                if ticket is not None:
                    found.append({"event": "labelled", "period": period, "teacher": teacher, **ticket})
            for spec in self.specs:
                path = spec.folder / "periods" / f"{period}.json"
                if path.exists():
                    record = PeriodRecord.model_validate_json(path.read_text())
                    found.append({"event": "trained", **record.dump()})
                    if period in arrived:
                        found[-1]["delay_s"] = round(max(0.0, path.stat().st_mtime - arrived[period]), 3)
                    for model, version in record.versions.items():
                        found.append({"event": "published", "model": model, "version": version, "period": period})
                        decided = self.tickets.get("promotion", model, version)
                        if decided is not None:
                            words = {"event": "promotion", "model": model, "version": version, "period": period}
                            found.append({**decided, **words, "scored_on": decided["period"]})
        found += closing
        text = "".join(json.dumps(event) + "\n" for event in found).encode()
        write_whole(self.config.run_dir / "progress.jsonl", lambda file: file.write(text))
        return found
