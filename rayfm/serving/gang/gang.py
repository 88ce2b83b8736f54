"""A gang asked as one: it holds versions side by side, and answers each request with one of them. Without Ray."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import pyarrow as pa

from rayfm.config import RayfmError, SnapshotError
from rayfm.data.encode import Encoder
from rayfm.models.base import MODELS
from rayfm.schema import Schema
from rayfm.serving.gang.errors import GangBroken, MemberLost
from rayfm.snapshots.ids import load_vocabularies
from rayfm.snapshots.load import SnapshotStore

log = logging.getLogger(__name__)


class Members(Protocol):
    """The processes of a gang."""

    def ask(self, method: str, arguments: Sequence[Sequence[Any]]) -> list[Future[Any]]:
        """Call a method of `GangMember` on every member, the n-th with the n-th arguments.

        Calls that are made one after another reach every member in that order. A future fails with what the method
        raised, or with `MemberLost`.
        """
        ...


class GangVersion:
    """A version in the members' memory. It stays there until it was retired and nobody uses it any more.

    Args:
        number: the load's; a version that is loaded twice has two.
        version: its name.
        encoder: what its rows are conformed to.
        drop: has the members drop it.
    """

    def __init__(self, number: int, version: str, encoder: Encoder, drop: Callable[[int], None]) -> None:
        self.number, self.version, self.encoder = number, version, encoder
        self._drop = drop
        self._lock = threading.Lock()
        self._users, self._retired = 0, False

    def enter(self) -> bool:
        """Use it until `leave`; False where it was retired, and another one has to be taken."""
        with self._lock:
            if not self._retired:
                self._users += 1
            return not self._retired

    def leave(self) -> None:
        """The end of a use."""
        with self._lock:
            self._users -= 1
            last = self._retired and self._users == 0
        if last:
            self._drop(self.number)

    def retire(self) -> None:
        """Take no new users, and leave memory after the last."""
        with self._lock:
            last = not self._retired and self._users == 0
            self._retired = True
        if last:
            self._drop(self.number)


class Gang:
    """K members that work in lockstep, each for its share of the rows.

    A load uses a process group and a thread of its own in every member, so that the version that answers goes on
    answering, and a load that fails, or hangs until its group's timeout, harms nothing but itself.

    Args:
        store, model: whose versions.
        members: the processes.
        world: how many there are.
        rows_at_once: rows of one forward of a member.
        end: called once, when the gang breaks.
    """

    def __init__(
        self, store: SnapshotStore, model: str, members: Members, world: int, rows_at_once: int, end: Callable[[], None]
    ) -> None:
        self.store, self.model, self.members, self.world = store, model, members, world
        self.broken: str | None = None
        """Why it answers no more, None while it does."""
        self._rows_at_once, self._end = rows_at_once, end
        self._numbers = itertools.count()
        self._loading = threading.Lock()  # groups are made in one order in all members
        self._order = asyncio.Lock()

    def load(self, version: str) -> GangVersion:
        """Have every member load its slices of a version, beside those that it has. Blocks; not for an event loop.

        Raises:
            SnapshotError: a member cannot load it; no member keeps it.
            GangBroken: a member died.
        """
        manifest = self.store.manifest(self.model, version)  # refused here, before any member is asked
        config = MODELS[manifest.config["type"]].Config.model_validate(manifest.config)
        encoder = Encoder(
            Schema.model_validate(manifest.example_schema),
            config.features,
            labels=False,
            vocabularies=load_vocabularies(self.store, self.model, version),
        )
        with self._loading:
            number = next(self._numbers)
            self._all_or_none(number, version, "load", [(number, version)] * self.world)
        return GangVersion(number, version, encoder, self._drop)

    def warm(self, loaded: GangVersion) -> None:
        """One forward of one example a member, before any request is answered with the version. Blocks.

        Raises:
            SnapshotError: a member cannot score; GangBroken: a member died.
        """
        with self._loading:
            self._all_or_none(loaded.number, loaded.version, "warm", [(loaded.number,)] * self.world)

    async def score(self, loaded: GangVersion, table: pa.Table, representation: bool) -> pa.Table:
        """Predictions of a version that the caller has entered, in the rows' order, as `GangMember.score`.

        Raises:
            DataError: a row cannot be encoded.
            GangBroken: a member died, or an exchange failed; another gang can answer.
        """
        share = math.ceil(table.num_rows / self.world)
        steps = max(1, math.ceil(share / self._rows_at_once))
        parts = [
            table.slice(rank * share, max(0, min(share, table.num_rows - rank * share))) for rank in range(self.world)
        ]
        async with self._order:
            await self._gathered("encode", [(part, loaded.number) for part in parts], in_step=True)
            asked = (loaded.number, steps, self._rows_at_once, representation)
            return pa.concat_tables(await self._gathered("score", [asked] * self.world))

    async def check(self, timeout_s: float = 10.0) -> None:
        """See whether every member answers.

        Raises:
            GangBroken: one does not.
        """
        if self.broken is None:
            try:
                answers = [asyncio.wrap_future(answer) for answer in self.members.ask("alive", [()] * self.world)]
                await asyncio.wait_for(asyncio.gather(*answers), timeout=timeout_s)
            except Exception as error:
                self._break(f"a member does not answer ({type(error).__name__})")
        self._check_whole()

    def _all_or_none(self, number: int, version: str, method: str, arguments: Sequence[Sequence[Any]]) -> None:
        self._check_whole()
        errors = [answer.exception() for answer in self.members.ask(method, arguments)]
        failed = [(rank, error) for rank, error in enumerate(errors) if error is not None]
        if not failed:
            return
        for rank, error in failed:
            if isinstance(error, MemberLost):
                self._break(f"member {rank} was lost while it loaded {version}: {error}")
                self._check_whole()
        self._drop(number)
        rank, error = failed[0]
        raise SnapshotError(
            f"{self.model}@{version} cannot be loaded by {len(failed)} of {self.world} members; "
            f"member {rank}: {type(error).__name__}: {error}"
        )

    def _drop(self, number: int) -> None:
        if self.broken is None:
            self.members.ask("drop", [(number,)] * self.world)

    async def _gathered(self, method: str, arguments: Sequence[Sequence[Any]], in_step: bool = False) -> list[Any]:
        """The members' answers.

        Args:
            method, arguments: what to ask.
            in_step: the members exchange nothing, so that one's error leaves the others where they were.

        Raises:
            RayfmError: what all of them raise alike, or one of them in step.
            GangBroken: anything else; the members may be out of step.
        """
        self._check_whole()
        answers = [asyncio.wrap_future(answer) for answer in self.members.ask(method, arguments)]
        found = await asyncio.gather(*answers, return_exceptions=True)
        errors = [answer for answer in found if isinstance(answer, BaseException)]
        if not errors:
            return list(found)
        alike = in_step or len(errors) == len(found)
        if alike and all(isinstance(error, RayfmError) and not isinstance(error, MemberLost) for error in errors):
            raise type(errors[0])(str(errors[0]))
        said = str(errors[0])
        self._break(f"{type(errors[0]).__name__}: {said.splitlines()[0] if said else ''}")
        raise self._gone()

    def _check_whole(self) -> None:
        if self.broken is not None:
            raise self._gone()

    def _gone(self) -> GangBroken:
        return GangBroken(f"gang of {self.model}: {self.broken}; ask again")

    def _break(self, why: str) -> None:
        if self.broken is None:
            self.broken = why
            log.error("gang of %s: %s", self.model, why)
            self._end()
