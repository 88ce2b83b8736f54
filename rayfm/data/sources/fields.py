"""Which features and tasks a source has, and its columns in the types that a schema gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import pyarrow as pa

from rayfm.config import ConfigError, nearest
from rayfm.schema import Feature, Schema

Field = Literal["id", "text", "number", "ids", "texts"]
"""What a source has under a feature's name: a whole number, text, a number that is no id, a list of either kind of id.
"""


def check_schema(
    source: str,
    schema: Schema,
    fields: Mapping[str, Field],
    tasks: Mapping[str, Literal["binary", "regression"]],
) -> None:
    """Refuse a schema that asks for what the source does not have.

    Args:
        source: its name in the registry.
        schema: the pipeline's.
        fields: the features that the source has.
        tasks: the tasks that it has.

    Raises:
        ConfigError: a feature or task is unknown or of a kind that does not fit; the message says what to write.
    """
    for feature in schema.features:
        if feature.name not in fields:
            raise ConfigError(f"{source} has no feature {feature.name!r}{nearest(feature.name, list(fields))}")
        field = fields[feature.name]
        if field in ("ids", "texts"):
            if feature.kind not in ("sequence", "multi"):
                raise ConfigError(
                    f"{source}: {feature.name!r} is a list of ids; its kind is sequence, not {feature.kind}"
                )
        elif feature.is_list:
            raise ConfigError(f"{source}: {feature.name!r} is one value, not a list; its kind is not {feature.kind}")
        if field == "number" and feature.kind != "dense":
            raise ConfigError(f"{source}: {feature.name!r} is a number; its kind is dense, not {feature.kind}")
        if field in ("text", "texts") and (feature.kind == "dense" or feature.id_type != "string"):
            raise ConfigError(
                f"{source}: {feature.name!r} is text; write `id_type: string` for it in the schema, with a kind that "
                "has ids"
            )
    for task in schema.tasks:
        if task.name not in tasks:
            raise ConfigError(f"{source} has no task {task.name!r}{nearest(task.name, list(tasks))}")
        if task.kind != tasks[task.name]:
            raise ConfigError(f"{source}: task {task.name!r} is {tasks[task.name]}, not {task.kind}")


def as_feature(column: pa.Array | pa.ChunkedArray, feature: Feature) -> pa.Array | pa.ChunkedArray:
    """A column that `check_schema` let pass, in the type of the example store."""
    target = feature.arrow_type()
    return column if column.type == target else column.cast(target)
