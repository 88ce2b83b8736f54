"""Pins that live as long as somebody reads: extended while they are used, given back when they are not.

A pin that nobody extends ends by its lease's time, however long the reading takes; one with a long time holds back
expiry and vacuum after its reader is gone. So pins are short, and a thread extends them.
"""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from rayfm.labels.pins import Pin
from rayfm.labels.storage import Storage
from rayfm.labels.store import LabelStore
from rayfm.snapshots.keeper import LeaseKeeper
from rayfm.snapshots.metadata.base import MetadataStore

PIN_S = 600.0
"""Seconds that a pin outlives the process that held it: a trainer that is started again within them goes on from its
checkpoint with the table version that it had."""


class KeptPins:
    """One process's pins, one for each (teacher, version, table version), extended until `release`.

    Pickles without what it holds: the process that it travels to pins for itself. May be used by several threads.

    Args:
        root: the label store's root, as `LabelStore`'s.
        metadata: where pins live; None for a store whose pins nobody guards.
        owner: who holds the pins, for people to read.
        ttl_s: seconds that a pin lasts where it is not extended any more; by default `PIN_S`.
    """

    def __init__(
        self, root: str | Path | Storage, metadata: MetadataStore | None, owner: str, ttl_s: float | None = None
    ) -> None:
        self.storage, self.metadata, self.owner = Storage.of(root), metadata, owner
        self.ttl_s = PIN_S if ttl_s is None else ttl_s
        self._pins: dict[tuple[str, str, int], Pin] = {}
        self._keeper: LeaseKeeper | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"} | {
            "_pins": {},
            "_keeper": None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def __enter__(self) -> KeptPins:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def pin(self, teacher: str, version: str, table_version: int) -> Pin:
        """The pin of what is read: the one that is held, a new one where none is or where it was lost.

        Raises:
            LabelError: as `LabelStore.pin`.
        """
        key = (teacher, version, table_version)
        with self._lock:
            if key not in self._pins or not self._lives(self._pins[key]):
                store = LabelStore(self.storage, self.metadata)
                self._pins[key] = store.pin(teacher, version, self.owner, self.ttl_s, table_version)
                self._keep(self._pins[key])
            return self._pins[key]

    def release(self) -> None:
        """Give all pins back, once nobody reads what they hold. Others may be taken afterwards."""
        with self._lock:
            keeper, self._keeper, self._pins = self._keeper, None, {}
        if keeper is not None:
            keeper.close()

    def _lives(self, pin: Pin) -> bool:
        return pin.lease is None or (self._keeper is not None and self._keeper.kept(pin.lease))

    def _keep(self, pin: Pin) -> None:
        if pin.lease is None or self.metadata is None:
            return
        if self._keeper is None:
            self._keeper = LeaseKeeper(self.metadata, self.ttl_s)
        self._keeper.keep(pin.lease)
