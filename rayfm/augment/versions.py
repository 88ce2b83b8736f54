"""Which version of a teacher scores a period, and its lease for as long as it does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rayfm.augment.views import ScoringTeacherConfig
from rayfm.config import LabelError, SnapshotError, nearest
from rayfm.labels.columns import has_seen
from rayfm.snapshots.collect import Collector
from rayfm.snapshots.keeper import LeaseKeeper
from rayfm.snapshots.load import SnapshotStore
from rayfm.snapshots.manifest import SnapshotManifest
from rayfm.snapshots.metadata import MetadataStore, SQLiteMetadataStore, StoreUnavailable, open_metadata

METADATA = "metadata.sqlite"
"""A run's own metadata store, below its folder."""

LEASE_S = 120.0
"""How long a lease lives after each extension: what a label job's does."""


def fresh_versions(store: SnapshotStore, config: ScoringTeacherConfig, period: str) -> Iterator[SnapshotManifest]:
    """The versions of a teacher that did not see a period, newest first; the one that the config names, if it does.

    Manifests are read one after the other, as far as one is asked for.

    Raises:
        SnapshotError: nothing is published, or a manifest cannot be read.
        LabelError: every version was trained on the period, or is withheld by the guard.
    """
    if config.version is not None:
        yield store.manifest(config.model, config.version)
        return
    versions = store.versions(config.model)
    if not versions:
        raise SnapshotError(f"no version of {config.model!r} in {store.root}{nearest(config.model, store.models())}")
    found, withheld = False, 0
    for version in reversed(versions):
        try:
            manifest = store.manifest(config.model, version)
        except SnapshotError:
            if version in store.versions(config.model):
                raise
            continue  # deleted since it was listed
        if has_seen(manifest.trained_through, period):
            continue
        if store.withheld(config.model, version):
            withheld += 1
            continue
        found = True
        yield manifest
    if withheld and not found:
        raise LabelError(
            f"no version of {config.model!r} that has not seen period {period} is promoted: {withheld} are refused or "
            "not decided on; wait, or `rayfm snapshots promote`"
        )
    if not found:
        raise LabelError(
            f"every version of {config.model!r} was trained on period {period} or a later one: labels of it would "
            "be a leak; publish versions period by period"
        )


class Holds:
    """Leases on the versions that score, so that none is deleted between its choice and its last row.

    Args:
        store: the published versions.
        url: of their metadata store; by default the run's own. It is opened, and made where there is none, by the
            first lease.
    """

    def __init__(self, store: SnapshotStore, url: str | None) -> None:
        self._store, self._url = store, url
        self._open: tuple[MetadataStore, LeaseKeeper] | None = None

    def __enter__(self) -> Holds:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open is not None:
            metadata, keeper = self._open
            keeper.close()
            metadata.close()
            self._open = None

    @contextlib.contextmanager
    def version(self, name: str, config: ScoringTeacherConfig, period: str) -> Iterator[SnapshotManifest]:
        """The newest of `fresh_versions` that is not being deleted, held inside the block.

        Args:
            name: the teacher's, for whoever asks who holds the version.
            config, period: as `fresh_versions`'s.

        Raises:
            SnapshotError, LabelError: as `fresh_versions`; every such version is being deleted; the metadata store
                cannot be opened, or does not answer.
        """
        for manifest in fresh_versions(self._store, config, period):
            if self._open is None:
                url = self._url
                metadata = SQLiteMetadataStore(self._store.root / METADATA) if url is None else open_metadata(url)
                self._open = metadata, LeaseKeeper(metadata, LEASE_S)
            metadata, keeper = self._open
            owner = f"augment: {name} scores {period}"
            try:
                lease = Collector(self._store, metadata).hold(manifest.model, manifest.version, owner, LEASE_S)
            except StoreUnavailable:
                raise
            except SnapshotError:
                if config.version is not None:
                    raise
                continue  # an older one may stand
            with keeper.keeping(lease):
                yield manifest
            return
        raise SnapshotError(
            f"{config.model!r}: every version that was not trained on period {period} is being deleted; keep more "
            "versions (snapshots gc --keep, pin), or score each period before they go"
        )
