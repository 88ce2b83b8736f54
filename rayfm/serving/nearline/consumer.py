"""The consumer: a Ray Serve deployment that takes tickets from the queue and labels them through the teacher."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
from ray import serve
from ray.serve.task_consumer import task_handler

from rayfm.config import CapacityError, DataError
from rayfm.operations.metrics import NEARLINE_DEAD, NEARLINE_OLDEST, NEARLINE_QUEUED, NEARLINE_REJECTED
from rayfm.serving.nearline.batcher import Batcher
from rayfm.serving.nearline.config import NearLineConfig
from rayfm.serving.nearline.doorbell import TASK, Doorbell, sweep
from rayfm.serving.nearline.holds import open_holds
from rayfm.serving.nearline.in_hand import InHand
from rayfm.serving.nearline.labeller import Labeller, Score, failure_of, settle, take
from rayfm.serving.nearline.labels import NearLineLabels
from rayfm.serving.nearline.rows import Versions
from rayfm.serving.nearline.spool import Spool
from rayfm.serving.nearline.tickets import check_ticket
from rayfm.snapshots.load import SnapshotStore

logger = logging.getLogger(__name__)

TELL_S = 10.0


class NotLabelled(Exception):
    """A ticket that is to be tried again. Celery does so, after a while that grows."""


class NearLineConsumer:
    """One consumer. Celery's threads hand it tickets; a batch of them is labelled and committed at once.

    Args:
        config: a `NearLineConfig` as plain values.
        service: the Serve application of the teacher that scores.
        score: asks the teacher; by default that service.
    """

    def __init__(self, config: dict[str, Any], service: str, score: Score | None = None) -> None:
        self._service = service
        self.config = NearLineConfig.model_validate(config)
        consumer = self.config.consumer
        self.spool = Spool(self.config.root, self.config.teacher)
        self.doorbell = Doorbell(self.config)
        store = SnapshotStore(self.config.root)
        self._holds = open_holds(self.config.metadata, store, self.config.model, self.config.hold_s)
        versions = Versions(store, self.config.model)
        labeller = Labeller(
            self.config, self.spool, NearLineLabels(self.config.root), versions, score or self._ask_service
        )
        self.batcher = Batcher(labeller.label, consumer.tickets, consumer.rows, consumer.delay_s)
        self._in_hand = InHand()
        self._last_delivery = time.monotonic()
        self._starved_since: float | None = None
        self._next_tell = 0.0
        self._stop = threading.Event()
        self._sweeper = threading.Thread(target=self._watch, name="rayfm-nearline-sweep", daemon=True)
        self._sweeper.start()

    @task_handler(name=TASK)
    def label(self, ticket: str) -> None:
        """Label a ticket; returns once its labels are committed, or it is a dead letter, or nothing is left to do.

        Raises:
            NotLabelled: it is to be tried again.
        """
        self._last_delivery = time.monotonic()
        try:
            check_ticket(ticket)
        except (DataError, TypeError):  # not ours: whoever else writes to our queue names no file here
            logger.error("a message without a ticket was dropped")
            return
        with self._in_hand.holding(ticket):
            entry = take(self.spool, ticket, self.config)
            if entry is None:
                return
            try:
                failure = self.batcher.submit(entry).result()
            except Exception as error:  # a full disk, most likely: the journal could not be written
                failure = failure_of(error)
            self._last_delivery = time.monotonic()
            with contextlib.suppress(OSError):  # what this process did not note it does not count
                self.spool.end(entry)
        if failure is not None and not settle(self.spool, ticket, failure, self.config):
            raise NotLabelled(failure.why)

    def pid(self) -> int:
        """The process that consumes."""
        return os.getpid()

    def check_health(self) -> None:
        """Ray Serve asks this; what raises is replaced. Ray itself does not notice a dead consumer thread.

        Raises:
            RuntimeError: a thread died, messages wait and none comes, or a batch does not end.
        """
        stall = self.config.consumer.stall_s
        thread = getattr(getattr(self, "_adapter", None), "_worker_thread", None)
        if thread is not None and not thread.is_alive():
            raise RuntimeError("the thread that takes messages is dead")
        if not self.batcher.alive() or not self._sweeper.is_alive():
            raise RuntimeError("the thread that labels, or the one that sweeps, is dead")
        starved = self._starved_since
        # Threads that wait for a slow teacher take no message, and are well: how long a batch takes is looked at below.
        if (
            starved is not None
            and not self._in_hand.tickets()
            and time.monotonic() - max(starved, self._last_delivery) > stall
        ):
            raise RuntimeError(f"messages wait, and none has come for {stall:g} s")
        if self.batcher.busy_s() > 2 * stall:
            raise RuntimeError(f"a batch has taken {self.batcher.busy_s():.0f} s")

    def stop(self) -> None:
        """End the threads."""
        self._stop.set()
        self.batcher.stop()
        self._sweeper.join(timeout=10.0)
        self.doorbell.close()

    def _ask_service(self, rows: pa.Table, version: str) -> tuple[str, pa.Table]:
        response: Any = serve.get_app_handle(self._service).score.remote(rows, version)
        try:
            found: tuple[str, pa.Table] = response.result(timeout_s=self.config.consumer.score_timeout_s)
        except TimeoutError:
            response.cancel()  # else it would wait for the teacher on, and each retry would add one
            raise
        return found

    def _watch(self) -> None:
        # Often enough that a ticket is rung for at most a quarter late; each consumer sweeps, twice does no harm.
        while not self._stop.wait(self.config.consumer.sweep_s / 4):
            try:
                for ticket in self._in_hand.tickets():  # so that nobody takes their messages for lost
                    self.spool.touch(ticket)
                if self._holds is not None:
                    self._holds.only(self.spool.versions())
                self._tell()
                self._starved_since = None if self.doorbell.waiting() == 0 else self._starved_since or time.monotonic()
                sweep(self.spool, self.doorbell, self.config, in_hand=self._in_hand.tickets())
            except CapacityError as error:  # Redis is down, which another consumer would not change
                self._starved_since = None
                logger.warning("%s", error)
            except Exception:
                logger.exception("sweeping failed")

    def _tell(self) -> None:
        """Tell the metrics how far behind the labels are, at most every ten seconds: it lists folders."""
        now = time.monotonic()
        if now < self._next_tell:
            return
        self._next_tell = now + TELL_S
        labels = {"run": Path(self.config.root).name, "teacher": self.config.teacher}
        backlog = self.spool.backlog()
        NEARLINE_QUEUED.set(backlog.waiting, **labels)
        NEARLINE_OLDEST.set(backlog.oldest_s, **labels)
        NEARLINE_DEAD.set(backlog.dead_letters, **labels)
        NEARLINE_REJECTED.set(backlog.rejected_rows, **labels)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.stop()
