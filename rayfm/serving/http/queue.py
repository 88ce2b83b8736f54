"""A bounded queue before what scores, and deadlines: a request is answered, refused at once, or given up in time."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import TypeVar

from rayfm.client.wire import TIMEOUT_HEADER
from rayfm.serving.http.problems import Problem, unavailable

ResultT = TypeVar("ResultT")
PreparedT = TypeVar("PreparedT")

_SMOOTHING = 0.1
"""Weight of the newest request in the running mean of a request's seconds."""


class Deadline:
    """The moment until which a caller waits.

    Args:
        seconds: from now.
    """

    def __init__(self, seconds: float) -> None:
        self.at = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds left, at least 0."""
        return max(0.0, self.at - time.monotonic())

    @property
    def passed(self) -> bool:
        return time.monotonic() >= self.at

    @staticmethod
    def of_header(text: str | None, longest_s: float) -> Deadline:
        """The deadline of a request's timeout header, at most ``longest_s`` from now.

        Raises:
            Problem: the header is no positive number of milliseconds (400).
        """
        if text is None:
            return Deadline(longest_s)
        try:
            milliseconds = float(text)
        except ValueError:
            milliseconds = math.nan
        if not 0 < milliseconds < math.inf:
            raise Problem(400, f"header {TIMEOUT_HEADER}: write a positive number of milliseconds")
        return Deadline(min(longest_s, milliseconds / 1000))


def too_late() -> Problem:
    """504."""
    return Problem(504, f"no answer within the deadline; ask for fewer rows, or wait longer ({TIMEOUT_HEADER})")


class Queue:
    """Runs functions in threads of its own, at most ``limit`` waiting or running at once.

    A place is taken until the work is really over, also where its caller gave up: what runs cannot be stopped, and the
    machine is as busy as before. Work whose deadline passed while it waited is not begun.

    Args:
        limit: places.
        threads: threads that work.
    """

    def __init__(self, limit: int, threads: int = 1) -> None:
        self.limit, self.threads = limit, threads
        self._lock = threading.Lock()
        self._taken = 0
        self._mean_s = 0.0
        self._closed = False
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="rayfm-score")
        self._preparing = ThreadPoolExecutor(1, thread_name_prefix="rayfm-prepare")

    @property
    def taken(self) -> int:
        """Places in use."""
        return self._taken

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """A place for work that runs elsewhere, as long as the block.

        Raises:
            Problem: the queue is full (429).
        """
        started = self._take()
        try:
            yield
        finally:
            self._release(started)

    async def run(self, deadline: Deadline, work: Callable[[], ResultT]) -> ResultT:
        """The result of ``work``, which runs in one of the threads.

        Raises:
            Problem: the queue is full (429), or the deadline passed (504); and what ``work`` raises.
        """
        return await self._run(deadline, lambda: self._executor.submit(_in_time, deadline, work))

    async def run_both(
        self, deadline: Deadline, prepare: Callable[[], PreparedT], work: Callable[[PreparedT], ResultT]
    ) -> ResultT:
        """The result of ``work(prepare())``: a thread prepares the next request while another works on this one.

        Worth it where ``work`` leaves Python to itself (a forward of torch), and what is before it is Python.

        Raises:
            Problem, and what either raises: as `run`.
        """
        done: Future[ResultT] = Future()
        done.set_running_or_notify_cancel()  # what runs cannot be stopped: its place is free once it is over
        gone = threading.Event()

        def work_on(prepared: PreparedT) -> ResultT:
            return _in_time(deadline, lambda: work(prepared), gone)

        def then(preparing: Future[PreparedT]) -> None:
            with _failing(done):
                prepared = preparing.result()
                if self._closed:
                    raise CancelledError
                self._executor.submit(work_on, prepared).add_done_callback(end)

        def end(working: Future[ResultT]) -> None:
            with _failing(done):
                done.set_result(working.result())

        def submit() -> Future[ResultT]:
            self._preparing.submit(_in_time, deadline, prepare, gone).add_done_callback(then)
            return done

        try:
            return await self._run(deadline, submit)
        except asyncio.CancelledError:
            gone.set()
            raise

    async def _run(self, deadline: Deadline, submit: Callable[[], Future[ResultT]]) -> ResultT:
        started = self._take()
        try:
            future = submit()
        except BaseException:
            self._release(started)
            raise
        future.add_done_callback(lambda _: self._release(started))
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), deadline.left)
        except TimeoutError:
            raise too_late() from None

    def close(self) -> None:
        """Begin nothing more."""
        self._closed = True
        self._preparing.shutdown(wait=False, cancel_futures=True)
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _take(self) -> float:
        with self._lock:
            if self._taken >= self.limit:
                wait = math.ceil(min(60.0, max(1.0, self._mean_s * self._taken / self.threads)))
                raise Problem(429, f"{self.limit} requests wait already; try again", {"Retry-After": str(wait)})
            self._taken += 1
        return time.monotonic()

    def _release(self, started: float) -> None:
        seconds = time.monotonic() - started
        with self._lock:
            # A request's own share of the time, as others waited beside it.
            share = seconds * self.threads / max(1, self._taken)
            self._mean_s += _SMOOTHING * (share - self._mean_s)
            self._taken -= 1


def _in_time(deadline: Deadline, work: Callable[[], ResultT], gone: threading.Event | None = None) -> ResultT:
    """``work()``, unless the deadline passed, or the caller went away, while it waited."""
    if deadline.passed or (gone is not None and gone.is_set()):
        raise too_late()
    return work()


@contextlib.contextmanager
def _failing(done: Future[ResultT]) -> Iterator[None]:
    """``done`` fails as the block does; a step that was given up says that the queue is closed."""
    try:
        yield
    except CancelledError:
        done.set_exception(unavailable("the service is stopping; try again", 1))
    except BaseException as error:
        done.set_exception(error)
