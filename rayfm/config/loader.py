"""YAML in, one strict typed configuration out; every complaint names the key and what to write instead."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from rayfm.config.base import Config
from rayfm.config.errors import ConfigError
from rayfm.config.registry import Registry, nearest

ConfigT = TypeVar("ConfigT", bound=Config)

INCLUDE = "include"
"""Key of a mapping that stands for what a file holds."""


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML takes the last of two equal keys in silence; a config file should not.

    Dates stay strings: a period is named by one.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise ConfigError(f"line {key_node.start_mark.line + 1}: {key!r} cannot be a key; write a name")
            if key in seen:
                raise ConfigError(f"line {key_node.start_mark.line + 1}: key {key!r} stands twice; keep one")
            seen.add(key)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


_UniqueKeyLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Anywhere below it, ``{include: FILE}`` stands for what another YAML file holds, named from this one's folder.

    Raises:
        ConfigError: the file, or one that it includes, is missing or is not YAML; or it is not a mapping.
    """
    data = _parse(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping at the top, found {type(data).__name__}")
    included: dict[str, Any] = _include(data, Path(path).parent)
    return included


def _parse(path: str | Path) -> Any:
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ConfigError(f"cannot read config {path}: {error.strerror}; name an existing YAML file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"cannot read config {path}: it is not text; name a YAML file") from None
    try:
        data = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    except ConfigError as error:
        raise ConfigError(f"{path} {error}") from None
    return data


def _include(value: Any, folder: Path, within: tuple[Path, ...] = ()) -> Any:
    """``value`` with each ``{include: FILE}`` in it replaced by what the YAML file holds: a list, a mapping, a value.

    Args:
        value: a part of a config.
        folder: where relative names start: the folder of the file that includes.
        within: the files that are being included.

    Raises:
        ConfigError: the file cannot be read, or includes itself.
    """
    if isinstance(value, dict) and value.keys() == {INCLUDE} and isinstance(value[INCLUDE], str):
        path = (folder / value[INCLUDE]).resolve()
        if path in within:
            raise ConfigError(f"{path} includes itself; take one 'include' out")
        return _include(_parse(path), path.parent, (*within, path))
    if isinstance(value, dict | list):
        # In place: what stands in a file once, under an anchor, remains one.
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            value[key] = _include(item, folder, within)
    return value


def config_files(path: str | Path) -> list[Path]:
    """A YAML file, and all that it includes, directly or not.

    Raises:
        ConfigError: as `read_yaml`.
    """
    read_yaml(path)  # nothing includes itself

    def included(value: Any, folder: Path) -> list[Path]:
        if isinstance(value, dict) and value.keys() == {INCLUDE} and isinstance(value[INCLUDE], str):
            return config_files_of((folder / value[INCLUDE]).resolve())
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return [file for item in items for file in included(item, folder)]

    def config_files_of(file: Path) -> list[Path]:
        return [file, *included(_parse(file), file.parent)]

    return list(dict.fromkeys(config_files_of(Path(path))))


def apply_override(data: dict[str, Any], assignment: str) -> None:
    """Apply one ``--set a.b.0.c=value`` in place; the value is read as YAML, list items are addressed by position.
    ``--set @FILE`` applies a YAML file of overrides, which is laid over ``data`` key by key (a list replaces a list).

    Raises:
        ConfigError: no ``=``, the value is not YAML, or the path runs through something that is not a mapping or list.
    """
    if assignment.startswith("@"):
        _lay_over(data, read_yaml(assignment[1:]))
        return
    path, separator, text = assignment.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise ConfigError(f"--set {assignment!r}: write it as a.b=value")
    try:
        value = yaml.load(text, Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, ConfigError) as error:
        reason = getattr(error, "problem", None) or error
        raise ConfigError(f"--set {assignment!r}: the value is not valid YAML ({reason})") from None
    set_key(data, path.strip(), _include(value, Path.cwd()), f"--set {assignment!r}")


def set_key(data: dict[str, Any], path: str, value: Any, where: str) -> None:
    """Set the value at a dotted path in place; mappings on the way are made, ``where`` opens each message.

    Raises:
        ConfigError: the path runs through something that is not a mapping or list.
    """
    here: Any = data
    keys = path.split(".")
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        so_far = ".".join(keys[: depth + 1])
        if isinstance(here, list):
            if not key.isdigit() or int(key) >= len(here):
                raise ConfigError(f"{where}: {so_far!r} is not a position in a list of {len(here)}")
            index: Any = int(key)
        elif isinstance(here, dict):
            index = key
            if not last and here.get(key) is None:
                here[key] = {}
        else:
            raise ConfigError(f"{where}: {'.'.join(keys[:depth])!r} is a value, not a mapping")
        if last:
            here[index] = value
        else:
            here = here[index]


def _lay_over(data: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(data.get(key), dict):
            _lay_over(data[key], value)
        else:
            data[key] = value


def validate(cls: type[ConfigT], data: dict[str, Any], origin: str = "config") -> ConfigT:
    """``data`` as a typed ``cls``; ``origin`` (a file name) opens each message.

    Raises:
        ConfigError: with every complaint, one a line, each with its dotted key.
    """
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{origin}: {line}" for line in _explain(cls, error))) from None


def _explain(cls: type[BaseModel], error: ValidationError) -> list[str]:
    lines = []
    for item in error.errors(include_url=False):
        names, fields = _walk(cls, item["loc"])
        key = ".".join(names) or "(top)"
        context = item.get("ctx", {})
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown key {key!r}{nearest(names[-1], fields)}")
        elif item["type"] == "missing":
            lines.append(f"{key!r} is missing; add it")
        elif item["type"] == "union_tag_invalid":
            known = [tag.strip().strip("'") for tag in context["expected_tags"].split(",")]
            lines.append(f"'{key}.type': unknown {context['tag']!r}{nearest(str(context['tag']), known)}")
        elif item["type"] == "union_tag_not_found":
            lines.append(f"{key!r}: needs a 'type' key")
        else:
            message = item["msg"].removeprefix("Value error, ")
            shown = repr(item.get("input"))
            lines.append(f"{key!r}: {message}" + (f" (found {shown})" if len(shown) < 60 else ""))
    return lines


def _walk(cls: type[BaseModel], loc: tuple[str | int, ...]) -> tuple[list[str], list[str]]:
    """The keys of a YAML path for pydantic's ``loc``, and the keys known where its last one stands.

    ``loc`` also holds what is no key in the file: the chosen part's ``type``, the chosen member of a union.
    """
    names: list[str] = []
    known: list[str] = []
    annotation: Any = cls
    metadata: list[Any] = []
    for part in loc:
        annotation, metadata = _without_none(annotation, metadata)
        registry = next((item for item in metadata if isinstance(item, Registry)), None)
        members = get_args(annotation)
        if registry is not None and part in list(registry):
            annotation, metadata = registry[str(part)].Config, []
            continue
        if get_origin(annotation) in (Union, UnionType):
            chosen = [member for member in members if part in (getattr(member, "__name__", None), _tag(member))]
            annotation, metadata = (chosen or [None])[0], []
            continue
        if part == "[key]":
            continue
        names.append(str(part))
        known = []
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            fields = {field.alias or name: field for name, field in annotation.model_fields.items()}
            known = sorted(fields)
            field = fields.get(str(part))
            annotation, metadata = (None, []) if field is None else (field.annotation, list(field.metadata))
        elif get_origin(annotation) is dict:
            annotation, metadata = members[1], []
        elif members:
            fixed = get_origin(annotation) is tuple and Ellipsis not in members and isinstance(part, int)
            annotation, metadata = members[int(part) % len(members) if fixed else 0], []
    return names, known


def _tag(member: Any) -> Any:
    """The ``type`` that chooses a member of a union of configs."""
    field = getattr(member, "model_fields", {}).get("type")
    return None if field is None else field.default


def _without_none(annotation: Any, metadata: list[Any]) -> tuple[Any, list[Any]]:
    """``X`` for ``Annotated[X, ...]``, whose metadata is added, and for ``X | None``."""
    while True:
        if get_origin(annotation) is Annotated:
            annotation, *more = get_args(annotation)
            metadata = [*metadata, *more]
            continue
        others = [member for member in get_args(annotation) if member is not type(None)]
        if get_origin(annotation) in (Union, UnionType) and len(others) == 1:
            annotation = others[0]
            continue
        return annotation, metadata


def write_yaml(config: Config, path: str | Path) -> None:
    """Save a resolved configuration so that reading it back gives an equal one."""
    Path(path).write_text(yaml.safe_dump(config.dump(), sort_keys=False, width=120))
