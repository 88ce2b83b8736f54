"""A replica of a service that follows `current` of a metadata store, for teachers and students alike."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from rayfm.config import ConfigError
from rayfm.data.store import ExampleStore
from rayfm.models.base import MODELS
from rayfm.schema import Schema
from rayfm.serving.exported import load_exported
from rayfm.serving.gang.gang import Gang, GangVersion
from rayfm.serving.http.config import EndpointsConfig
from rayfm.serving.retrieval import ItemIndex, load_index
from rayfm.serving.retrieval_config import RetrievalConfig
from rayfm.serving.teacher import LoadedVersion, load_version
from rayfm.serving.versions import Follower, warm
from rayfm.snapshots.collect import Collector
from rayfm.snapshots.load import SnapshotStore
from rayfm.snapshots.loader import Loader, SnapshotFollower
from rayfm.snapshots.manifest import SnapshotManifest
from rayfm.snapshots.metadata import MetadataStore, open_metadata
from rayfm.snapshots.updater import LEASE_S, Updater

Load = Callable[[SnapshotStore, str, str], LoadedVersion]
LoadedT = TypeVar("LoadedT")


def follow_current(
    store: SnapshotStore,
    model: str,
    metadata: MetadataStore,
    poll_s: float = 2.0,
    spare: int = 0,
    lease_s: float = LEASE_S,
    load: Load = load_version,
) -> SnapshotFollower[LoadedVersion]:
    """Updates and loads one model's versions in a thread of its own; the first is loaded before this returns, if any.

    Args:
        store, model: whose versions.
        metadata: where `current` and the leases are.
        poll_s: seconds between looks.
        spare: further versions that stay in memory for requests that name them.
        lease_s: seconds that a lease outlives this process.
        load: loads and verifies a version.
    """
    collector, who = Collector(store, metadata), _who(model)
    # `load` verifies.
    loader = Loader(
        collector,
        model,
        who,
        lambda version: load(store, model, version),
        warm,
        verify=False,
        spare=spare,
        lease_s=lease_s,
    )
    return _follow(loader, poll_s)


def follow_gang(
    gang: Gang, metadata: MetadataStore, poll_s: float = 2.0, spare: int = 0, lease_s: float = LEASE_S
) -> SnapshotFollower[GangVersion]:
    """As `follow_current`, for all members of a gang as one: they have a version together or not at all, under one
    lease.
    """
    collector, who = Collector(gang.store, metadata), f"gang of {gang.world}, {_who(gang.model)}"
    loader = Loader(
        collector,
        gang.model,
        who,
        gang.load,
        gang.warm,
        unload=GangVersion.retire,
        verify=False,
        spare=spare,
        lease_s=lease_s,
    )
    return _follow(loader, poll_s)


def follow_items(
    store: SnapshotStore,
    model: str,
    metadata: MetadataStore,
    config: RetrievalConfig,
    examples: ExampleStore | None,
    poll_s: float = 2.0,
    load: Load = load_version,
) -> SnapshotFollower[ItemIndex]:
    """As `follow_current`, for a two-tower with the index of its items, which is built anew for each version."""

    def load_items(version: str) -> ItemIndex:
        return load_index(store, model, version, config, examples, load)

    loader = Loader(
        Collector(store, metadata),
        model,
        f"items of {_who(model)}",
        load_items,
        lambda items: warm(items.loaded),
        record=False,  # a catalogue that is broken says nothing of the version
        verify=False,
    )
    return _follow(loader, poll_s)


def student_follower(root: str, config: EndpointsConfig) -> Callable[[str], Follower[LoadedVersion]] | None:
    """How `rayfm.serving.student.Students` follows a model's `current`; None where the config names no store."""
    if config.metadata is None:
        return None
    store, metadata = SnapshotStore(root), open_metadata(config.metadata)
    load = partial(load_exported, config=config.compile)
    return lambda model: follow_current(store, model, metadata, config.poll_s, load=load)


def item_follower(root: str, examples: str | None, config: EndpointsConfig) -> Callable[[str], Follower[ItemIndex]]:
    """How `rayfm.serving.item_service.Retrievers` follows a model's `current`.

    Raises:
        ConfigError: models retrieve, and the config names no metadata store to follow.
    """
    if config.retrieval and config.metadata is None:
        raise ConfigError("endpoints.retrieval needs endpoints.metadata; name the run's store, sqlite:///PATH")
    store, items = SnapshotStore(root), None if examples is None else ExampleStore(examples)
    metadata = None if config.metadata is None else open_metadata(config.metadata)
    load = partial(load_exported, config=config.compile)

    def follow(model: str) -> Follower[ItemIndex]:
        assert metadata is not None
        return follow_items(store, model, metadata, config.retrieval[model], items, config.poll_s, load)

    return follow


def _who(model: str) -> str:
    return f"{model} on {socket.gethostname()}, process {os.getpid()}"


def _follow(loader: Loader[LoadedT], poll_s: float) -> SnapshotFollower[LoadedT]:
    updater = Updater(loader.collector, loader.model, loader.owner, check_buildable, loader.lease_s)
    return SnapshotFollower(loader, updater, poll_s)


def check_buildable(manifest: SnapshotManifest) -> None:
    """Raises ValueError or LookupError where this code does not know a version's model, or its config or schema."""
    Schema.model_validate(manifest.example_schema)
    MODELS[manifest.config["type"]].Config.model_validate(manifest.config)
