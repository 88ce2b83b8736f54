"""``rayfm snapshots``: what is published, which version is current, and moving it by hand."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rayfm.cli.runs import RunFolder, standing

if TYPE_CHECKING:
    from rayfm.snapshots import Collector, Current, Pointer

app = typer.Typer(no_args_is_help=True, help="Published model versions.")

Model = Annotated[str, typer.Argument(help="Key of a published model (rayfm snapshots list).", show_default=False)]
Metadata = Annotated[
    str | None,
    typer.Option(
        "--metadata",
        metavar="URL",
        help="sqlite:///PATH or zookeeper://HOST:PORT/ROOT; by default as RUN's config says.",
    ),
]
Reason = Annotated[str, typer.Option("--reason", help="For those who read it later.")]


@app.command("list")
def list_(run_dir: RunFolder, metadata: Metadata = None) -> None:
    """List a run's published versions, and what is said of them."""
    from rayfm.cli.display import console, snapshot_table
    from rayfm.snapshots.state import states

    said: dict[tuple[str, str], tuple[str, ...]] = {}
    with _collector(run_dir, metadata) as collector:
        if collector is not None:
            for model in collector.store.models():
                said.update({(model, version): words for version, words in states(collector, model).items()})
    console.print(snapshot_table(run_dir, said))


@app.command()
def show(
    run_dir: RunFolder, model: Model, version: Annotated[str | None, typer.Argument()] = None, metadata: Metadata = None
) -> None:
    """Print a version's manifest (by default the newest version's), and what is said of it on the error stream."""
    from rayfm.pipeline.parts import snapshot_manifest
    from rayfm.snapshots.state import details

    with _collector(run_dir, metadata) as collector:
        manifest = snapshot_manifest(run_dir, model, version)
        typer.echo(manifest.model_dump_json(indent=2))
        if collector is not None:
            for line in details(collector, model, manifest.version):
                typer.echo(line, err=True)


@app.command()
def verify(
    run_dir: RunFolder,
    model: Annotated[str | None, typer.Argument(help="Only this model.")] = None,
    version: Annotated[str | None, typer.Argument(help="Only this version.")] = None,
    metadata: Metadata = None,
) -> None:
    """Check files against their hashes. An intact version that was refused is readmitted."""
    from rayfm.snapshots.load import SnapshotStore
    from rayfm.snapshots.updater import verify_again

    store = SnapshotStore(standing(run_dir))
    count = 0
    with _collector(run_dir, metadata) as collector:
        for name in [_known(run_dir, model)] if model else store.models():
            for one in [version] if version else store.versions(name):
                store.verify(name, one) if collector is None else _readmit(
                    verify_again(collector, name, one), name, one
                )
                count += 1
    typer.echo(f"{count} version{'' if count == 1 else 's'} {'is' if count == 1 else 'are'} intact")


@app.command()
def pin(
    run_dir: RunFolder,
    model: Model,
    version: Annotated[str, typer.Argument(show_default=False)],
    reason: Reason = "by hand",
    metadata: Metadata = None,
) -> None:
    """Make a version current, older or newer, and keep it so until `unpin`."""
    with _pointer(run_dir, model, metadata) as pointer:
        _say(model, pointer.pin(version, reason))


@app.command()
def unpin(run_dir: RunFolder, model: Model, metadata: Metadata = None) -> None:
    """Let the newest version become current again."""
    with _pointer(run_dir, model, metadata) as pointer:
        _say(model, pointer.unpin())


@app.command()
def promote(
    run_dir: RunFolder,
    model: Model,
    version: Annotated[str, typer.Argument(show_default=False)],
    reason: Reason = "by hand",
    metadata: Metadata = None,
) -> None:
    """Let a version be served although the guard refused it, or before it decides. Newer ones are taken as ever."""
    from rayfm.snapshots.promotion import override

    with _pointer(run_dir, model, metadata) as pointer:
        pointer.collector.store.verify(model, version)
        override(pointer.collector.store.folder(model, version), pointer.by, reason)
    typer.echo(f"{model}@{version} is promoted")


