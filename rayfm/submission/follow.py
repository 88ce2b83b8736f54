"""Following a job: its logs as they are written, its end, and Ctrl-C on the way."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

from rayfm.config import CapacityError, RayfmError
from rayfm.submission.server import Server, asking

RETRY_S = 300.0
"""Seconds that a server may be away while a job is followed. The job does not notice."""

PAUSE_S = 2.0
"""Seconds between two attempts to reach it."""


def follow(
    server: Server,
    job: str,
    write: Callable[[str], None],
    note: Callable[[str], None],
    retry_s: float = RETRY_S,
    pause_s: float = PAUSE_S,
) -> int:
    """Follow a job to its end.

    SIGINT (Ctrl-C) and SIGTERM stop the job; it is followed until it has ended. A second one lets go of it: it stops by
    itself. Signals reach the main thread alone; in another one the job is followed to its end.

    Args:
        server: where it was submitted.
        job: its id.
        write: takes pieces of its log, in order, each once.
        note: takes lines that are not the job's.
        retry_s: seconds that the server may be away.
        pause_s: seconds between two attempts to reach it.

    Returns:
        The exit code: the driver's own; 128 + the signal's number for a driver that a signal ended, and where the
        follower was asked to stop; 1 where the job failed without a driver, or somebody else stopped it.

    Raises:
        RayfmError: the server does not answer any more, or has forgotten the job.
    """
    return asyncio.run(_Follower(server, job, write, note, retry_s, pause_s).run())


class _Follower:
    def __init__(
        self,
        server: Server,
        job: str,
        write: Callable[[str], None],
        note: Callable[[str], None],
        retry_s: float,
        pause_s: float,
    ) -> None:
        self.server, self.job, self.write, self.note = server, job, write, note
        self.retry_s, self.pause_s = retry_s, pause_s
        self.signal: int | None = None
        self._left = asyncio.Event()
        self._stopping: asyncio.Task[None] | None = None

    async def run(self) -> int:
        with self._signals():
            ending = asyncio.create_task(self._end())
            left = asyncio.create_task(self._left.wait())
            await asyncio.wait({ending, left}, return_when=asyncio.FIRST_COMPLETED)
            left.cancel()
            if not ending.done():
                ending.cancel()
                if self._stopping is not None:
                    await self._stopping  # the wish itself must arrive
                self.note(f"left {self.job}, which stops by itself; see: ray job status {self.job}")
                return 128 + int(self.signal or signal.SIGINT)
            return self._exit_code(ending.result())

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop, taken = asyncio.get_running_loop(), []
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError, RuntimeError):  # not the main thread
                loop.add_signal_handler(number, self._ask, number)
                taken.append(number)
        try:
            yield
        finally:
            for number in taken:
                loop.remove_signal_handler(number)

    def _ask(self, number: int) -> None:
        """A signal came: stop the job, or let go of it."""
        if self.signal is not None:
            self._left.set()
            return
        self.signal = number
        self.note(f"stopping {self.job}; once more leaves it to stop by itself")
        self._stopping = asyncio.create_task(self._stop())

    async def _stop(self) -> None:
        try:
            with asking(self.server.address):
                await asyncio.to_thread(self.server.client.stop_job, self.job)
        except RayfmError as error:
            self.note(f"cannot stop it: {error}; try: ray job stop {self.job}")

    async def _end(self) -> Any:
        """Write the log until the job has ended; returns what the server says of it then."""
        written, lost = 0, None
        while True:
            problem: RayfmError | None = None
            position = 0  # of a connection, which begins with the log's first line
            try:
                with asking(self.server.address):
                    async for piece in self.server.client.tail_job_logs(self.job):
                        new = piece[max(0, written - position) :]
                        position += len(piece)
                        if new:
                            self.write(new)
                            written, lost = position, None
            except RayfmError as error:
                problem = error
            try:
                with asking(self.server.address):
                    found = await asyncio.to_thread(self.server.client.get_job_info, self.job)
                if found.status.is_terminal():
                    return found
            except CapacityError as error:
                problem = error
            if problem is not None:
                if lost is None:
                    lost = time.monotonic()
                    self.note(f"{problem}; trying again for {self.retry_s:g} s")
                if time.monotonic() - lost >= self.retry_s:
                    raise CapacityError(
                        f"{problem}; {self.job} may still run: ray job logs --follow {self.job}"
                    ) from None
            else:
                lost = None
            await asyncio.sleep(self.pause_s)

    def _exit_code(self, found: Any) -> int:
        status = str(found.status)
        if status == "SUCCEEDED":
            return 0
        if status == "STOPPED":
            if self.signal is not None:
                return 128 + self.signal
            self.note(f"{self.job} was stopped by somebody else")
            return 1
        code = found.driver_exit_code
        if code is None:  # it never ran, or went with its node
            self.note(f"{self.job} failed: {(found.message or 'Ray does not say why').strip()}")
            return 1
        return int(code) if code >= 0 else 128 - int(code)
