"""A replica of a service that follows `current` of a metadata store, for teachers and students alike."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

from rayfm.models.base import MODELS
from rayfm.schema import Schema
from rayfm.serving.http.config import EndpointsConfig
from rayfm.serving.teacher import LoadedVersion, load_version
from rayfm.serving.versions import Follower, warm
from rayfm.snapshots.collect import Collector
from rayfm.snapshots.load import SnapshotStore
from rayfm.snapshots.loader import Loader, SnapshotFollower
from rayfm.snapshots.manifest import SnapshotManifest
from rayfm.snapshots.metadata import MetadataStore, open_metadata
from rayfm.snapshots.updater import LEASE_S, Updater


def follow_current(
    store: SnapshotStore,
    model: str,
    metadata: MetadataStore,
    poll_s: float = 2.0,
    spare: int = 0,
    lease_s: float = LEASE_S,
) -> SnapshotFollower[LoadedVersion]:
    """Updates and loads one model's versions in a thread of its own; the first is loaded before this returns, if any.

    Args:
        store, model: whose versions.
        metadata: where `current` and the leases are.
        poll_s: seconds between looks.
        spare: further versions that stay in memory for requests that name them.
        lease_s: seconds that a lease outlives this process.
    """
    collector = Collector(store, metadata)
    who = f"{model} on {socket.gethostname()}, process {os.getpid()}"
    loader = Loader(
        collector,
        model,
        who,
        lambda version: load_version(store, model, version),
        warm,
        verify=False,  # `load_version` does
        spare=spare,
        lease_s=lease_s,
    )
    return SnapshotFollower(loader, Updater(collector, model, who, check_buildable, lease_s), poll_s)


def student_follower(root: str, config: EndpointsConfig) -> Callable[[str], Follower] | None:
    """How `rayfm.serving.student.Students` follows a model's `current`; None where the config names no store."""
    if config.metadata is None:
        return None
    store, metadata, poll_s = SnapshotStore(root), open_metadata(config.metadata), config.poll_s
    return lambda model: follow_current(store, model, metadata, poll_s)


def check_buildable(manifest: SnapshotManifest) -> None:
    """Raises ValueError or LookupError where this code does not know a version's model, or its config or schema."""
    Schema.model_validate(manifest.example_schema)
    MODELS[manifest.config["type"]].Config.model_validate(manifest.config)
