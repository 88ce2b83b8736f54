"""What ``rayfm nearline serve`` starts, in its order: the door, the teacher's service, the consumers."""

from __future__ import annotations

import signal
import threading

import typer

from rayfm.pipeline.config import RayConfig
from rayfm.pipeline.session import ray_session
from rayfm.serving.application import application_name, start_teacher, stop_teacher
from rayfm.serving.http.config import EndpointsConfig
from rayfm.serving.http.token import check_bind, read_token
from rayfm.serving.nearline.application import consumer_name, intake_name, start_consumers, start_intake, stop_nearline
from rayfm.serving.nearline.config import NearLineConfig
from rayfm.serving.nearline.rows import Versions
from rayfm.serving.proxies import all_or_nothing
from rayfm.serving.teacher import TeacherServiceConfig
from rayfm.snapshots.load import SnapshotStore
from rayfm.snapshots.metadata import open_metadata


def serve_until_stopped(config: NearLineConfig, port: int, host: str, address: str | None = None) -> None:
    """Serve until the process is interrupted or terminated.

    The bearer token, if any, is read from the environment as `rayfm serve` reads it.

    Raises:
        ConfigError: others could post without a token.
        SnapshotError: nothing is published that could label.
        CapacityError: the port is in use, or no cluster answers at the address.
    """
    token = read_token(EndpointsConfig())
    check_bind(EndpointsConfig(host=host), token)
    metadata = None if config.metadata is None else open_metadata(config.metadata)
    version = Versions(SnapshotStore(config.root), config.model, config.version, metadata).current().version
    stopped = threading.Event()
    with ray_session(RayConfig(address=address)):
        for number in (signal.SIGINT, signal.SIGTERM):  # Ray's start sets handlers of its own
            signal.signal(number, lambda *_: stopped.set())
        service = TeacherServiceConfig(root=config.root, model=config.model, metadata=config.metadata)
        # Otherwise an intake that stays on a cluster accepts rows that nobody labels.
        with all_or_nothing(
            [intake_name(config.run), consumer_name(config), application_name(config.run, config.teacher)]
        ):
            url = start_intake([config], port, host=host, token=token)
            start_teacher(config.run, config.teacher, service)
            start_consumers(config)
        typer.echo(f"labelling with {config.model}@{version}: POST {url}/v1/teachers/{config.teacher}/label")
        stopped.wait()
        stop_nearline(config)
        stop_teacher(config.run, config.teacher)
