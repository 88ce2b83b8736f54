"""Widths: the types of the config fields that ``scale`` multiplies."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field


class Scaled:
    """Marks a config field as a width: a size that grows with a model's scale."""


SCALED = Scaled()

Width = Annotated[int, Field(gt=0), SCALED]
"""A number of units, heads or factors. ``Field(multiple_of=...)`` is kept when it is scaled."""
OptionalWidth = Annotated[int | None, Field(gt=0), SCALED]
"""A width, or None where what it is the width of may be left out."""
Widths = Annotated[tuple[Annotated[int, Field(gt=0)], ...], SCALED]
"""Units of each layer of a stack."""
