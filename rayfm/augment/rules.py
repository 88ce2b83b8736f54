"""A join's config as numbers: times in microseconds, tasks and groups of tasks by position."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from rayfm.augment.config import IMPRESSIONS, JoinConfig
from rayfm.augment.durations import duration_us

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class Group:
    """Tasks whose labels are written together, once the longest of their windows has closed."""

    name: str | None
    """The task, where it is written alone."""

    tasks: tuple[int, ...]
    window_us: int


@dataclasses.dataclass(frozen=True)
class Rules:
    """Shape letter T: tasks."""

    tasks: tuple[str, ...]
    windows_T: Int64
    labels: tuple[str, ...]
    """How each task's label is made."""

    defaults: tuple[float | None, ...]
    groups: tuple[Group, ...]
    group_of_T: Int64
    correct: bool
    lateness_us: int
    before_us: int
    period_us: int
    disorder_us: dict[str, int]
    """By stream, the impressions first."""

    @property
    def window_us(self) -> int:
        """The longest window."""
        return int(self.windows_T.max())

    @property
    def memory_us(self) -> int:
        """How far behind the watermark an impression can lie that anything may still refer to."""
        return self.window_us + self.lateness_us + self.before_us

    @classmethod
    def of(cls, config: JoinConfig) -> Rules:
        """The rules of a config."""
        windows = [duration_us(task.window) for task in config.tasks.values()]
        groups: tuple[Group, ...]
        if config.emit == "complete":
            groups = (Group(None, tuple(range(len(windows))), max(windows)),)
        else:
            groups = tuple(Group(name, (place,), windows[place]) for place, name in enumerate(config.tasks))
        return cls(
            tasks=tuple(config.tasks),
            windows_T=np.array(windows, np.int64),
            labels=tuple(task.label for task in config.tasks.values()),
            defaults=tuple(task.default for task in config.tasks.values()),
            groups=groups,
            group_of_T=np.array([0 if config.emit == "complete" else place for place in range(len(windows))], np.int64),
            correct=config.late == "correct",
            lateness_us=duration_us(config.lateness),
            before_us=duration_us(config.before),
            period_us=86_400_000_000 if config.period == "1d" else 3_600_000_000,
            disorder_us={
                IMPRESSIONS: duration_us(config.impressions.disorder),
                **{name: duration_us(stream.disorder) for name, stream in config.feedback.items()},
            },
        )
