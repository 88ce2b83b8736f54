"""What a feedback join needs to know: the streams, the tasks with their windows, what happens to what comes late."""

from __future__ import annotations

import datetime
import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from rayfm.augment.durations import Duration, PositiveDuration
from rayfm.augment.views import LabellingConfig
from rayfm.config import Config, apply_override, nearest, read_yaml, validate
from rayfm.data.sources.base import KIND_COLUMN
from rayfm.data.sources.parquet import FromColumn
from rayfm.data.sources.times import TimeColumn
from rayfm.schema import EXAMPLE_ID, RESERVED_COLUMNS, TIME, TRAFFIC

IMPRESSIONS = "impressions"

Name = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]


class StreamConfig(Config):
    """A stream of Parquet files: new ones are read in the order of their paths, each row once."""

    path: str
    """A file, a folder (read with its sub-folders) or a glob; local, or a pyarrow URI such as s3://bucket/logs/*."""

    time: TimeColumn = TimeColumn()
    """The event time: when it happened, not when it was written."""

    disorder: Duration = "5m"
    """How far behind the newest event time of its stream a row may come and still be on time."""


class ImpressionsConfig(StreamConfig):
    """Examples that were shown, with their features; all columns are handed on."""

    example_id: str = EXAMPLE_ID
    """Column of the example id (int64), unique among all impressions; a second row of one id is a duplicate."""


class FeedbackConfig(StreamConfig):
    """What users did with what they were shown: one row an event."""

    event_id: str = "event_id"
    """Column of the event's own id (integers or text); a second row of one id is a duplicate."""

    example_id: str = EXAMPLE_ID
    """Column of the id of the impression that the event belongs to."""

    task: str | FromColumn = FromColumn(column="task")
    """The task that every event of the stream is of, or the column that holds it."""

    value: str | None = None
    """Column of the event's value (seconds watched, money spent), for the tasks that take one."""


class TaskConfig(Config):
    """A task's window, and how the events in it make the label."""

    window: PositiveDuration
    """An event counts if it happened less than this after its impression (ExFM section 3.2: 5 to 90 minutes for clicks,
    1 day for conversions)."""

    label: Literal["any", "max", "sum", "last"] = "any"
    """``any``: 1 where there was an event, for binary tasks; the others take the events' values (``last`` by time)."""

    default: float | None = 0.0
    """The label of an example without an event; null makes it unknown."""

    @model_validator(mode="after")
    def _fits(self) -> TaskConfig:
        if self.default is not None and not math.isfinite(self.default):
            raise ValueError("default is not finite; write a number, or null for an unknown label")
        if self.label == "any" and self.default == 1.0:
            raise ValueError("label any with default 1 makes every label 1; write 0 or null")
        return self


class JoinConfig(Config):
    """A feedback join."""

    root: str
    """The folder that the join owns: state, labelled examples, corrections, rejects, counts."""

    impressions: ImpressionsConfig
    feedback: dict[Name, FeedbackConfig] = Field(min_length=1)
    """The streams of events, by a name of your choice."""

    tasks: dict[Name, TaskConfig] = Field(min_length=1)

    emit: Literal["complete", "per_task"] = "complete"
    """``complete``: an example is written once, when every task's window has closed. ``per_task``: once per task, when
    that task's window has closed, the other tasks null, to a data set of the task's own."""

    late: Literal["drop", "correct"] = "drop"
    """What becomes of feedback for an example that is written already: rejected and counted, or, where it changes the
    label, a correction record."""

    lateness: Duration = "1h"
    """How far behind the watermark an impression is still taken, feedback waits for its impression, and feedback on a
    written example still corrects it."""

    before: Duration = "0s"
    """How long before its impression an event may be timed (clocks that disagree)."""

    period: Literal["1d", "1h"] = "1d"
    """Labelled examples are written by the day or hour of their impression."""

    batch_rows: int = Field(262_144, gt=0)
    """Rows of a micro-batch."""

    max_state_rows: int = Field(20_000_000, gt=0)
    """Impressions and events that may wait at once. More is refused, and the batch is not taken in."""

    @model_validator(mode="after")
    def _consistent(self) -> JoinConfig:
        taken = {EXAMPLE_ID, TIME, TRAFFIC, KIND_COLUMN, *RESERVED_COLUMNS}
        for name in self.tasks:
            if name in taken:
                raise ValueError(f"task {name!r}: the name is reserved; call it otherwise")
        if IMPRESSIONS in self.feedback:
            raise ValueError(f"a stream of feedback cannot be called {IMPRESSIONS!r}; call it otherwise")
        fed: set[str] = set()
        valued: set[str] = set()
        for name, stream in self.feedback.items():
            if isinstance(stream.task, str) and stream.task not in self.tasks:
                raise ValueError(
                    f"feedback.{name}.task: {stream.task!r} is not one of the tasks"
                    f"{nearest(stream.task, list(self.tasks))}"
                )
            of = {stream.task} if isinstance(stream.task, str) else set(self.tasks)
            fed |= of
            valued |= of if stream.value is not None else set()
        for name, task in self.tasks.items():
            if name not in fed:
                raise ValueError(f"no stream of feedback has task {name!r}: its labels would all be its default")
            if task.label != "any" and name not in valued:
                raise ValueError(
                    f"task {name!r}: label {task.label!r} needs values, and no stream of it names a 'value' column"
                )
        return self


class RandomLogsConfig(Config):
    """Random logs to try a join on."""

    seed: int = 0
    start: datetime.datetime = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)
    hours: int = Field(48, gt=0, le=24 * 365)
    impressions_per_hour: int = Field(500, gt=0)


class AugmentConfig(JoinConfig):
    """The file of ``rayfm augment``: a join, and the teachers that label what it writes."""

    labelling: LabellingConfig | None = None
    """Teachers that score each labelled example once, and the students that share them."""

    random_logs: RandomLogsConfig | None = None
    """Write random logs to the streams' paths if nothing is there: to try a config without logs."""

    @model_validator(mode="after")
    def _views_fit(self) -> AugmentConfig:
        if self.labelling is not None:
            if self.emit == "per_task":
                raise ValueError("labelling needs emit: complete, so that an example stands once; remove one of them")
            for name, view in self.labelling.students.items():
                for task in view.tasks or ():
                    if task not in self.tasks:
                        raise ValueError(
                            f"labelling.students.{name}: unknown task {task!r}{nearest(task, list(self.tasks))}"
                        )
        return self


def load_augment(path: str | Path, overrides: list[str] | None = None) -> AugmentConfig:
    """The config in a YAML file with ``--set`` overrides.

    Raises:
        ConfigError: naming each wrong key.
    """
    data = read_yaml(path)
    for override in overrides or []:
        apply_override(data, override)
    return validate(AugmentConfig, data, str(path))
