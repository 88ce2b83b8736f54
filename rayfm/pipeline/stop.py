"""SIGTERM and Ctrl-C as a wish to stop, for a run that has no other end."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopSignals:
    """Within the block, SIGTERM and the first Ctrl-C only set a mark; a second Ctrl-C interrupts as ever.

    Signals reach the main thread alone: in another one the block changes nothing.
    """

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._before: dict[signal.Signals, Any] = {}

    def asked(self) -> bool:
        """Whether a signal came."""
        return self._asked.is_set()

    def install(self) -> None:
        """Take the signals over, again where somebody else (Ray, when it starts) has taken them meanwhile."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            found = signal.signal(number, self._take)
            self._before.setdefault(number, found)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._asked.is_set():
            raise KeyboardInterrupt
        self._asked.set()

    def __enter__(self) -> StopSignals:
        self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before.clear()
