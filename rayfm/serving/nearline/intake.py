"""Where posts come in: checked, stored durably, then rung for."""

from __future__ import annotations

import logging
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from rayfm.config import CapacityError, Config, DataError
from rayfm.serving.nearline.config import NearLineConfig
from rayfm.serving.nearline.holds import VersionHolds
from rayfm.serving.nearline.rows import Versions, check_post, first_reasons
from rayfm.serving.nearline.spool import Spool
from rayfm.serving.nearline.tickets import Backlog, TicketStatus

logger = logging.getLogger(__name__)

_COUNTED_S = 1.0
"""How old the knowledge of the number of waiting tickets may be."""

_REJECTS_COUNTED_S = 60.0
"""And of the bytes of refused rows: many small files that lie for long, and take long to count."""


class Full(CapacityError):
    """Too many tickets wait: post again later."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TooLarge(DataError):
    """A post with more rows than are taken at once."""


class BadRows(DataError):
    """A post without one good row; nothing of it was accepted."""

    def __init__(self, message: str, rejects: list[dict[str, Any]]) -> None:
        super().__init__(message)
        self.rejects = rejects


class Rings(Protocol):
    """What tells the consumers of a ticket."""

    def ring(self, ticket: str) -> None:
        """Raises CapacityError where it cannot."""
        ...


class Accepted(Config):
    """The answer to a post (202)."""

    ticket: str
    teacher: str
    version: str
    """The snapshot that will label the rows."""

    rows: int
    """Rows accepted."""

    rejected: int
    """Rows refused, and kept in ``rejects/``."""

    rejects: list[dict[str, Any]]
    """Position in the post and reason, of the first 100."""


class Intake:
    """Accepts posts for one teacher.

    Args:
        config: the teacher's.
        spool, versions: where rows go to, and what labels them.
        doorbell: told of each ticket, after it is durable. It may fail: the sweeper rings again.
        holds: keeps the snapshot that is to label, until the consumers hold it for the ticket.
    """

    def __init__(
        self,
        config: NearLineConfig,
        spool: Spool,
        versions: Versions,
        doorbell: Rings,
        holds: VersionHolds | None = None,
    ) -> None:
        self.config, self.spool = config, spool
        self._versions, self._doorbell, self._holds = versions, doorbell, holds
        # One thread: a Redis that hangs delays messages, never an answer.
        self._ringer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rayfm-nearline-ring")
        self._lock = threading.Lock()
        self._counted, self._waiting, self._bytes = 0.0, 0, 0
        self._rejects_counted, self._rejects_bytes = -math.inf, 0
        self._quiet_until = 0.0

    def check_room(self) -> None:
        """Raises Full where too many tickets wait already, or too many bytes lie on disk.

        It may look at each file, and waits for others that do: not for an event loop.
        """
        with self._lock:
            now = time.monotonic()
            if now - self._counted > _COUNTED_S:
                (self._waiting, self._bytes), self._counted = self.spool.queued(), now
            if now - self._rejects_counted > _REJECTS_COUNTED_S:
                self._rejects_bytes, self._rejects_counted = self.spool.rejected_bytes(), now
            limits = self.config.limits
            if self._waiting >= limits.queued:
                why = f"{self._waiting} posts wait for teacher {self.config.teacher!r}"
            elif self._bytes + self._rejects_bytes >= limits.queued_mb * 2**20:
                why = (
                    f"{self._bytes / 2**20:.0f} MB of rows wait for teacher {self.config.teacher!r}, and "
                    f"{self._rejects_bytes / 2**20:.0f} MB of refused ones are kept"
                )
            else:
                return
            raise Full(f"{why}; post again later", limits.retry_after_s)

    def accept(self, table: pa.Table) -> Accepted:
        """Check a post and accept its good rows: once this returns, they will be labelled or be a dead letter.

        Raises:
            Full: too many tickets wait, or too many bytes lie on disk.
            TooLarge: too many rows.
            BadRows: no row is good.
            DataError: a column is missing or of a type that never fits, or the rows are of too many periods.
            SnapshotError: nothing can label.
            CapacityError: the disk is full.
        """
        self.check_room()
        limit = self.config.limits.rows
        if table.num_rows > limit:
            raise TooLarge(f"{table.num_rows} rows in a post; send at most {limit} at a time")
        if not table.num_rows:
            raise DataError("the post has no rows")
        version = self._versions.current()
        limits = self.config.limits
        post = check_post(table, self.config.teacher, version, self.config.period, limits.periods, limits.ahead_s)
        rejects = first_reasons(post.rejects)
        if not post.good.num_rows:
            raise BadRows(f"no row can be labelled; row {rejects[0]['row']}: {rejects[0]['reason']}", rejects)
        if self._holds is not None:
            self._holds.keep(version.version)
        ticket = self.spool.accept(post.good, version.version, post.rejects)
        with self._lock:
            self._waiting, self._bytes = self._waiting + 1, self._bytes + post.good.nbytes
            self._rejects_bytes += post.rejects.nbytes
        self._ringer.submit(self._ring, ticket)
        return Accepted(
            ticket=ticket,
            teacher=self.config.teacher,
            version=version.version,
            rows=post.good.num_rows,
            rejected=post.rejects.num_rows,
            rejects=rejects,
        )

    def status(self, ticket: str) -> TicketStatus | None:
        """As `Spool.status`; reasons do not name the folders of this machine."""
        status = self.spool.status(ticket)
        if status is None or status.reason is None:
            return status
        return status.model_copy(update={"reason": status.reason.replace(str(Path(self.config.root)), "")})

    def backlog(self) -> Backlog:
        """As `Spool.backlog`."""
        return self.spool.backlog()

    def _ring(self, ticket: str) -> None:
        if time.monotonic() < self._quiet_until:
            return  # Redis is down: the sweeper rings for what came meanwhile, and no backlog of time-outs builds up
        try:
            self._doorbell.ring(ticket)
        except CapacityError as error:
            self._quiet_until = time.monotonic() + _COUNTED_S
            logger.warning("%s; accepted rows wait on disk", error)
