"""Writes the references of docs/configuration.md, augmentation.md and nearline.md from the config classes themselves,
and the table of docs/operations.md from the metrics: ``python docs/generate.py``.

What stands between the two markers is replaced; everything else in the files is written by hand.
"""

from __future__ import annotations

import dataclasses
import datetime
import re
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Union

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rayfm.augment.config import AugmentConfig
from rayfm.config import Registry
from rayfm.data.sources.base import SOURCES
from rayfm.distill.base import OBJECTIVES
from rayfm.models.base import MODELS, ModelConfig
from rayfm.operations.metrics import METRICS
from rayfm.pipeline.config import PipelineConfig
from rayfm.serving.nearline.config import NearLineConfig

PAGE = Path(__file__).parent / "configuration.md"
AUGMENT_PAGE = Path(__file__).parent / "augmentation.md"
NEARLINE_PAGE = Path(__file__).parent / "nearline.md"
OPERATIONS_PAGE = Path(__file__).parent / "operations.md"
BEGIN, END = "<!-- reference: written by docs/generate.py -->", "<!-- /reference -->"

_REGISTRIES = {MODELS: "models", OBJECTIVES: "objectives", SOURCES: "sources"}
_SCALARS = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    datetime.date: "date",
    datetime.datetime: "time",
    type(None): "null",
}
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "multiple_of": "multiple of"}


@dataclasses.dataclass(frozen=True)
class Section:
    """One heading and its table of keys."""

    level: int
    title: str
    model: type[BaseModel]
    inherited: type[BaseModel] | None = None
    """Keys of this base are listed elsewhere."""
    typed: bool = False
    """A part of a registry, chosen by ``type``."""

    @property
    def anchor(self) -> str:
        return slug(self.title)


def slug(title: str) -> str:
    """The anchor that GitHub gives a heading."""
    kept = re.sub(r"[^\w\- ]", "", title.strip().lower())
    return kept.replace(" ", "-")


def _configs(annotation: Any) -> Iterator[type[BaseModel]]:
    """Config classes that an annotation leads to, parts of registries left out."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        if not _registry(inner):
            yield from _configs(inner)


def _registry(annotation: Any) -> Registry | None:
    metadata = getattr(annotation, "__metadata__", ())
    return next((item for item in metadata if isinstance(item, Registry)), None)


def sections() -> list[Section]:
    """Headings in the order of a config file; a class that several keys lead to stands where it comes first."""
    found: list[Section] = []
    seen: set[type[BaseModel]] = set()

    def add(
        level: int, title: str, model: type[BaseModel], inherited: type[BaseModel] | None = None, typed: bool = False
    ) -> None:
        if model in seen:
            return
        seen.add(model)
        found.append(Section(level, title, model, inherited, typed))
        for field in model.model_fields.values():
            if not any(isinstance(item, Registry) for item in field.metadata):
                for config in _configs(field.annotation):
                    add(4, _name(config), config)

    add(3, "Top level", PipelineConfig)
    first, found[:] = found[0], found[1:]
    tops = {}
    for key, field in PipelineConfig.model_fields.items():
        for config in _configs(field.annotation):
            tops.setdefault(config, field.alias or key)
    ordered = [first]
    for section in found:
        titled = tops.get(section.model)
        ordered.append(dataclasses.replace(section, level=3, title=f"`{titled}`") if titled else section)
    found[:] = ordered
    parts: tuple[tuple[str, Registry, type[BaseModel] | None], ...] = (
        ("Source", SOURCES, None),
        ("Model", MODELS, ModelConfig),
        ("Objective", OBJECTIVES, None),
    )
    for kind, registry, base in parts:
        if base is not None:
            add(3, f"Every {kind.lower()}", base)
        for name in registry:
            add(3, f"{kind} `{name}`", registry[name].Config, base, typed=True)
    return found


def file_sections(top: type[BaseModel]) -> list[Section]:
    """Headings of a command's own file; a class that several keys lead to stands where it comes first."""
    found = [Section(3, "Top level", top)]
    waiting = [top]
    while waiting:
        model = waiting.pop(0)
        for key, field in model.model_fields.items():
            for config in _configs(field.annotation):
                if config not in [section.model for section in found]:
                    title = f"`{key}`" if model is top else _name(config)
                    found.append(Section(3, title, config))
                    waiting.append(config)
    return found


def _name(config: type[BaseModel]) -> str:
    words = re.sub(r"(?<!^)(?=[A-Z])", " ", config.__name__.removesuffix("Config"))
    return words.capitalize()