@app.command()
def rollback(
    run_dir: RunFolder,
    model: Model,
    to: Annotated[str | None, typer.Option("--to", help="By default the newest intact version before.")] = None,
    reason: Reason = "by hand",
    metadata: Metadata = None,
) -> None:
    """Make an older version current. What it is rolled back from stays out; newer versions are taken."""
    with _pointer(run_dir, model, metadata) as pointer:
        _say(model, pointer.rollback(reason, to))


@app.command()
def gc(
    run_dir: RunFolder,
    model: Model,
    keep: Annotated[int, typer.Option("--keep", min=1, help="Newest versions that stay.")] = 3,
    metadata: Metadata = None,
) -> None:
    """Delete a model's old versions, except those that are current, held or kept, and unfinished ones of days ago."""
    from rayfm.snapshots import Collector

    with _pointer(run_dir, model, metadata) as pointer:
        collector = Collector(pointer.collector.store, pointer.metadata, keep)
        collector.expire(model)
        deleted = collector.sweep(model) + collector.sweep_unfinished(model)
        waiting = collector.tombstones(model)
    typer.echo(f"deleted: {', '.join(deleted) or 'nothing'}")
    if waiting:
        typer.echo(f"still held: {', '.join(waiting)}; gc again later")


@contextlib.contextmanager
def _collector(run_dir: Path, url: str | None, make: bool = False) -> Iterator[Collector | None]:
    """The run's versions and metadata; None where a run has none yet and ``make`` is not set."""
    from rayfm.pipeline.tickets import metadata_path
    from rayfm.snapshots import Collector, SnapshotStore, open_metadata

    path = metadata_path(standing(run_dir).absolute())
    url = url or _configured(run_dir)
    if url is None and not make and not path.exists():
        yield None
        return
    if url is not None:
        store = open_metadata(url)
    else:
        from rayfm.snapshots import SQLiteMetadataStore

        store = SQLiteMetadataStore(path)
    with contextlib.closing(store):
        yield Collector(SnapshotStore(run_dir), store)


def _configured(run_dir: Path) -> str | None:
    """The store that the run's services follow, by its saved config: what is current, held and kept is known there."""
    from rayfm.config import ConfigError, read_yaml

    saved = run_dir / "config.yaml"
    if not saved.exists():
        return None
    endpoints = read_yaml(saved).get("endpoints") or {}
    url = endpoints.get("metadata") if isinstance(endpoints, dict) else None
    if url is not None and not isinstance(url, str):
        raise ConfigError(f"{saved}: 'endpoints.metadata' is {url!r}, no URL; name the store (--metadata URL)")
    return url


@contextlib.contextmanager
def _pointer(run_dir: Path, model: str, url: str | None) -> Iterator[Pointer]:
    import getpass
    import socket

    from rayfm.snapshots import Pointer

    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in many containers
        user = "somebody"
    with _collector(run_dir, url, make=True) as collector:
        assert collector is not None
        yield Pointer(collector, _known(run_dir, model), f"{user} on {socket.gethostname()}")


def _known(run_dir: Path, model: str) -> str:
    from rayfm.config import ConfigError, nearest
    from rayfm.snapshots import SnapshotStore

    models = SnapshotStore(run_dir).models()
    if model not in models:
        raise ConfigError(f"unknown published model {model!r}{nearest(model, models)}")
    return model


def _readmit(refused: bool, model: str, version: str) -> None:
    if refused:
        typer.echo(f"{model}@{version} was refused and is readmitted")


def _say(model: str, current: Current) -> None:
    more = ", pinned" if current.pinned else f"; versions up to {current.barred} stay out" if current.barred else ""
    typer.echo(f"{model}@{current.version} is current{more}")
