"""Registries: a new model, objective, source or metric is one new file plus one ``@REGISTRY.register`` line.

A registered part is a class with a nested ``Config``. In a YAML file the part is chosen by ``type``::

    model: {type: dcnv2, embedding_dim: 16}
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import pkgutil
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from pydantic import GetCoreSchemaHandler
from pydantic_core import core_schema

from rayfm.config.base import Config

PartT = TypeVar("PartT", bound=type)

_LOADING = threading.RLock()
"""Of the module, as registries are copied and pickled with what refers to them."""


def nearest(name: str, known: list[str]) -> str:
    """``; did you mean 'x'?`` for the known name closest to ``name``, or the list of known names when none is close."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(sorted(known))}" if known else ""


class Registry:
    """Parts of one kind by name.

    Args:
        kind: what the parts are, in the singular (``model``); used in messages.
        packages: packages whose modules register parts; they are imported at the first look-up, so that importing
            the registry costs nothing. Installed distributions add theirs through the entry point group
            ``rayfm.<kind>``.
    """

    def __init__(self, kind: str, *packages: str) -> None:
        self.kind = kind
        self._packages = packages
        self._parts: dict[str, Any] = {}
        self._loaded = self._loading = False

    def register(self, name: str) -> Callable[[PartT], PartT]:
        """Class decorator. The class must have a nested ``Config`` with ``type: Literal[name] = name``."""

        def add(part: PartT) -> PartT:
            if name in self._parts and self._parts[name].__qualname__ != part.__qualname__:
                raise ValueError(f"two {self.kind} parts are called {name!r}")
            self._parts[name] = part
            return part

        return add

    def _load(self) -> None:
        if self._loaded:
            return
        # A second thread waits until all are there; the thread that loads may look something up meanwhile.
        with _LOADING:
            if self._loading or self._loaded:
                return
            self._loading = True
            try:
                for package in self._packages:
                    module = importlib.import_module(package)
                    for info in pkgutil.iter_modules(getattr(module, "__path__", []), f"{package}."):
                        importlib.import_module(info.name)
                for plugin in importlib.metadata.entry_points(group=f"rayfm.{self.kind}"):
                    plugin.load()
                self._loaded = True
            finally:
                self._loading = False

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._parts))

    def __getitem__(self, name: str) -> Any:
        self._load()
        if name not in self._parts:
            raise KeyError(f"unknown {self.kind} {name!r}{nearest(name, list(self._parts))}")
        return self._parts[name]

    def build(self, config: Config, *args: Any, **kwargs: Any) -> Any:
        """The part itself: ``registry[config.type](config, ...)``."""
        return self[vars(config)["type"]](config, *args, **kwargs)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """``Annotated[Config, REGISTRY]`` is the union of the parts' configs, told apart by ``type``."""
        return core_schema.tagged_union_schema(
            choices={name: handler.generate_schema(self[name].Config) for name in self}, discriminator="type"
        )
