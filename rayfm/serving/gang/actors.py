"""Members as Ray actors in the replica's placement group."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayfm.serving.gang.config import GangConfig
from rayfm.serving.gang.errors import MemberLost
from rayfm.serving.gang.gang import Members
from rayfm.serving.gang.member import GangMember


class ActorMembers(Members):
    """Starts the members of one gang, and asks them.

    Args:
        config: the gang's.
    """

    def __init__(self, config: GangConfig) -> None:
        self._submitting = threading.Lock()
        group = ray.util.get_current_placement_group()
        remote: Any = ray.remote
        # Health and loads beside a running forward, each in a thread of its own.
        actor = remote(concurrency_groups={"health": 1, "loading": 1})(GangMember)
        options: dict[str, Any] = {"num_cpus": config.cpus_per_member, "num_gpus": config.gpus_per_member}
        if group is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group)
        world = config.members
        arguments = (world, config.threads, config.row_wise_from)
        self._actors = [
            actor.options(**options).remote(config.root, config.model, rank, *arguments) for rank in range(world)
        ]
        address = ray.get(self._actors[0].address.remote())
        self.pids: list[int] = ray.get([member.join.remote(address) for member in self._actors])

    def ask(self, method: str, arguments: Sequence[Sequence[Any]]) -> list[Future[Any]]:
        with self._submitting:
            pairs = zip(self._actors, arguments, strict=True)
            references = [getattr(actor, method).remote(*own) for actor, own in pairs]
        return [_plain(reference.future()) for reference in references]


def _plain(answer: Future[Any]) -> Future[Any]:
    """The answer with the errors of the member in place of Ray's."""
    plain: Future[Any] = Future()

    def tell(done: Future[Any]) -> None:
        error = done.exception()
        if error is None:
            plain.set_result(done.result())
        elif isinstance(error, RayTaskError):
            plain.set_exception(error.cause if isinstance(error.cause, Exception) else error)
        elif isinstance(error, RayError):
            said = str(error).strip()
            plain.set_exception(MemberLost(f"{type(error).__name__}: {said.splitlines()[0] if said else ''}"))
        else:
            plain.set_exception(error)

    answer.add_done_callback(tell)
    return plain
