"""The two-towers of a process that retrieve: each with the index of its items, followed like any other model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rayfm.config import SnapshotError
from rayfm.serving.http.problems import unavailable
from rayfm.serving.retrieval import ItemIndex, Retriever
from rayfm.serving.versions import Follower, Shelf


class Retrievers:
    """What answers ``:retrieve``.

    Args:
        models: their keys.
        follow: starts to follow a model, and blocks until its first index is built.
    """

    def __init__(self, models: tuple[str, ...], follow: Callable[[str], Follower[ItemIndex]]) -> None:
        self.models = models
        self._shelf: Shelf[ItemIndex] = Shelf(follow, max(1, len(models)))
        for model in models:
            self._shelf.get(model)

    def by_model(self) -> Mapping[str, Retriever]:
        """Model -> what retrieves by it."""

        def current_of(model: str) -> Callable[[], ItemIndex]:
            return lambda: self._current(model)

        return {model: Retriever(current_of(model)) for model in self.models}

    def versions(self) -> dict[str, str | None]:
        """Model -> the version that answers; None where none does yet."""
        loaded = self._shelf.loaded()
        return {model: loaded.get(model) for model in self.models}

    def close(self) -> None:
        """Stop following."""
        self._shelf.close()

    def _current(self, model: str) -> ItemIndex:
        slot = self._shelf.get(model)
        waiting = unavailable(f"the items of {model!r} are not indexed yet; try again", 5)
        if not slot.done():
            raise waiting
        try:
            return slot.result().current()
        except SnapshotError:
            raise waiting from None
