"""Lengths of time as a config writes them: a number and a unit."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator

_UNITS = {"ms": 1_000, "s": 1_000_000, "m": 60_000_000, "h": 3_600_000_000, "d": 86_400_000_000}
_FORM = re.compile(r"(-?\d+(?:\.\d+)?)(ms|s|m|h|d)")

LONGEST_US = 10 * 365 * _UNITS["d"]


def duration_us(text: str) -> int:
    """Microseconds of ``90s``, ``5m``, ``1.5h``, ``1d``.

    Raises:
        ValueError: it is no number with a unit, is negative, or is beyond ten years.
    """
    match = _FORM.fullmatch(text)
    if match is None:
        raise ValueError("write a number and a unit (ms, s, m, h or d), e.g. 30m")
    length = round(float(match.group(1)) * _UNITS[match.group(2)])
    if length < 0:
        raise ValueError("is negative; write 0s or more")
    if length > LONGEST_US:
        raise ValueError("is longer than ten years; write a shorter one")
    return length


def _duration(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("write a number and a unit (ms, s, m, h or d), e.g. 30m")
    duration_us(value)
    return value


def _positive(value: Any) -> str:
    text = _duration(value)
    if duration_us(text) == 0:
        raise ValueError("is zero: nothing could fall into it; write e.g. 30m")
    return text


Duration = Annotated[str, BeforeValidator(_duration)]
"""0 or more: ``0s``, ``5m``, ``1d``."""

PositiveDuration = Annotated[str, BeforeValidator(_positive)]
"""More than 0."""
