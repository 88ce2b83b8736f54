"""``rayfm serve``: start a run's endpoints and keep them until the command is stopped."""

from __future__ import annotations

import signal
import threading

from rich.table import Table

from rayfm.cli.display import console
from rayfm.pipeline.config import PipelineConfig
from rayfm.pipeline.endpoints import Serving, serve
from rayfm.serving.production import FIREWALL


def serve_and_show(config: PipelineConfig, production: bool) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises:
        RayfmError: as `rayfm.pipeline.endpoints.serve`.
    """
    stop = threading.Event()

    def show_and_wait(serving: Serving) -> None:
        # Now, as Ray takes the signals for itself when it starts.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        show(serving, config, production)
        stop.wait()
        console.print("stopping")

    console.print(f"serve [bold]{config.name}[/bold]  (starting Ray takes a while)")
    serve(config, show_and_wait, production)


def show(serving: Serving, config: PipelineConfig, production: bool) -> None:
    """Print where the endpoints are, and what each serves."""
    table = Table(box=None, pad_edge=False)
    for column in ("endpoint", "version"):
        table.add_column(column, overflow="fold")
    for kind, path, call in (
        ("models", "models", "score"),
        ("retrieval", "models", "retrieve"),
        ("teachers", "teachers", "score"),
    ):
        for name, version in serving.ready.get(kind, {}).items():
            waiting = "not in memory" if kind == "models" else "none yet"
            table.add_row(f"POST {serving.url}/v1/{path}/{name}:{call}", version or f"[yellow]{waiting}")
    console.print(table)
    console.print(f"pages  {serving.url}/docs   health  {serving.url}/healthz  {serving.url}/readyz")
    if serving.grpc is not None:
        console.print(f"gRPC   {serving.grpc}   application {serving.application}")
    if production:
        console.print(f"[yellow]{FIREWALL}")
    elif not config.endpoints.loopback or serving.grpc is not None:
        console.print("[yellow]other machines can reach this; the token goes over the network as it is: put TLS before")
