"""Students as a service: one user, many candidates, a prediction for each candidate and task."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from functools import partial

from rayfm.client.wire import Scored
from rayfm.config import SnapshotError, nearest
from rayfm.data.encode import EncodedChunk
from rayfm.serving.broadcast import encode_candidates
from rayfm.serving.exported import load_exported
from rayfm.serving.http.codecs import Payload, check_finite
from rayfm.serving.http.config import EndpointsConfig
from rayfm.serving.http.problems import Problem, unavailable
from rayfm.serving.http.queue import Deadline, Queue, too_late
from rayfm.serving.teacher import LoadedVersion, score_chunk
from rayfm.serving.versions import Follower, NewestFollower, Shelf
from rayfm.snapshots.load import SnapshotStore
from rayfm.snapshots.manifest import check_name

ROWS_AT_ONCE = 16_384
"""Candidates of one forward."""


def prepare_candidates(loaded: LoadedVersion, payload: Payload) -> EncodedChunk:
    """A request's candidates as a version reads them.

    Raises:
        DataError: the request is malformed, or does not fit the version's schema; Problem: it asks for too much.
    """
    user, candidates = payload.student()
    return encode_candidates(loaded.encoder, user, candidates, payload.limits.max_list_values)


def score_prepared(loaded: LoadedVersion, chunk: EncodedChunk) -> Scored:
    """A version's predictions for what was prepared for it.

    Raises:
        DataError: a prediction is not finite.
    """
    return Scored(loaded.version, check_finite(score_chunk(loaded, chunk, ROWS_AT_ONCE)))


def score_candidates(loaded: LoadedVersion, payload: Payload) -> Scored:
    """Predictions for a request's candidates by one version.

    Raises:
        DataError, Problem: as `prepare_candidates` and `score_prepared`.
    """
    return score_prepared(loaded, prepare_candidates(loaded, payload))


class Students:
    """The students that a process serves.

    Args:
        root: folder that holds ``snapshots/``.
        models: their keys; no other name is ever looked up.
        config: limits, and how many are kept in memory.
        follow: starts to follow a model; by default the newest version of the store under ``root``.
        queue: where scoring runs; by default one of the config's size.
    """

    def __init__(
        self,
        root: str,
        models: Sequence[str],
        config: EndpointsConfig,
        follow: Callable[[str], Follower[LoadedVersion]] | None = None,
        queue: Queue | None = None,
    ) -> None:
        store = SnapshotStore(root)
        self.models = tuple(check_name("model", model) for model in models)
        # One thread scores: torch's own threads do the work, and two forwards side by side would only take turns.
        # Another decodes and encodes the next request meanwhile, which is nearly as much work in a small model.
        self.queue = queue or Queue(config.limits.max_queue)
        load = partial(load_exported, config=config.compile)
        newest = partial(NewestFollower, store, poll_s=config.poll_s, load=load)
        self._shelf: Shelf[LoadedVersion] = Shelf(follow or newest, config.max_loaded)
        self._starting = list(self.models[: config.max_loaded])
        """Models that the start loads and that have not answered yet."""
        for model in self._starting:
            self._shelf.get(model)

    def versions(self) -> dict[str, str | None]:
        """Model -> the version that answers; None where it is not in memory."""
        loaded = self._shelf.loaded()
        return {model: loaded.get(model) for model in self.models}

    @property
    def ready(self) -> bool:
        """Whether every model that the start loads, as many as are kept in memory, has a version that can answer.

        It stays so: where there are more models than are kept, one that is asked for takes another's place and loads
        for a while, which delays who asked for it alone. A process that is at work is not to be taken out for it.
        """
        kept, loaded = self._shelf.kept(), self._shelf.loaded()
        self._starting = [model for model in self._starting if model in kept and model not in loaded]
        return not self._starting

    async def score(self, model: str, payload: Payload, deadline: Deadline) -> Scored:
        """Predictions for a request's candidates, all by one version.

        Raises:
            Problem: no such model (404), the queue is full (429), no version yet (503), too late (504).
            DataError: the request is wrong.
        """
        if model not in self.models:
            raise Problem(404, f"no student {model[:80]!r} is served{nearest(model[:80], list(self.models))}")
        slot = self._shelf.get(model)
        try:
            # Shielded: others wait for the same load. With a place: each waits with its body in memory.
            with self.queue.place() if not slot.done() else contextlib.nullcontext():
                follower = await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(slot)), deadline.left)
        except TimeoutError:
            raise too_late() from None
        except SnapshotError:
            raise unavailable(f"student {model!r} has no version that can be served yet", 5) from None

        def prepare() -> tuple[LoadedVersion, EncodedChunk]:
            try:
                loaded = follower.current()  # kept to the request's end, whatever is swapped meanwhile
            except SnapshotError:
                raise unavailable(f"student {model!r} has no version that can be served yet", 5) from None
            return loaded, prepare_candidates(loaded, payload)

        return await self.queue.run_both(deadline, prepare, lambda prepared: score_prepared(*prepared))

    def close(self) -> None:
        """Stop following and scoring."""
        self._shelf.close()
        self.queue.close()
