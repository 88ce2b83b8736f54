"""The version that answers, and how a newer one takes its place without a request noticing.

A request takes the current version once and keeps it to its end, so that no reply mixes two; the swap is one
assignment, made after the newer version was loaded, verified and warmed beside the older.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Generic, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import torch

from rayfm.config import RayfmError, SnapshotError
from rayfm.data.encode import EncodedChunk, Encoder
from rayfm.operations.metrics import LOAD_FAILURES
from rayfm.schema import EXAMPLE_ID, TRAFFIC
from rayfm.serving.teacher import LoadedVersion, load_version
from rayfm.snapshots.load import SnapshotStore
from rayfm.snapshots.loader import record_swap

log = logging.getLogger(__name__)


class Versioned(Protocol):
    """What answers for a version."""

    @property
    def version(self) -> str: ...


AnswersT = TypeVar("AnswersT", bound=Versioned, covariant=True)


class Follower(Protocol[AnswersT]):
    """Keeps the version of one model that answers up to date, in a thread of its own."""

    def current(self) -> AnswersT:
        """The version that answers from now on.

        Raises:
            SnapshotError: there is none yet.
        """
        ...

    def close(self) -> None:
        """Stop following."""
        ...


def warm(loaded: LoadedVersion) -> None:
    """One forward of one example without features, so that the first request does not pay for what is made lazily.

    Raises:
        SnapshotError: the model cannot score, or answers with something that is no number.
    """
    encoder = loaded.encoder
    with torch.inference_mode():
        predictions = loaded.model(encoder.batch(blank_example(encoder), 0, 1))
    check_warm(loaded.version, predictions)


def blank_example(encoder: Encoder) -> EncodedChunk:
    """One example without features."""
    types = encoder.schema.arrow_schema()
    known = {EXAMPLE_ID: 0, TRAFFIC: encoder.schema.traffics[0]}
    table = pa.table({name: pa.array([known.get(name)], types.field(name).type) for name in encoder.columns})
    none = np.zeros((1, 0), np.float32)
    return encoder.encode(table, np.zeros(1, np.int64), none, none.astype(np.bool_))


def check_warm(version: str, predictions: Mapping[str, torch.Tensor]) -> None:
    """Raises SnapshotError where a prediction is no number."""
    for task, values in predictions.items():
        if not bool(torch.isfinite(values).all()):
            raise SnapshotError(f"version {version}: its prediction of {task!r} is not finite; it is kept out")


class NewestFollower:
    """Follows the newest complete version that a snapshot store has. A version that cannot be used is kept out, and so
    is one that the guard has refused or has not decided on.

    Args:
        store, model: whose versions.
        poll_s: seconds between looks.
        load: loads and verifies a version; by default `load_version`.
    """

    def __init__(
        self,
        store: SnapshotStore,
        model: str,
        poll_s: float = 2.0,
        load: Callable[[SnapshotStore, str, str], LoadedVersion] = load_version,
    ) -> None:
        self.store, self.model = store, model
        self._load = load
        self._current: LoadedVersion | None = None
        self._refused: set[str] = set()
        self._closed = threading.Event()
        self.refresh()
        self._thread = threading.Thread(target=self._follow, args=(poll_s,), daemon=True, name=f"rayfm-follow-{model}")
        self._thread.start()

    def current(self) -> LoadedVersion:
        current = self._current
        if current is None:
            raise SnapshotError(f"{self.model} has no version that can be served yet")
        return current

    def refresh(self) -> bool:
        """Look once for a newer version and swap to it; whether there was one."""
        for version in reversed(self.store.versions(self.model)):
            if self._current is not None and version <= self._current.version:
                return False
            if version in self._refused or self.store.withheld(self.model, version):
                continue
            started = time.monotonic()
            try:
                loaded = self._load(self.store, self.model, version)
                warm(loaded)
            except Exception as error:
                LOAD_FAILURES.add(1, run=self.store.root.name, model=self.model)
                # Whatever is wrong with it, the old version goes on answering.
                self._refused.add(version)
                log.error("%s@%s is kept out: %s", self.model, version, error)
                continue
            record_swap(self.store, self.model, version, time.monotonic() - started)
            self._current = loaded
            return True
        return False

    def close(self) -> None:
        self._closed.set()

    def _follow(self, poll_s: float) -> None:
        while not self._closed.wait(poll_s):
            try:
                self.refresh()
            except (OSError, RayfmError) as error:
                log.error("%s: looking for a newer version failed: %s", self.model, error)


class Shelf(Generic[AnswersT]):
    """Several models in one process, at most ``limit`` of them in memory: the one used longest ago leaves.

    A model is loaded in a thread of the shelf's, so that requests for the others go on meanwhile.

    Args:
        follow: starts to follow a model, and blocks until its first version is loaded.
        limit: how many models are kept.
    """

    def __init__(self, follow: Callable[[str], Follower[AnswersT]], limit: int) -> None:
        self._follow, self.limit = follow, limit
        self._lock = threading.Lock()
        self._slots: OrderedDict[str, Future[Follower[AnswersT]]] = OrderedDict()

    def get(self, model: str) -> Future[Follower[AnswersT]]:
        """The model's follower, once it is there. One load runs for all that ask; one that failed is tried again."""
        leaving: list[Future[Follower[AnswersT]]] = []
        with self._lock:
            slot = self._slots.get(model)
            if slot is not None and slot.done() and slot.exception() is not None:
                slot = None
            if slot is None:
                slot = self._slots[model] = Future()
                threading.Thread(target=self._open, args=(model, slot), daemon=True, name=f"rayfm-load-{model}").start()
            self._slots.move_to_end(model)
            while len(self._slots) > self.limit:
                leaving.append(self._slots.popitem(last=False)[1])
        for old in leaving:
            # Closing waits for a thread and for the metadata store, and who asks here is often an event loop. Nor is it
            # the newcomer's thread, whose load would wait as long.
            threading.Thread(target=old.add_done_callback, args=(_close,), daemon=True, name="rayfm-close").start()
        return slot

    def kept(self) -> set[str]:
        """The models that are in memory, or on their way."""
        with self._lock:
            return set(self._slots)

    def loaded(self) -> dict[str, str]:
        """Model -> the version that answers, of the models in memory."""
        with self._lock:
            slots = dict(self._slots)
        versions: dict[str, str] = {}
        for model, slot in slots.items():
            if slot.done() and slot.exception() is None:
                try:
                    versions[model] = slot.result().current().version
                except SnapshotError:
                    continue
        return versions

    def close(self) -> None:
        """Let all go."""
        with self._lock:
            slots, self._slots = list(self._slots.values()), OrderedDict()
        for slot in slots:
            slot.add_done_callback(_close)

    def _open(self, model: str, slot: Future[Follower[AnswersT]]) -> None:
        try:
            slot.set_result(self._follow(model))
        except BaseException as error:
            slot.set_exception(error)


def _close(slot: Future[Follower[AnswersT]]) -> None:
    if slot.exception() is None:
        slot.result().close()
