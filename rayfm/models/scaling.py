"""Scale: one number that makes a model larger or smaller, e.g. a teacher twice its student.

Khani et al. (section 3, Table 2) distil from teachers 2x and 4x the size of their student, without saying what is twice
as large. Here it is every width.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, TypeVar

from pydantic import Field
from pydantic.fields import FieldInfo

from rayfm.config import Config

ConfigT = TypeVar("ConfigT", bound=Config)


class Scaled:
    """Marks a config field as a width: a size that grows with a model's scale."""


SCALED = Scaled()

Width = Annotated[int, Field(gt=0), SCALED]
"""A number of units, heads or factors. ``Field(multiple_of=...)`` is kept when it is scaled."""
OptionalWidth = Annotated[int | None, Field(gt=0), SCALED]
"""A width, or None where what it is the width of may be left out."""
Widths = Annotated[tuple[Annotated[int, Field(gt=0)], ...], SCALED]
"""Units of each layer of a stack."""


def scaled(config: ConfigT) -> ConfigT:
    """``config`` with every width multiplied by its ``scale``, and a scale of 1.

    A width is a field of type ``Width``, ``OptionalWidth`` or ``Widths``, here and in the configs below this one. It is
    rounded to the nearest whole number, or the nearest multiple where its field asks for one (``embedding_dim``: 4),
    and never below one such. What is no width stays: numbers of layers, of experts, of attention heads unless a model
    makes them a ``Width``.

    Raises:
        pydantic.ValidationError: the config cannot have the sizes that come out.
    """
    factor: float = vars(config).get("scale", 1.0)
    if factor == 1:
        return config
    return type(config).model_validate({**_times(config, factor), "scale": 1.0})


def times(width: int, factor: float, multiple_of: int = 1) -> int:
    """``width * factor`` as the nearest multiple of ``multiple_of``, at least one; halves go up."""
    return max(1, math.floor(width * factor / multiple_of + 0.5)) * multiple_of


def _times(config: Config, factor: float) -> dict[str, Any]:
    return {
        field.alias or name: _value(getattr(config, name), field, factor)
        for name, field in type(config).model_fields.items()
    }


def _value(value: Any, field: FieldInfo, factor: float) -> Any:
    if isinstance(value, Config):
        return _times(value, factor)
    if value is None or SCALED not in field.metadata:
        return value
    multiple_of = next((item.multiple_of for item in field.metadata if hasattr(item, "multiple_of")), 1)
    if isinstance(value, tuple):
        return tuple(times(width, factor, multiple_of) for width in value)
    return times(value, factor, multiple_of)
