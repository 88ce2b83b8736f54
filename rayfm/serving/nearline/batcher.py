"""Several messages, one batch: tickets are gathered for a moment, then labelled together."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from rayfm.serving.nearline.labeller import Failure
from rayfm.serving.nearline.spool import Spooled

_IDLE_S = 0.5


class Batcher:
    """One thread that labels what others hand it.

    Args:
        label: labels a batch, as `Labeller.label`; it does not raise.
        tickets, rows: a batch is full at either.
        delay_s: how long a batch waits for more, after its first ticket.
    """

    def __init__(
        self,
        label: Callable[[Sequence[Spooled]], dict[str, Failure | None]],
        tickets: int,
        rows: int,
        delay_s: float,
    ) -> None:
        self._label, self._tickets, self._rows, self._delay_s = label, tickets, rows, delay_s
        self._waiting: queue.Queue[tuple[Spooled, Future[Failure | None]]] = queue.Queue()
        self._stop = threading.Event()
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="rayfm-nearline-batches", daemon=True)
        self._thread.start()

    def submit(self, entry: Spooled) -> Future[Failure | None]:
        """Label an entry with whatever else is there; the future holds None, or why it is not labelled."""
        future: Future[Failure | None] = Future()
        self._waiting.put((entry, future))
        return future

    def alive(self) -> bool:
        """Whether the thread lives."""
        return self._thread.is_alive()

    def busy_s(self) -> float:
        """Seconds that the batch in hand has taken so far, 0 where there is none."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def stop(self) -> None:
        """End the thread, after the batch in hand."""
        self._stop.set()
        self._thread.join(timeout=10.0)

    def _run(self) -> None:
        while not self._stop.is_set():
            batch = self._gather()
            if not batch:
                continue
            self._busy_since = time.monotonic()
            # A ticket that was delivered twice is labelled once.
            entries = {entry.ticket: entry for entry, _ in batch}
            try:
                outcome = self._label(list(entries.values()))
                for entry, future in batch:
                    future.set_result(outcome[entry.ticket])
            except BaseException as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
            self._busy_since = None

    def _gather(self) -> list[tuple[Spooled, Future[Failure | None]]]:
        try:
            batch = [self._waiting.get(timeout=_IDLE_S)]
        except queue.Empty:
            return []
        rows = batch[0][0].table.num_rows
        until = time.monotonic() + self._delay_s
        while len(batch) < self._tickets and rows < self._rows:
            try:
                batch.append(self._waiting.get(timeout=max(0.0, until - time.monotonic())))
            except queue.Empty:
                break
            rows += batch[-1][0].table.num_rows
        return batch
