"""``rayfm nearline``: labelling rows as they are posted; see docs/nearline.md."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, help="Label rows as they are posted.")

Settings = Annotated[
    Path, typer.Argument(metavar="FILE", help="A near-line YAML file, see docs/nearline.md.", show_default=False)
]


def _open(path: Path) -> tuple[Any, Any]:
    """The config and its spool."""
    from rayfm.serving.nearline.config import load_nearline
    from rayfm.serving.nearline.spool import Spool

    config = load_nearline(path)
    return config, Spool(config.root, config.teacher)


@app.command("serve")
def serve(
    file: Settings,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="HTTP port.")] = 8000,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; beyond loopback RAYFM_TOKEN must hold a token.")
    ] = "127.0.0.1",
    address: Annotated[
        str | None, typer.Option("--address", help="A Ray cluster; by default a Ray of its own.")
    ] = None,
) -> None:
    """Take posts, and label them, until it is stopped; what is accepted waits on disk for the next start."""
    from rayfm.cli.serving_nearline import serve_until_stopped

    serve_until_stopped(_open(file)[0], port, host, address)


@app.command("status")
def status(file: Settings) -> None:
    """Count what waits, what died and what was rejected, and look whether the queue answers."""
    from rayfm.config import CapacityError
    from rayfm.serving.nearline.doorbell import Doorbell
    from rayfm.serving.nearline.labels import NearLineLabels
    from rayfm.serving.nearline.tickets import ticket_time

    config, spool = _open(file)
    waiting = [ticket for ticket, _ in spool.waiting()]
    doorbell = Doorbell(config)
    try:
        messages = f"{doorbell.waiting()} messages"
    except CapacityError as error:
        messages = f"{error}; rows are accepted, and labelled once it is back"
    doorbell.close()
    table = NearLineLabels(config.root).open()
    typer.echo(f"waiting       {len(waiting)} tickets")
    if waiting:
        import datetime

        oldest = datetime.datetime.fromtimestamp(ticket_time(waiting[0]), datetime.UTC)
        typer.echo(f"oldest        {oldest.isoformat(timespec='seconds')}")
    typer.echo(f"queue         {messages}")
    typer.echo(f"dead letters  {len(spool.dead_letters())} tickets")
    typer.echo(f"rejects       {spool.rejected_rows()} rows")
    typer.echo(f"label table   {'none yet' if table is None else f'version {table.version()}'}")


@app.command("dead-letters")
def dead_letters(
    file: Settings,
    export: Annotated[
        Path | None, typer.Option("--export", help="Also write their original rows here, as Arrow IPC.")
    ] = None,
) -> None:
    """List what was given up, with its reason."""
    from rayfm.config import DataError

    _, spool = _open(file)
    letters = spool.dead_letters()
    for letter in letters:
        try:
            rows = f"{spool.dead_rows(letter.ticket).table.num_rows} rows"
        except DataError:
            rows = "damaged rows"
        typer.echo(f"{letter.ticket}  {rows}  {letter.reason}")
    if export is not None:
        export.mkdir(parents=True, exist_ok=True)
        for letter in letters:
            spool.export(letter.ticket, export / f"{letter.ticket}.arrow")
    typer.echo(f"{len(letters)} dead letters")


@app.command("replay")
def replay(
    file: Settings,
    ticket: Annotated[list[str] | None, typer.Argument(metavar="[TICKET]...", help="By default all.")] = None,
    version: Annotated[
        str | None, typer.Option("--version", help="Snapshot to label with; by default the one they were accepted for.")
    ] = None,
    discard: Annotated[bool, typer.Option("--discard", help="Delete the named tickets' rows instead.")] = False,
) -> None:
    """Queue dead letters anew."""
    from rayfm.config import CapacityError, ConfigError
    from rayfm.serving.nearline.doorbell import Doorbell

    config, spool = _open(file)
    if discard and not ticket:
        raise ConfigError("--discard deletes rows: name the tickets (rayfm nearline dead-letters)")
    tickets = ticket or [letter.ticket for letter in spool.dead_letters()]
    if discard:
        for name in tickets:
            spool.discard(name)
        typer.echo(f"{len(tickets)} dead letters discarded")
        return
    if version is not None:
        from rayfm.snapshots.load import SnapshotStore

        SnapshotStore(config.root).manifest(config.model, version)  # says which versions there are
    doorbell = Doorbell(config)
    late = None
    for name in tickets:
        spool.replay(name, version)
        if late is None:
            try:
                doorbell.ring(name)
            except CapacityError as error:
                late = error
    doorbell.close()
    typer.echo(f"{len(tickets)} dead letters queued" + (f"; {late}, they are labelled once it is back" if late else ""))


@app.command("compact")
def compact(
    file: Settings, period: Annotated[str, typer.Option("--period", help="A partition, e.g. 2024-01-31.")]
) -> None:
    """Join the small files of a period's near-line labels."""
    from rayfm.serving.nearline.labels import NearLineLabels

    config, _ = _open(file)
    typer.echo(f"{NearLineLabels(config.root).compact(config.teacher, period)} files joined")
