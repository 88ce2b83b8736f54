"""What the command line shows: progress bars, tables, the final lines. All of it fits 80 columns."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from rayfm.pipeline.config import PipelineConfig
from rayfm.pipeline.hints import hints

console = Console(soft_wrap=False)


LOG_INTERVAL_S = 10.0
"""Seconds between lines of progress where the output is no terminal (a job's log)."""


class Display:
    """Progress of a run: preparation, each trainer, each teacher's labels. Bars on a terminal, lines in a log.

    Args:
        config: the run's config.
        interval_s: seconds between two lines where the output is no terminal.
    """

    def __init__(self, config: PipelineConfig, interval_s: float = LOG_INTERVAL_S) -> None:
        self.config = config
        self.interval_s = interval_s
        self._start = self._logged = time.monotonic()
        self._done: dict[str, str] = {}
        self._line = ""
        self._bars: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.fields[label]:<20}"),
            BarColumn(bar_width=22),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.description}"),
            console=console,
            refresh_per_second=4,
        )

    def __enter__(self) -> Display:
        console.print(f"run [bold]{self.config.name}[/bold] -> {self.config.run_dir}  (starting Ray takes a while)")
        for hint in hints(self.config):
            console.print(f"[yellow]hint:[/yellow] {hint}", highlight=False)
        if console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if console.is_terminal:
            self._progress.stop()
        else:
            self._log()

    def update(self, watch: Any) -> None:
        """Show how far the parts are."""
        total, follow = len(watch.pipeline.periods), watch.pipeline.follow
        self._show("prepare", "prepare", watch.prepared, total, "", follow)
        for spec in watch.pipeline.specs:
            done, text = watch.trained[spec.name]
            label = f"teacher {spec.name}" if spec.role == "teacher" else f"{spec.name} ({len(spec.learners)} models)"
            self._show(f"train {spec.name}", label, done, len(spec.periods), text, follow)
            labelled, wanted = watch.labelled.get(spec.name, (0, 0))
            if wanted:
                self._show(f"label {spec.name}", f"labels of {spec.name}", labelled, wanted, "", follow)
        if not console.is_terminal and time.monotonic() - self._logged >= self.interval_s:
            self._log()

    def _log(self) -> None:
        """A line about all parts, unless nothing has changed since the last one."""
        line = ", ".join(self._done.values())
        if line != self._line:
            console.print(f"{time.monotonic() - self._start:.0f} s: {line}", highlight=False)
        self._line, self._logged = line, time.monotonic()

    def _show(self, key: str, label: str, done: float, total: int, text: str, open_end: bool = False) -> None:
        self._done[key] = f"{key} {min(done, total):.3g}/{total}"
        if key not in self._bars:
            self._bars[key] = self._progress.add_task(text, total=total, label=label[:20])
        bar = self._bars[key]
        completed = round(done, 1) if done < total else total
        self._progress.update(bar, completed=completed, total=total, description=text)
        if done >= total and not open_end:
            self._progress.stop_task(bar)


def print_summary(summary: dict[str, Any], seconds: float | None, report: Path) -> None:
    """The final table, and where the report is."""
    from rayfm.report.table import summary_table

    console.print(summary_table(summary))
    took = "" if seconds is None else f"{seconds:.0f} s. "
    here = Path.cwd()
    shown = report.relative_to(here) if report.is_relative_to(here) else report
    console.print(f"{took}Report: {shown}", soft_wrap=True)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for position, column in enumerate(columns):
        table.add_column(column, justify="left" if position == 0 else "right", overflow="fold")
    return table


def prepared_table(manifests: list[Any]) -> Table:
    """Rows and rejects by period."""
    table = _table("example store", "period", "impressions", "considerations", "rejected", "lanes")
    for manifest in manifests:
        rejected = sum(manifest.rejected.values())
        table.add_row(
            manifest.period,
            f"{manifest.rows('impression'):,}",
            f"{manifest.rows('consideration'):,}",
            f"{rejected:,}" if rejected else "-",
            str(manifest.lanes),
        )
    return table


def label_table(tickets: list[dict[str, Any]]) -> Table:
    """What label jobs did."""
    table = _table("labels", "period", "teacher", "version", "rows", "coverage", "seconds")
    for ticket in tickets:
        coverage = ", ".join(f"{share:.1%}" for share in ticket["coverage"].values())
        table.add_row(
            ticket["period"], ticket["teacher"], ticket["version"], f"{ticket['rows']:,}", coverage,
            f"{ticket['seconds']:.1f}",
        )  # fmt: skip
    return table


