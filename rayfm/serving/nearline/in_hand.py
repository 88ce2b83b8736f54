"""Tickets that this process is working on."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator


class InHand:
    """Counts deliveries by ticket; any number of threads may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: Counter[str] = Counter()

    @contextlib.contextmanager
    def holding(self, ticket: str) -> Iterator[None]:
        """The ticket is in hand as long as the block."""
        with self._lock:
            self._held[ticket] += 1
        try:
            yield
        finally:
            with self._lock:
                self._held[ticket] -= 1
                if not self._held[ticket]:
                    del self._held[ticket]

    def tickets(self) -> frozenset[str]:
        """Tickets in hand now."""
        with self._lock:
            return frozenset(self._held)
