"""The replica in front of a gang: takes requests, and answers them as a teacher's service in one process does."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import Any, Protocol

import pyarrow as pa

from rayfm.client.wire import Scored
from rayfm.config import SnapshotError
from rayfm.serving.follow import follow_gang
from rayfm.serving.gang.actors import ActorMembers
from rayfm.serving.gang.config import GangConfig
from rayfm.serving.gang.gang import Gang, GangVersion, Members
from rayfm.serving.gang.named import NamedVersions
from rayfm.serving.http.codecs import check_finite
from rayfm.serving.requests import conform_rows
from rayfm.serving.teacher import KEPT_VERSIONS
from rayfm.snapshots.load import SnapshotStore
from rayfm.snapshots.loader import SnapshotFollower
from rayfm.snapshots.metadata import open_metadata

LAST_WORDS_S = 0.2
"""Seconds between a gang's break and its end, in which the requests under way are told."""


class Versions(Protocol):
    """The versions that a gang has, or can have."""

    def get(self, version: str) -> GangVersion:
        """A version that a request names; blocks while it is loaded."""
        ...

    def current(self) -> GangVersion:
        """What answers requests that name none."""
        ...


class GangTeacherService:
    """One replica: owns K members in its placement group, and answers as a `TeacherService` does.

    Members work in lockstep, so requests are given to all of them at once, in one order, with the version that each is
    to be answered with: a reply is one version's. Where a member dies, the others fail in the exchange that they wait
    in, the requests under way fail with `GangBroken`, and the replica ends itself, upon which Ray Serve starts another
    with members of its own.

    With ``metadata`` the gang follows `current` of that store under one lease a version: all members load a newer
    version beside the one that answers, and where one of them cannot, all stay with the one they have.

    Args:
        config: a `GangConfig`'s fields.
        members: the processes; by default actors that are started here.
    """

    def __init__(self, config: dict[str, Any], members: Members | None = None) -> None:
        self.config = GangConfig.model_validate(config)
        self.store = SnapshotStore(self.config.root)
        self.pids: list[int] = []
        if members is None:
            members = actors = ActorMembers(self.config)
            self.pids = actors.pids
        model, world, rows = self.config.model, self.config.members, self.config.predict_rows
        self.gang = Gang(self.store, model, members, world, rows, _end_soon)
        self._named = NamedVersions(self.gang.load)
        self._versions: Versions = self._named
        self._follower: SnapshotFollower[GangVersion] | None = None
        if self.config.metadata is not None:
            metadata, poll_s = open_metadata(self.config.metadata), self.config.poll_s or 2.0
            self._follower = follow_gang(self.gang, metadata, poll_s, spare=KEPT_VERSIONS - 1)
            self._versions = self._follower.loader

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve calls this at the start and when ``user_config`` changes: ``version`` answers requests that name none,
        unless the gang follows a metadata store.
        """
        version = user_config.get("version")
        if version is not None and self._follower is None:
            await asyncio.to_thread(self._named.make_current, str(version))

    async def check_health(self) -> None:
        """Serve calls this every now and then.

        Raises:
            GangBroken: a member does not answer.
        """
        await self.gang.check()

    async def current_version(self) -> str | None:
        """The version that answers requests that name none; None where there is none yet."""
        try:
            return self._versions.current().version
        except (SnapshotError, ValueError):
            return None

    async def member_pids(self) -> list[int]:
        """Process ids of the members, for operators and tests."""
        return self.pids

    async def score(
        self, table: pa.Table, version: str | None = None, representation: bool = False
    ) -> tuple[str, pa.Table]:
        """(version, predictions) for ``table``, as `TeacherService.score`.

        Raises:
            SnapshotError: the version cannot be loaded; none was named, and none is there yet that can be followed.
            ValueError: none was named, and the gang follows nothing.
            GangBroken: a member died; another replica can answer.
        """
        return await self._answer(table, version, representation, conform_first=False)

    async def score_request(self, table: pa.Table, version: str | None = None, representation: bool = False) -> Scored:
        """Predictions for rows from outside, as `TeacherService.score_request`."""
        return Scored(*await self._answer(table, version, representation, conform_first=True))

    def close(self) -> None:
        """Stop following, and give the leases back."""
        if self._follower is not None:
            self._follower.close()

    async def _answer(
        self, table: pa.Table, version: str | None, representation: bool, conform_first: bool
    ) -> tuple[str, pa.Table]:
        loaded = await self._entered(version)
        # To its end, even where the caller is gone: members that are at work still need the version.
        work = asyncio.ensure_future(self._score(loaded, table, representation, conform_first))
        return await asyncio.shield(work)

    async def _entered(self, version: str | None) -> GangVersion:
        while True:
            if version is None:
                loaded = self._versions.current()
            else:
                loaded = await asyncio.to_thread(self._versions.get, version)
            if loaded.enter():
                return loaded

    async def _score(
        self, loaded: GangVersion, table: pa.Table, representation: bool, conform_first: bool
    ) -> tuple[str, pa.Table]:
        try:
            if conform_first:
                table = await asyncio.to_thread(conform_rows, loaded.encoder, table)
            predictions = await self.gang.score(loaded, table, representation)
            return loaded.version, check_finite(predictions) if conform_first else predictions
        finally:
            loaded.leave()


def _end_soon() -> None:
    """End this process once the requests under way have heard that the gang is broken.

    A replica that fails at once looks idle, and would be sent everything until its health check is next due; one that
    is gone is sent nothing. Its members end with it.
    """
    timer = threading.Timer(LAST_WORDS_S, os._exit, (1,))
    timer.daemon = True
    timer.start()
