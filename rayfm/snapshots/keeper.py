"""Extending leases at a fixed rate (ExFM section 3.2: "the existing lease will be extended automatically")."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

from rayfm.snapshots.metadata.base import Lease, LeaseLost, MetadataStore, StoreUnavailable, check_ttl

log = logging.getLogger(__name__)

EXTENSIONS_PER_LIFE = 4
"""How often a lease is extended in the time that it lives: a few may fail before it is lost."""


class LeaseKeeper:
    """One thread that extends leases until they are dropped. A lease may be lost all the same: see `kept`.

    Args:
        metadata: where the leases are.
        ttl_s: seconds that each extension gives.
    """

    def __init__(self, metadata: MetadataStore, ttl_s: float) -> None:
        self.metadata, self.ttl_s = metadata, check_ttl(ttl_s)
        self._lock = threading.Lock()
        self._leases: dict[int, Lease] = {}
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def keep(self, lease: Lease) -> None:
        """Extend ``lease`` from now on."""
        with self._lock:
            self._leases[lease.token] = lease
            if self._thread is None and not self._stopped.is_set():
                self._thread = threading.Thread(target=self._run, daemon=True, name="rayfm-leases")
                self._thread.start()

    def kept(self, lease: Lease) -> bool:
        """Whether the lease was alive when it was last extended, and is still extended."""
        with self._lock:
            return lease.token in self._leases

    def drop(self, lease: Lease) -> None:
        """Extend it no more and give it back. Where the store does not answer, the lease ends by itself."""
        with self._lock:
            self._leases.pop(lease.token, None)
        with contextlib.suppress(StoreUnavailable):
            self.metadata.release(lease)

    @contextlib.contextmanager
    def keeping(self, lease: Lease) -> Iterator[Lease]:
        """Keep a lease inside the block, give it back after."""
        self.keep(lease)
        try:
            yield lease
        finally:
            self.drop(lease)

    def extend(self) -> None:
        """Extend every lease once; one that is lost is forgotten."""
        with self._lock:
            leases = list(self._leases.values())
        for lease in leases:
            try:
                extended = self.metadata.extend(lease, self.ttl_s)
            except LeaseLost as error:
                log.warning("%s", error)
                with self._lock:
                    self._leases.pop(lease.token, None)
                continue
            except StoreUnavailable as error:
                log.warning("lease %r cannot be extended now: %s", lease.name, error)
                continue
            with self._lock:
                if lease.token in self._leases:
                    self._leases[lease.token] = extended

    def close(self) -> None:
        """Stop the thread and give all leases back."""
        self._stopped.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=self.ttl_s)
        with self._lock:
            leases = list(self._leases.values())
        for lease in leases:
            self.drop(lease)

    def _run(self) -> None:
        while not self._stopped.wait(self.ttl_s / EXTENSIONS_PER_LIFE):
            try:
                self.extend()
            except Exception:
                log.exception("leases cannot be extended")