def metric_table(rows: list[dict[str, Any]]) -> Table:
    """Metrics of one snapshot, pooled over traffics."""
    table = _table("metrics", "period", "kind", "task", "metric", "value", "n")
    for row in rows:
        if row["traffic"] == "all" and row["value"] is not None:
            table.add_row(
                row["period"], row["kind"], row["task"], row["metric"], f"{row['value']:.4f}", f"{row['n']:,}"
            )
    return table


def parts_table(what: str) -> Table:
    """The registered parts with the first line of what each says of itself."""
    from rayfm.config import ConfigError, nearest
    from rayfm.data.sources.base import SOURCES
    from rayfm.distill.base import OBJECTIVES
    from rayfm.models.base import MODELS
    from rayfm.reproduce.table import TABLES

    registries = {"models": MODELS, "objectives": OBJECTIVES, "sources": SOURCES, "tables": TABLES}
    if what != "all" and what not in registries:
        raise ConfigError(f"cannot list {what!r}{nearest(what, list(registries))}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("kind", "type", "what it is"):
        table.add_column(column, overflow="fold")
    for kind, registry in registries.items():
        for name in registry if what in ("all", kind) else ():
            doc = (registry[name].__doc__ or "").strip().splitlines()
            about = f"{doc[0]} Source: {registry[name].source}." if kind == "tables" else doc[0] if doc else ""
            table.add_row(kind.removesuffix("s"), name, about)
    return table


def snapshot_table(run_dir: Path, states: Mapping[tuple[str, str], tuple[str, ...]]) -> Table:
    """Published versions of a run, with what is said of a (model, version)."""
    from rayfm.snapshots.load import SnapshotStore

    store = SnapshotStore(run_dir)
    columns = ["model", "version", "trained through", "MB", *(["state"] if states else [])]
    table = _table(f"snapshots of {run_dir}", *columns)
    for model in store.models():
        for version in store.versions(model):
            manifest = store.manifest(model, version)
            size = sum(file.bytes for file in manifest.files.values()) / 1e6
            row = [model, version, manifest.trained_through or "-", f"{size:.1f}"]
            table.add_row(*row, *(["; ".join(states.get((model, version), ()))] if states else []))
    return table


def _values(values: dict[str, Any]) -> str:
    """Values by the shortest ends of their keys that tell them apart."""
    keys = [key.split(".") for key in values]
    shown = []
    for parts, value in zip(keys, values.values(), strict=True):
        depth = next(
            n
            for n in range(1, len(parts) + 1)
            if sum(other[-n:] == parts[-n:] for other in keys) == 1 or n == len(parts)
        )
        shown.append(f"{'.'.join(parts[-depth:])}={value}")
    return escape(", ".join(shown))


def ended_trial(records: list[Any], trials: int) -> str:
    """A line about the trial that ended last."""
    ended = [record for record in records if record.data["ended"] is not None]
    last = max(ended, key=lambda record: record.data["started"] + record.data["seconds"])
    score = f"{list(last.scores.values())[-1]:.5f}" if last.scores else escape(last.data["error"] or "-")
    return f"trial {len(ended)}/{trials} {last.data['ended']}: {score}  [dim]{_values(last.values)}[/dim]"


def trial_table(result: Any) -> Table:
    """The trials of a search, best first."""
    target = result.target
    title = f"{target.metric} of {target.name}, task {target.task}, on {result.periods[0]} .. {result.periods[-1]}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in (target.metric, "periods", "trial", "seconds"):
        table.add_column(column, justify="right" if column != "trial" else "left", no_wrap=True)
    table.add_column("values", overflow="fold")
    for record in result.trials:
        score = f"{list(record.scores.values())[-1]:.5f}" if record.scores else "-"
        error = f" [dim]({escape(record.data['error'])})[/dim]" if record.data["error"] else ""
        table.add_row(
            score,
            f"{len(record.scores)}/{len(result.periods)}",
            record.data["ended"] or "unfinished",
            f"{record.data['seconds']:.1f}",
            _values(record.values) + error,
        )
    return table


def print_search(result: Any, config: Path) -> None:
    """The trials, and how to run with the best one's values."""
    console.print(trial_table(result))
    here = Path.cwd()
    shown = result.best.relative_to(here) if result.best.is_relative_to(here) else result.best
    console.print(f"Best values: {shown}", soft_wrap=True)
    console.print(f"rayfm run {config} --set @{shown}", soft_wrap=True)
