"""``rayfm checkpoints``: what a run could go back to, whether it can be read, and removing the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rayfm.cli.runs import RunFolder, standing

app = typer.Typer(no_args_is_help=True, help="What a run's trainers go back to after a crash.")

Trainer = Annotated[str | None, typer.Option("--trainer", help="Only this trainer; by default all.")]


@app.command("list")
def list_(run_dir: RunFolder, trainer: Trainer = None) -> None:
    """List a run's checkpoints, oldest first, those that were cut short among them."""
    from rich.table import Table

    from rayfm.cli.display import console
    from rayfm.training.checkpoint_files import checkpoints_of

    wanted = _trainers(run_dir, trainer)
    table = Table(title=f"checkpoints of {run_dir}", title_justify="left", box=None, pad_edge=False)
    for column in ("trainer", "checkpoint", "stands at", "workers", "MB", "written"):
        table.add_column(column, overflow="fold", justify="right" if column in ("workers", "MB") else "left")
    for found in checkpoints_of(run_dir):
        if found.trainer not in wanted:
            continue
        if found.state is None:
            where, workers = "unfinished", "-"
        else:
            cursor, workers = found.state.cursor, str(found.state.world)
            where = f"step {cursor.step} of {cursor.period}" if cursor.period else _end(cursor.finished)
        table.add_row(found.trainer, found.path.name, where, workers, f"{found.bytes / 1e6:.1f}", _time(found.changed))
    console.print(table)


@app.command()
def verify(run_dir: RunFolder, trainer: Trainer = None) -> None:
    """Read every complete checkpoint whole: checksums, and that all values are finite."""
    from rayfm.quiet import quiet_libraries

    quiet_libraries()
    from rayfm.training.checkpoint import complete
    from rayfm.training.checkpoint_files import verify_checkpoint

    count = total = 0
    for root in _trainers(run_dir, trainer).values():
        for path in complete(root):
            total += verify_checkpoint(path)
            count += 1
    typer.echo(f"{count} checkpoint{'' if count == 1 else 's'} intact, {total / 1e6:.1f} MB read")


@app.command()
def prune(
    run_dir: RunFolder,
    trainer: Trainer = None,
    keep: Annotated[int, typer.Option("--keep", min=1, help="Newest complete ones that stay.")] = 1,
) -> None:
    """Delete superseded checkpoints, and unfinished ones that have not changed for an hour."""
    import shutil

    from rayfm.training.checkpoint import removable

    removed = 0
    for name, root in _trainers(run_dir, trainer).items():
        for path in removable(root, keep):
            shutil.rmtree(path)
            typer.echo(f"deleted {name}/{path.name}")
            removed += 1
    if not removed:
        typer.echo("nothing to delete")


def _trainers(run_dir: Path, trainer: str | None) -> dict[str, Path]:
    from rayfm.config import ConfigError, nearest
    from rayfm.training.checkpoint_files import checkpoint_roots

    roots = checkpoint_roots(standing(run_dir))
    if trainer is None:
        return roots
    if trainer not in roots:
        raise ConfigError(f"{run_dir} has no checkpoints of a trainer {trainer!r}{nearest(trainer, list(roots))}")
    return {trainer: roots[trainer]}


def _end(finished: tuple[str, ...]) -> str:
    return f"end of {finished[-1]}" if finished else "start"


def _time(seconds: float) -> str:
    import datetime

    return datetime.datetime.fromtimestamp(seconds).astimezone().strftime("%m-%d %H:%M:%S")