def _type(annotation: Any, links: dict[type[BaseModel], str]) -> str:
    registry = _registry(annotation)
    if registry is not None:
        return f"a [{registry.kind}](#{_REGISTRIES[registry]})"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(arguments[0], links)
    if annotation in _SCALARS:
        return _SCALARS[annotation]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        title = _name(annotation)
        return f"[{title.lower()}](#{links[annotation]})" if annotation in links else title.lower()
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(inner, links) for inner in arguments)
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return f"list: {_type(arguments[0], links)}"
        return "[" + ", ".join(_type(inner, links) for inner in arguments) + "]"
    if origin is dict:
        return f"name → {_type(arguments[1], links)}"
    return str(getattr(annotation, "__name__", annotation))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel) and not _changed(value):
        return "its own defaults"
    return f"`{_plain(value)}`"


def _changed(value: BaseModel) -> dict[str, Any]:
    """What a config's maker set."""
    return {name: item for name, item in value if name in value.model_fields_set}


def _plain(value: Any) -> str:
    if isinstance(value, BaseModel):
        return _plain(_changed(value))
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_plain(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_plain(item) for item in value) + "]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def _bounds(field: FieldInfo) -> str:
    found = []
    for item in field.metadata:
        for name, sign in _BOUNDS.items():
            bound = getattr(item, name, None)
            if bound is not None:
                found.append(f"{sign} {bound:,}" if isinstance(bound, int) else f"{sign} {bound:g}")
        if getattr(item, "min_length", None):
            found.append("not empty")
    return ", ".join(found)


def _text(text: str) -> str:
    """A docstring as one line of Markdown."""
    plain = " ".join((text or "").split()).replace("``", "`")
    return re.sub(r"(?<!`)`(\w+)`(?!`)", r"`\1`", plain)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _table(section: Section, links: dict[type[BaseModel], str]) -> list[str]:
    rows = []
    for name, field in section.model.model_fields.items():
        if section.inherited is not None and name in section.inherited.model_fields:
            continue
        registry = next((item for item in field.metadata if isinstance(item, Registry)), None)
        kind = f"a [{registry.kind}](#{_REGISTRIES[registry]})" if registry else _type(field.annotation, links)
        bounds = _bounds(field)
        kind = f"{kind}, {bounds}" if bounds else kind
        default = "**required**" if name == "type" and section.typed else _default(field)
        key = field.alias or name
        rows.append(f"| `{key}` | {_cell(kind)} | {_cell(default)} | {_cell(_text(field.description or ''))} |")
    if not rows:
        return ["Nothing of its own to set."]
    return ["| key | value | default | |", "| --- | --- | --- | --- |", *rows]


def reference() -> str:
    """The whole reference as Markdown."""
    found = sections()
    links = {section.model: section.anchor for section in found}
    lines: list[str] = []
    groups = {"Source": "Sources", "Every": "Models", "Objective": "Objectives"}
    opened: set[str] = set()
    for section in found:
        head = section.title.split()[0]
        if section.level == 3 and head in groups and head not in opened:
            opened.add(head)
            lines += [f"### {groups[head]}", ""]
        level = 4 if head in ("Source", "Every", "Model", "Objective") and section.level == 3 else section.level
        lines += [f"{'#' * level} {section.title}", "", _text(section.model.__doc__ or ""), ""]
        lines += [*_table(section, links), ""]
    return "\n".join(lines)


def file_reference(top: type[BaseModel]) -> str:
    """The reference of a command's own file as Markdown."""
    found = file_sections(top)
    links = {section.model: section.anchor for section in found}
    lines: list[str] = []
    for section in found:
        lines += [f"### {section.title}", "", _text(section.model.__doc__ or ""), "", *_table(section, links), ""]
    return "\n".join(lines)


def augment_reference() -> str:
    """The reference of the file of ``rayfm augment``."""
    return file_reference(AugmentConfig)


def nearline_reference() -> str:
    """The reference of the file of ``rayfm nearline``."""
    return file_reference(NearLineConfig)


def metrics_reference() -> str:
    """The table of exported metrics as Markdown."""
    lines = ["| metric | type | unit | labels | |", "| --- | --- | --- | --- | --- |"]
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        source, _, when = metric.source.partition(": ")
        says = f"{metric.help} *From* [{Path(source).name}](../{source}), {when}."
        lines.append(f"| `{metric.name}` | {metric.kind} | {metric.unit or '-'} | {labels} | {_cell(_text(says))} |")
    return "\n".join([*lines, ""])


def page(text: str, written: Callable[[], str] = reference) -> str:
    """``text`` with its reference written anew. Raises ValueError where the markers are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the markers {BEGIN!r} and {END!r} are missing")
    return f"{before}{BEGIN}\n\n{written()}\n{END}{after}"


if __name__ == "__main__":
    for path, written in (
        (PAGE, reference),
        (AUGMENT_PAGE, augment_reference),
        (NEARLINE_PAGE, nearline_reference),
        (OPERATIONS_PAGE, metrics_reference),
    ):
        path.write_text(page(path.read_text(), written))
        print(f"wrote {path}")
