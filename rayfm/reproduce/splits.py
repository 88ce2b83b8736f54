"""How the days of a source are used: the ExFM split and progressive validation.

ExFM section 4.1.1: the teacher is trained on four days and labels the fifth; the student is trained on the fifth and
tested on the sixth; then everything slides by a day, three times.
"""

from __future__ import annotations

from rayfm.config import ConfigError
from rayfm.reproduce.scope import Mapping, Scope

TEACHER_DAYS = 4
SLIDES = 3


def exfm_slides(scope: Scope) -> list[Mapping]:
    """Schedules of the slides, over the source's last eight days: one a slide (one alone in a quick run).

    Raises:
        ConfigError: the source has too few periods.
    """
    slides = 1 if scope.quick else SLIDES
    needed = TEACHER_DAYS + 1 + slides
    if len(scope.periods) < needed:
        raise ConfigError(f"{scope.source}: the ExFM split needs {needed} periods, and it has {len(scope.periods)}")
    return [_split(scope, len(scope.periods) - needed + slide) for slide in range(slides)]


def exfm_warmup(scope: Scope) -> Mapping | None:
    """The same split on the source's first days, for choices; None where it would reach into the test days, and in a
    quick run."""
    if scope.quick:
        return None
    first_test = len(scope.periods) - SLIDES
    return _split(scope, 0) if first_test - 1 > TEACHER_DAYS + 1 else None


def _split(scope: Scope, start: int) -> Mapping:
    days = scope.periods[start : start + TEACHER_DAYS + 2]
    return {
        "first": days[0],
        "last": days[-1],
        "warmup": len(days) - 1,
        "teachers_through": days[TEACHER_DAYS - 1],
        "students_from": days[TEACHER_DAYS],
        "students_through": days[TEACHER_DAYS],
    }


def progressive(scope: Scope) -> Mapping:
    """Progressive validation over all days: the first three sevenths are warm-up."""
    periods = scope.periods[:5] if scope.quick else scope.periods
    return {"last": periods[-1], "warmup": max(2, (3 * len(periods)) // 7)}
