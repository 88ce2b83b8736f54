"""``rayfm labels``: what the label store holds, and its upkeep. Each command is a few lines over a Python function."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote, unquote, urlsplit

import typer

from rayfm.cli.runs import standing

if TYPE_CHECKING:
    from rayfm.labels.storage import Storage
    from rayfm.labels.store import LabelStore

app = typer.Typer(no_args_is_help=True, help="The label store: what it holds, and its upkeep.")

Run = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's folder, or s3://bucket/prefix of a store.", show_default=False)
]
Teacher = Annotated[str | None, typer.Option("--teacher", help="Only this teacher's.")]
Version = Annotated[str | None, typer.Option("--version", help="Only this version's.")]
Period = Annotated[str | None, typer.Option("--period", help="Only this period's.")]
Metadata = Annotated[
    str | None,
    typer.Option(
        "--metadata",
        metavar="URL",
        help="Where pins are: sqlite:///PATH or zookeeper://HOST:PORT/ROOT; default: RUN's.",
    ),
]


@contextlib.contextmanager
def _store(run: str, url: str | None = None) -> Iterator[LabelStore]:
    """The store of a run's folder (which may be in a bucket), with the run's metadata or that of ``url``; or of a
    bucket."""
    from rayfm.config import ConfigError
    from rayfm.labels.store import LabelStore
    from rayfm.snapshots import open_metadata

    root: str | Storage = run
    if "://" not in run:
        root = _of_run(standing(Path(run)))
        own = Path(run).absolute() / "metadata.sqlite"
        if url is None and own.is_file():
            url = f"sqlite://{quote(str(own))}"
    if url is None:
        yield LabelStore(root)
        return
    if url.startswith("sqlite:") and not Path(unquote(urlsplit(url).path)).is_file():
        # A new one would know of no pins.
        raise ConfigError(f"{url}: no such file; name the metadata store that holds the pins")
    with contextlib.closing(open_metadata(url)) as metadata:
        yield LabelStore(root, metadata)


def _of_run(folder: Path) -> Storage:
    """Where the run in a folder keeps its labels: what its config says, else the folder."""
    from rayfm.config import read_yaml
    from rayfm.labels.config import run_storage

    saved = read_yaml(folder / "config.yaml") if (folder / "config.yaml").is_file() else {}
    return run_storage(folder, saved.get("name", folder.name), saved.get("label_store"))


def _examples(run: str, examples: Path | None) -> Any:
    """The example store that a run's labels are of."""
    from rayfm.config import ConfigError, read_yaml
    from rayfm.data.store import ExampleStore

    if examples is not None:
        return ExampleStore(examples)
    saved = Path(run) / "config.yaml"
    if "://" in run or not saved.is_file():
        raise ConfigError(f"{run}: no config.yaml says where its examples are; give their folder with --examples")
    return ExampleStore(read_yaml(saved).get("storage", "runs/data"))


