"""What a join remembers between two batches: the impressions that something may still refer to, and their feedback.

Impressions keep their features on disk, in one segment per batch that brought them; in memory stands an index of 32
bytes each. Feedback is narrow and stands in memory whole. Both follow from the segments and the watermark alone
(`restore`), so that a batch writes only what it brought, never the whole state again.

Shape letters: N impressions, E events.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayfm.augment.rules import Bool, Int64, Rules
from rayfm.schema import EXAMPLE_ID, TIME

NEVER = -(2**62)
"""The watermark, and what is seen of a stream, before there is any; far from what int64 cannot hold."""

STREAM, EVENT_ID, TASK, VALUE = "stream", "event_id", "task", "value"

GONE = -1
"""In a segment, in place of the task: the event of earlier segments is gone."""

FEEDBACK = pa.schema(
    [
        pa.field(STREAM, pa.int8()),  # position among the config's streams of feedback
        pa.field(EVENT_ID, pa.string()),
        pa.field(EXAMPLE_ID, pa.int64()),
        pa.field(TASK, pa.int8()),  # position among the config's tasks
        pa.field(TIME, pa.int64()),
        pa.field(VALUE, pa.float64()),
    ]
)


@dataclasses.dataclass(frozen=True)
class Index:
    """Where each impression stands, by rising ``example_id``. All ``[N]``."""

    example_id: Int64
    time: Int64
    segment: Int64
    row: Int64

    def __len__(self) -> int:
        return len(self.example_id)

    @classmethod
    def empty(cls) -> Index:
        """An index of nothing."""
        return cls(*(np.zeros(0, np.int64) for _ in range(4)))

    @classmethod
    def of(cls, segment: int, impressions: pa.Table) -> Index:
        """The index of one segment's rows."""
        return cls.of_all({segment: impressions})

    @classmethod
    def of_all(cls, segments: Mapping[int, pa.Table]) -> Index:
        """The index of all segments' rows, sorted once; rows of one id by rising segment."""
        if not segments:
            return cls.empty()
        numbers = sorted(segments)
        sizes = [segments[number].num_rows for number in numbers]
        ids, times = (
            np.concatenate([segments[number][name].to_numpy() for number in numbers]) for name in (EXAMPLE_ID, TIME)
        )
        index = cls(ids, times, np.repeat(numbers, sizes), np.concatenate([np.arange(size) for size in sizes]))
        return index.take(np.argsort(ids, kind="stable"))

    def take(self, rows: Int64 | Bool) -> Index:
        """Some of the rows."""
        return Index(self.example_id[rows], self.time[rows], self.segment[rows], self.row[rows])

    def merge(self, other: Index) -> tuple[Index, Bool]:
        """Both, and which rows came from ``other``."""
        joined = Index(
            *(
                np.concatenate([getattr(self, field.name), getattr(other, field.name)])
                for field in dataclasses.fields(self)
            )
        )
        order = np.argsort(joined.example_id, kind="stable")
        return joined.take(order), order >= len(self)

    def find(self, ids: Int64) -> Int64:
        """The position of each id, -1 where it is not there: ``[E] -> [E]``."""
        if not len(self):
            return np.full(len(ids), -1, np.int64)
        place = np.minimum(np.searchsorted(self.example_id, ids), len(self) - 1)
        return np.where(self.example_id[place] == ids, place, -1)


@dataclasses.dataclass(frozen=True)
class State:
    """Between two batches."""

    index: Index
    feedback: pa.Table
    """As `FEEDBACK`: events of the index's impressions, and events that wait for theirs."""

    seen: Mapping[str, int]
    """By stream: its newest event time."""

    watermark: int

    @classmethod
    def empty(cls) -> State:
        """Before the first batch."""
        return cls(Index.empty(), FEEDBACK.empty_table(), {}, NEVER)

    @property
    def rows(self) -> int:
        """Impressions and events."""
        return len(self.index) + int(self.feedback.num_rows)


def advance(rules: Rules, watermark: int, seen: Mapping[str, int], through: int = NEVER) -> int:
    """The watermark: every row of every stream with an earlier event time has come, but for late ones.

    It is the least, over the streams, of the newest event time less the stream's disorder; a stream of which nothing
    came yet holds it back. It never falls, and is at least ``through``.
    """
    if any(stream not in seen for stream in rules.disorder_us):
        return max(watermark, through)
    return max(watermark, through, min(seen[stream] - slack for stream, slack in rules.disorder_us.items()))


def remembered(rules: Rules, times_N: Int64, watermark: int) -> Bool:
    """Which impressions something may still refer to: ``[N]``."""
    return times_N + rules.memory_us >= watermark


def outlasted(rules: Rules, times_E: Int64, watermark: int) -> Bool:
    """Which events can get no impression any more: it would be too late itself, or come after them. ``[E]``."""
    return times_E + rules.before_us < watermark - rules.lateness_us


def in_window(rules: Rules, lag_E: Int64, tasks_E: Int64) -> Bool:
    """Which events lie in their task's window, ``lag_E`` microseconds after their impression: ``[E]``."""
    return (lag_E >= -rules.before_us) & (lag_E < rules.windows_T[tasks_E])


def restore(
    rules: Rules,
    impressions: Mapping[int, pa.Table],
    feedback: Mapping[int, pa.Table],
    seen: Mapping[str, int],
    watermark: int,
) -> State:
    """The state after the batch that left these segments and this watermark.

    Args:
        rules: the join's.
        impressions: number of the segment -> the rows that the batch of this number brought.
        feedback: the same, as `FEEDBACK`.
        seen, watermark: after the newest batch.
    """
    index = Index.of_all(impressions)
    index = index.take(remembered(rules, index.time, watermark))
    events = _standing(feedback)
    place = index.find(events[EXAMPLE_ID].to_numpy())
    times = events[TIME].to_numpy()
    known = place >= 0
    lag = times - (index.time[place] if len(index) else 0)
    keep = np.where(
        known, in_window(rules, lag, events[TASK].to_numpy().astype(np.int64)), ~outlasted(rules, times, watermark)
    )
    return State(index, events.filter(pa.array(keep)).combine_chunks(), dict(seen), watermark)


def _standing(feedback: Mapping[int, pa.Table]) -> pa.Table:
    """The segments' events, without those that a later segment says are gone."""
    events = FEEDBACK.empty_table()
    for segment in sorted(feedback):
        table = feedback[segment]
        gone = table[TASK].to_numpy() == GONE
        if gone.any():
            left, right = _keys(events), _keys(table.filter(pa.array(gone)))
            events = events.filter(pc.invert(pc.is_in(left, value_set=right)))
        events = pa.concat_tables([events, table.filter(pa.array(~gone))])
    return events


def _keys(events: pa.Table) -> pa.Array:
    """Each event's stream and id as one text."""
    streams = events[STREAM].cast(pa.string())
    return pc.binary_join_element_wise(streams, events[EVENT_ID], "/").combine_chunks()
