"""Leases on the snapshots that accepted rows name: they stay until the rows are labelled (ExFM section 3.2)."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Set

from rayfm.config import SnapshotError
from rayfm.snapshots.collect import Collector
from rayfm.snapshots.load import SnapshotStore
from rayfm.snapshots.metadata import Lease, LeaseLost, StoreUnavailable, open_metadata

log = logging.getLogger(__name__)


class VersionHolds:
    """Holds some versions of a model, each by one lease that is extended when it is asked for again.

    Args:
        collector: the published versions and their metadata store.
        model: whose versions.
        ttl_s: how long a hold lasts after it was last asked for.
    """

    def __init__(self, collector: Collector, model: str, ttl_s: float) -> None:
        self._collector, self._model, self._ttl_s = collector, model, ttl_s
        self._owner = f"near-line labels on {socket.gethostname()}, process {os.getpid()}"
        self._lock = threading.Lock()
        self._held: dict[str, tuple[Lease, float]] = {}

    def keep(self, version: str) -> None:
        """Hold a version from now for at least three quarters of ``ttl_s``.

        Raises:
            SnapshotError: it is not published, or is being deleted.
        """
        with self._lock:
            lease, asked = self._held.get(version, (None, 0.0))
            now = time.monotonic()
            if lease is not None and now - asked < self._ttl_s / 4:
                return
            try:
                try:
                    lease = None if lease is None else self._collector.metadata.extend(lease, self._ttl_s)
                except LeaseLost:
                    lease = None
                if lease is None:
                    lease = self._collector.hold(self._model, version, self._owner, self._ttl_s)
            except StoreUnavailable as error:
                # The snapshot is most likely there for long; if not, its rows become dead letters and not lost ones.
                log.warning("%s@%s is not held: %s", self._model, version, error)
                return
            self._held[version] = (lease, now)

    def only(self, versions: Set[str]) -> None:
        """Hold these and no others. A version that is gone is passed over: its tickets will say so themselves."""
        for version in versions:
            try:
                self.keep(version)
            except SnapshotError as error:
                log.warning("%s", error)
        with self._lock:
            for version in set(self._held) - versions:
                lease, _ = self._held.pop(version)
                try:
                    self._collector.metadata.release(lease)
                except StoreUnavailable:
                    log.warning("%s@%s is not given back; its lease ends by itself", self._model, version)


def open_holds(url: str | None, store: SnapshotStore, model: str, ttl_s: float) -> VersionHolds | None:
    """Holds through the metadata store at a URL; None without one."""
    return None if url is None else VersionHolds(Collector(store, open_metadata(url)), model, ttl_s)