def _print(title: str, left: tuple[str, ...], right: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """A table in 80 columns: names to the left, numbers to the right."""
    from rich.table import Table

    from rayfm.cli.display import console

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _say(text: str) -> None:
    from rayfm.cli.display import console

    console.print(text, soft_wrap=True, highlight=False, markup=False)


@app.command("list")
def list_(run: Run, teacher: Teacher = None, period: Period = None) -> None:
    """List labels by teacher, period and version."""
    rows: Counter[tuple[str, str, str]] = Counter()
    with _store(run) as store:
        for part in store.list(teacher, period):
            rows[part.teacher, part.period, part.version] += part.rows
    shown = [(*names, f"{count:,}") for names, count in rows.items()]
    _print(f"labels of {run}", ("teacher", "period", "version"), ("rows",), shown)


@app.command()
def coverage(
    run: Run,
    teacher: Teacher = None,
    version: Version = None,
    period: Period = None,
    task: Annotated[
        list[str] | None, typer.Option("--task", help="Count rows with a prediction for it (repeatable); default: any.")
    ] = None,
    examples: Annotated[
        Path | None, typer.Option("--examples", metavar="FOLDER", help="The example store; by default the run's.")
    ] = None,
) -> None:
    """Labelled rows over all rows, by period, kind and traffic."""
    from rayfm.labels.coverage import coverage as count

    with _store(run) as store:
        found = count(store, _examples(run, examples), teacher, version, period, task)
    short = {"impression": "imp.", "consideration": "cons."}
    rows = [
        (
            row.teacher, row.version, row.period, short.get(row.kind, row.kind), row.traffic,
            f"{row.total:,}", _percent(row.labelled, row.total),
        )
        for row in found
    ]  # fmt: skip
    left = ("teacher", "version", "period", "kind", "traffic")
    _print(f"coverage of {run}", left, ("rows", "labelled"), rows)


def _percent(part: int, whole: int) -> str:
    """A share; what is not whole is not shown as 100 %, nor what is there as 0 %."""
    share = 100 * part / whole
    if part < whole:
        share = min(share, 99.9)
    return f"{max(share, 0.1):.1f}%" if part else "0.0%"


@app.command()
def show(
    run: Run,
    teacher: str,
    version: str,
    period: str,
    rows: Annotated[int, typer.Option("--rows", min=0, help="Print this many rows of each lane instead.")] = 0,
) -> None:
    """What one version says of one period: statistics by kind and task, or rows."""
    from rayfm.labels.show import sample, statistics

    title = f"{teacher}@{version} for {period}"
    with _store(run) as store:
        if rows:
            found = sample(store, teacher, version, period, rows)
            numbers = [name for name in found.columns if name not in ("kind", "lane", "row", "example_id")]
            shown = [
                (
                    str(row["kind"]),
                    *(f"{row[name]:.0f}" for name in ("lane", "row", "example_id")),
                    *(_number(row[name]) for name in numbers),
                )
                for row in found.to_dict("records")
            ]
            _print(title, ("kind",), ("lane", "row", "example_id", *numbers), shown)
            return
        summary = [
            (
                row.kind, row.task, f"{row.rows:,}", f"{row.labelled:,}",
                *(_number(value) for value in (row.mean, row.std, row.low, row.high)),
            )
            for row in statistics(store, teacher, version, period)
        ]  # fmt: skip
    _print(title, ("kind", "task"), ("rows", "labelled", "mean", "std", "min", "max"), summary)


def _number(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.5g}"


@app.command()
def compact(
    run: Run,
    teacher: Teacher = None,
    period: Period = None,
    target_mb: Annotated[int, typer.Option("--target-mb", min=1, help="Size of a file.")] = 128,
) -> None:
    """Rewrite small files into large ones, with the same rows."""
    from rayfm.labels.compaction import compact as rewrite

    with _store(run) as store:
        done = rewrite(store, teacher, period, target_mb << 20)
    if not done:
        _say("nothing to compact")
        return
    rows = [
        (item.teacher, item.period, f"{item.files_before} -> {item.files_after}", f"{item.rows:,}") for item in done
    ]
    _print(f"compacted {run}", ("teacher", "period"), ("files", "rows"), rows)
    _say("The old files go with `rayfm labels vacuum`, once nobody needs them.")


@app.command()
def expire(
    run: Run,
    teacher: Teacher = None,
    version: Version = None,
    period: Period = None,
    before: Annotated[str | None, typer.Option("--before", metavar="PERIOD", help="Only periods before it.")] = None,
    keep_versions: Annotated[
        int | None, typer.Option("--keep-versions", min=1, help="Only versions that so many newer ones supersede.")
    ] = None,
    also_pinned: Annotated[bool, typer.Option("--also-pinned", help="Also what a living pin names.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    metadata: Metadata = None,
) -> None:
    """Take labels out of the table: those that meet every condition given."""
    from rayfm.config import validate
    from rayfm.labels.retention import Retention
    from rayfm.labels.retention import expire as take_out

    values: dict[str, Any] = {"teacher": teacher, "version": version, "period": period, "before": before}
    values["keep_versions"] = keep_versions
    retention = validate(Retention, values, "labels expire")
    with _store(run, metadata) as store:
        found = take_out(store, retention, dry_run, also_pinned)
    if not found:
        _say("nothing to expire")
        return
    went = "would go" if dry_run else "gone"
    rows = [
        (item.teacher, item.period, item.version, f"pinned: {', '.join(item.kept_for)}" if item.kept_for else went,
         f"{item.rows:,}")
        for item in found
    ]  # fmt: skip
    _print(f"expiry in {run}", ("teacher", "period", "version", "what"), ("rows",), rows)
    if not dry_run and any(not item.kept_for for item in found):
        _say("Their files go with `rayfm labels vacuum`, once nobody needs them.")


@app.command()
def vacuum(
    run: Run,
    hours: Annotated[int, typer.Option("--hours", min=0, help="Spare what was in use, or written, since.")] = 24,
    metadata: Metadata = None,
) -> None:
    """Delete files that no pin, no version of the table since, and no running job needs."""
    with _store(run, metadata) as store:
        deleted = store.vacuum(hours)
    _say(f"{len(deleted)} files deleted")
