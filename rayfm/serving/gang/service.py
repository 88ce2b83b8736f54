"""The replica in front of a gang: takes requests, deals their rows to the members, puts the answers together."""

from __future__ import annotations

import asyncio
import logging
import math
import os
from typing import Any

import pyarrow as pa

from rayfm.config import RayfmError, SnapshotError
from rayfm.data.encode import Encoder
from rayfm.models.base import MODELS
from rayfm.schema import Schema
from rayfm.serving.gang.member import GangMember
from rayfm.serving.requests import conform_rows
from rayfm.serving.teacher import KEPT_VERSIONS, TeacherServiceConfig
from rayfm.snapshots.load import SnapshotStore

LAST_WORDS_S = 0.2
"""Seconds between a gang's break and its end, in which the requests under way are told."""

_LOG = logging.getLogger(__name__)


class GangConfig(TeacherServiceConfig):
    """A teacher service whose replicas are gangs."""

    members: int
    """Processes of a gang, K."""
    cpus_per_member: float = 0.25
    gpus_per_member: float = 0.0
    row_wise_from: int = 1_000_000
    """Rows from which on a table is cut over all members."""


class GangBroken(RayfmError):
    """A member died or an exchange failed: this gang answers no more and will be replaced. Ask again."""


class GangTeacherService:
    """One replica: owns K members in its placement group, and answers as a `TeacherService` does.

    Members work in lockstep, so requests are given to all of them at once, in one order. Where a member dies, the
    others fail in the exchange that they wait in, the requests under way fail with `GangBroken`, and the replica ends
    itself, upon which Ray Serve starts another with members of its own.

    Args:
        config: a `GangConfig`'s fields.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self.config = GangConfig.model_validate(config)
        self.store = SnapshotStore(self.config.root)
        self._current: str | None = None
        self._broken: str | None = None
        self._loaded: list[str] = []
        self._encoders: dict[str, Encoder] = {}
        self._order = asyncio.Lock()
        group = ray.util.get_current_placement_group()
        remote: Any = ray.remote
        actor = remote(concurrency_groups={"health": 1})(GangMember)
        options: dict[str, Any] = {"num_cpus": self.config.cpus_per_member, "num_gpus": self.config.gpus_per_member}
        if group is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group)
        world = self.config.members
        arguments = (self.config.threads, self.config.row_wise_from, KEPT_VERSIONS)
        self.members = [
            actor.options(**options).remote(self.config.root, self.config.model, rank, world, *arguments)
            for rank in range(world)
        ]
        address = ray.get(self.members[0].address.remote())
        self.pids: list[int] = ray.get([member.join.remote(address) for member in self.members])

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve calls this at the start and when ``user_config`` changes: ``version`` answers where none is named."""
        version = user_config.get("version")
        if version is not None:
            await self._load(str(version))
            self._current = str(version)

    async def check_health(self) -> None:
        """Serve calls this every now and then.

        Raises:
            GangBroken: a member does not answer.
        """
        if self._broken is None:
            try:
                answers = [member.alive.remote() for member in self.members]
                await asyncio.wait_for(asyncio.gather(*answers), timeout=10)
            except Exception as error:
                self._break(f"a member does not answer ({type(error).__name__})")
        if self._broken is not None:
            raise GangBroken(f"gang of {self.config.model}: {self._broken}")

    async def current_version(self) -> str | None:
        """The version that answers requests that name none."""
        return self._current

    async def member_pids(self) -> list[int]:
        """Process ids of the members, for operators and tests."""
        return self.pids

    async def score(
        self, table: pa.Table, version: str | None = None, representation: bool = False
    ) -> tuple[str, pa.Table]:
        """(version, predictions) for ``table``, as `TeacherService.score`.

        Raises:
            SnapshotError: the version cannot be loaded; ValueError: none was named and none is current.
            GangBroken: a member died; another replica can answer.
        """
        wanted = version or self._current
        if wanted is None:
            raise ValueError("no version is current; name one")
        await self._load(wanted)
        return wanted, await self._score(table, wanted, representation)

    async def score_request(self, table: pa.Table, version: str | None = None, representation: bool = False) -> Any:
        """Predictions for rows from outside, as `TeacherService.score_request`."""
        from rayfm.client.wire import Scored
        from rayfm.serving.http.codecs import check_finite

        wanted = version or self._current
        if wanted is None:
            raise ValueError("no version is current; name one")
        await self._load(wanted)
        rows = conform_rows(self._encoders[wanted], table)
        return Scored(wanted, check_finite(await self._score(rows, wanted, representation)))

    async def _load(self, version: str) -> None:
        """Have all members load a version; what they keep, they keep alike, since they are asked alike."""
        if version in self._loaded:
            return
        manifest = self.store.manifest(self.config.model, version)  # refused here, before any member is asked
        config = MODELS[manifest.config["type"]].Config.model_validate(manifest.config)
        async with self._order:
            if version in self._loaded:
                return
            await self._all(lambda member: member.load.remote(version))
            self._encoders[version] = Encoder(
                Schema.model_validate(manifest.example_schema), config.features, labels=False
            )
            self._loaded = [*self._loaded, version][-KEPT_VERSIONS:]
            self._encoders = {name: self._encoders[name] for name in self._loaded}

    async def _score(self, table: pa.Table, version: str, representation: bool) -> pa.Table:
        world, at_once = self.config.members, self.config.predict_rows
        share = math.ceil(table.num_rows / world)
        steps = max(1, math.ceil(share / at_once))
        parts = [table.slice(rank * share, max(0, min(share, table.num_rows - rank * share))) for rank in range(world)]
        async with self._order:
            if version not in self._loaded:
                raise SnapshotError(f"{self.config.model}@{version} was dropped for newer versions; ask again")
            pairs = zip(self.members, parts, strict=True)
            await self._gathered([member.encode.remote(part, version) for member, part in pairs], in_step=True)
            return pa.concat_tables(
                await self._all(lambda member: member.score.remote(version, steps, at_once, representation))
            )

    async def _all(self, ask: Any) -> list[Any]:
        return await self._gathered([ask(member) for member in self.members])

    async def _gathered(self, answers: list[Any], in_step: bool = False) -> list[Any]:
        """The members' answers.

        Args:
            answers: a reference of each member.
            in_step: the members exchanged nothing, so that one's error leaves the others where they were.

        Raises:
            RayfmError: what all of them raise alike, such as a version that cannot be loaded, or one of them in step.
            GangBroken: anything else; the members may be out of step.
        """
        if self._broken is not None:
            raise GangBroken(f"gang of {self.config.model}: {self._broken}; ask again")
        found = await asyncio.gather(*answers, return_exceptions=True)
        errors = [answer for answer in found if isinstance(answer, BaseException)]
        if not errors:
            return list(found)
        causes = [getattr(error, "cause", error) for error in errors]
        if (in_step or len(errors) == len(found)) and all(isinstance(cause, RayfmError) for cause in causes):
            raise type(causes[0])(str(causes[0]))
        self._break(f"{type(causes[0]).__name__}: {str(causes[0]).splitlines()[0] if str(causes[0]) else ''}")
        raise GangBroken(f"gang of {self.config.model}: {self._broken}; ask again")

    def _break(self, why: str) -> None:
        """Answer nothing more, and end this process once the requests under way have heard of it.

        A replica that fails at once looks idle, and would be sent everything until its health check is next due; one
        that is gone is sent nothing. Its members end with it.
        """
        if self._broken is None:
            self._broken = why
            _LOG.error("gang of %s: %s", self.config.model, why)
            asyncio.get_running_loop().call_later(LAST_WORDS_S, os._exit, 1)
