"""What scores behind the endpoints: students in this process, teachers in services of their own. Without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Protocol

import pyarrow as pa

from rayfm.client.wire import Scored
from rayfm.config import SnapshotError, nearest
from rayfm.serving.http.codecs import Payload
from rayfm.serving.http.config import LimitsConfig
from rayfm.serving.http.problems import Problem, unavailable
from rayfm.serving.http.queue import Deadline, Queue, too_late
from rayfm.serving.item_service import Retrievers
from rayfm.serving.student import Students

STATUS_S = 2.0
"""Seconds in which a teacher has to say its version, or it counts as not ready."""


class Teacher(Protocol):
    """A teacher's service, asked from here."""

    async def score(self, rows: pa.Table, version: str | None, representation: bool) -> Scored:
        """Predictions for rows as they came.

        Raises:
            DataError: the rows are wrong; SnapshotError: the version cannot be used; Problem: nobody answers.
        """
        ...

    async def version(self) -> str | None:
        """The version that answers requests that name none; None where there is none yet."""
        ...


class ScoringBackend:
    """The backend of both protocols.

    Args:
        students: what this process serves.
        teachers: name -> its service.
        limits: how many requests may wait for teachers.
        items: the two-towers that retrieve, for the status.
    """

    def __init__(
        self,
        students: Students,
        teachers: Mapping[str, Teacher],
        limits: LimitsConfig,
        items: Retrievers | None = None,
    ) -> None:
        self.students, self.teachers, self.items = students, dict(teachers), items
        self._waiting = Queue(limits.max_queue)

    async def score_student(self, model: str, payload: Payload, deadline: Deadline) -> Scored:
        """As `Students.score`."""
        return await self.students.score(model, payload, deadline)

    async def score_teacher(
        self, teacher: str, payload: Payload, deadline: Deadline, version: str | None, representation: bool
    ) -> Scored:
        """A teacher's predictions for a request's rows.

        Raises:
            Problem: no such teacher or version (404), the queue is full (429), nobody answers (503), too late (504).
            DataError: the request is wrong.
        """
        service = self.teachers.get(teacher)
        if service is None:
            raise Problem(404, f"no teacher {teacher[:80]!r} is served{nearest(teacher[:80], list(self.teachers))}")
        rows = await self._waiting.run(deadline, payload.rows)
        with self._waiting.place():
            try:
                return await asyncio.wait_for(service.score(rows, version, representation), deadline.left)
            except TimeoutError:
                raise too_late() from None
            except SnapshotError:
                if version is not None:
                    raise Problem(404, f"teacher {teacher!r} has no version {version!r} that can be used") from None
                raise unavailable(f"teacher {teacher!r} has no version that can be served yet", 5) from None

    async def status(self) -> tuple[bool, Mapping[str, Any]]:
        """Whether every student and teacher can answer, and with which version."""

        async def ask(service: Teacher) -> str | None:
            try:
                return await asyncio.wait_for(service.version(), STATUS_S)
            except Exception:  # whatever it is, the teacher is not ready
                return None

        versions = await asyncio.gather(*(ask(service) for service in self.teachers.values()))
        teachers = dict(zip(self.teachers, versions, strict=True))
        found = {"models": self.students.versions(), "teachers": teachers}
        ready = self.students.ready and None not in versions
        if self.items is not None and self.items.models:
            found["retrieval"] = self.items.versions()
            ready = ready and None not in found["retrieval"].values()
        return ready, found

    def close(self) -> None:
        """Stop scoring."""
        self.students.close()
        if self.items is not None:
            self.items.close()
        self._waiting.close()
