"""The versions of a gang that follows nothing: each request names one."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from rayfm.serving.gang.gang import GangVersion
from rayfm.serving.teacher import KEPT_VERSIONS


class NamedVersions:
    """The versions that were asked for last, and the one that was made current.

    Args:
        load: loads one.
        kept: how many stay in memory.
    """

    def __init__(self, load: Callable[[str], GangVersion], kept: int = KEPT_VERSIONS) -> None:
        self._load, self._kept = load, kept
        self._loading, self._lock = threading.Lock(), threading.Lock()
        self._held: OrderedDict[str, GangVersion] = OrderedDict()
        self._current: GangVersion | None = None

    def get(self, version: str) -> GangVersion:
        """A version, loaded if it is not there; versions that are there do not wait for it.

        Raises:
            SnapshotError: it cannot be loaded.
        """
        return self._found(version) or self._loaded(version, make_current=False)

    def make_current(self, version: str) -> None:
        """Let a version answer requests that name none.

        Raises:
            SnapshotError: it cannot be loaded; the one before goes on.
        """
        self._loaded(version, make_current=True)

    def current(self) -> GangVersion:
        """What answers requests that name none.

        Raises:
            ValueError: nothing does.
        """
        if self._current is None:
            raise ValueError("no version is current; name one")
        return self._current

    def _found(self, version: str) -> GangVersion | None:
        with self._lock:
            if version in self._held:
                self._held.move_to_end(version)
            return self._held.get(version)

    def _loaded(self, version: str, make_current: bool) -> GangVersion:
        with self._loading:
            loaded = self._found(version) or self._load(version)
            with self._lock:
                self._held[version] = loaded
                if make_current:
                    self._current = loaded
                while len(self._held) > self._kept:
                    oldest = next(held for held in self._held.values() if held is not self._current)
                    self._held.pop(oldest.version).retire()
            return loaded
