"""A job server in the test's process: a client with the methods of Ray's, and what it was asked for."""

from __future__ import annotations

import zipfile
from collections.abc import AsyncIterator, Callable, Iterable
from types import SimpleNamespace
from typing import Any

from ray.job_submission import JobStatus

from rayfm.submission.server import Server


class FakeClient:
    """A job whose log comes in pieces, and that then ends.

    Args:
        log: pieces of the log. A callable is called in its place; an exception breaks the connection there.
        status, code, message: how the job ends.
    """

    def __init__(
        self, log: Iterable[Any] = (), status: str = "SUCCEEDED", code: int | None = 0, message: str = ""
    ) -> None:
        self.log, self.ending, self.code, self.message = list(log), status, code, message
        self.status = "RUNNING"
        self.stopped: list[str] = []
        self.connections = 0
        self.submitted: dict[str, Any] = {}
        self.names: set[str] = set()

    def submit_job(self, **job: Any) -> str:
        self.submitted = job
        with zipfile.ZipFile(job["runtime_env"]["working_dir"]) as archive:
            self.names = set(archive.namelist())
        return str(job["submission_id"])

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        """From the log's beginning, as Ray's does; what broke a connection does not break the next one."""
        self.connections += 1
        for place, piece in enumerate(self.log):
            if isinstance(piece, Exception):
                self.log[place] = ""
                raise piece
            if isinstance(piece, Callable):
                self.log[place] = ""
                await piece(self)
            elif piece:
                yield piece
        self.status = self.ending

    def get_job_info(self, job: str) -> Any:
        return SimpleNamespace(status=JobStatus(self.status), driver_exit_code=self.code, message=self.message)

    def stop_job(self, job: str) -> bool:
        self.stopped.append(job)
        self.ending = "STOPPED"
        return True


def server(client: Any) -> Server:
    return Server("http://ray:8265", client, "2.60.0")
