"""One micro-batch: a pure function of the state before it and the rows that came.

Shape letters: N impressions of the state and the batch, E events, M events that stood in the state, T tasks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayfm.augment.arrivals import with_reasons
from rayfm.augment.outcomes import CORRECTIONS, label_columns
from rayfm.augment.periods import period_names
from rayfm.augment.rules import Bool, Group, Int64, Rules
from rayfm.augment.state import (
    EVENT_ID,
    FEEDBACK,
    GONE,
    NEVER,
    STREAM,
    TASK,
    Index,
    State,
    advance,
    in_window,
    outlasted,
    remembered,
)
from rayfm.data.validate import REASON
from rayfm.schema import EXAMPLE_ID, TIME

Values = TypeVar("Values", Int64, Bool)

LATE_IMPRESSION = "impression later than the lateness allows"
BEFORE_IMPRESSION = "feedback before its impression"
AFTER_WINDOW = "feedback after its window"
LATE = "late: the example is written"
TOO_LATE = "late: older than the lateness allows, and no impression known"
ORPHAN = "orphan: no impression came"


@dataclasses.dataclass(frozen=True)
class Closed:
    """Examples whose windows closed in this batch, by rising (time, example_id)."""

    group: Group
    index: Index
    labels: list[pa.Array]
    """For each of the group's tasks, float32."""


@dataclasses.dataclass(frozen=True)
class Step:
    """What a batch did."""

    state: State
    accepted: pa.Table
    """The batch's impressions that were taken: the new segment."""

    events: pa.Table
    """What the batch changed of the state's feedback: the new segment, as `FEEDBACK`. Events that came and are kept;
    with task `GONE`, events that waited and were rejected once their impression was there."""

    closed: list[Closed]
    corrections: pa.Table
    """As `CORRECTIONS`."""

    late_impressions: pa.Table
    """As they came, with a reason."""

    rejected: pa.Table
    """Feedback, as `FEEDBACK`, with a reason."""

    counts: dict[str, int]


def step(
    rules: Rules,
    state: State,
    batch: int,
    impressions: pa.Table,
    feedback: pa.Table,
    newest: Mapping[str, int],
    through: int = NEVER,
) -> Step:
    """Take in a batch.

    Args:
        rules: the join's.
        state: before the batch.
        batch: its number, which its impressions' segment gets.
        impressions: ``example_id`` and ``time`` (int64, no nulls), and whatever else they have.
        feedback: as `FEEDBACK`, no nulls.
        newest: by stream, the newest event time of the batch.
        through: every row of an earlier time has come, says whoever knows.
    """
    before = state.watermark
    accepted, late_impressions, doubled = _take_impressions(rules, state, impressions)
    index, is_new = state.index.merge(Index.of(batch, accepted))
    fresh, doubled_events = _drop_known(state, feedback)

    # Events that waited may have got their impression.
    waiting = state.feedback
    place_M = index.find(waiting[EXAMPLE_ID].to_numpy())
    lag_M = waiting[TIME].to_numpy() - _at(index.time, place_M)
    met_M = (place_M >= 0) & _at(is_new, place_M)
    misfit_M = met_M & ~in_window(rules, lag_M, _tasks(waiting))
    early_M = misfit_M & (lag_M < 0)

    place_E = index.find(fresh[EXAMPLE_ID].to_numpy())
    times_E, tasks_E = fresh[TIME].to_numpy(), _tasks(fresh)
    lag_E = times_E - _at(index.time, place_E)
    known_E = place_E >= 0
    fits_E = in_window(rules, lag_E, tasks_E)
    misfit_E = known_E & ~fits_E
    early_E = misfit_E & (lag_E < 0)
    windows_E = np.array([group.window_us for group in rules.groups], np.int64)[rules.group_of_T[tasks_E]]
    written_E = known_E & fits_E & ~_at(is_new, place_E) & (_at(index.time, place_E) + windows_E <= before)
    too_late_E = ~known_E & outlasted(rules, times_E, before)
    keep_E = ~misfit_E & ~too_late_E
    if not rules.correct:
        keep_E &= ~written_E

    corrections = CORRECTIONS.empty_table()
    kept = fresh.filter(pa.array(keep_E))
    if rules.correct and written_E.any():
        corrections = _corrections(rules, index, waiting, kept, fresh.filter(pa.array(written_E)))
    events = pa.concat_tables([waiting.filter(pa.array(~misfit_M)), kept])
    came = np.arange(events.num_rows) >= events.num_rows - kept.num_rows

    seen = {stream: max(state.seen.get(stream, NEVER), newest.get(stream, NEVER)) for stream in {*state.seen, *newest}}
    watermark = advance(rules, before, seen, through)
    closed = [_close(rules, group, index, is_new, events, before, watermark) for group in rules.groups]

    place = np.concatenate([place_M[~misfit_M], place_E[keep_E]])
    orphan = (place < 0) & outlasted(rules, events[TIME].to_numpy(), watermark)
    alive = remembered(rules, index.time, watermark)
    stays = np.where(place >= 0, _at(alive, place), ~orphan)

    rejected = [
        _with_reason(waiting.filter(pa.array(early_M)), BEFORE_IMPRESSION),
        _with_reason(waiting.filter(pa.array(misfit_M & ~early_M)), AFTER_WINDOW),
        _with_reason(fresh.filter(pa.array(early_E)), BEFORE_IMPRESSION),
        _with_reason(fresh.filter(pa.array(misfit_E & ~early_E)), AFTER_WINDOW),
        _with_reason(fresh.filter(pa.array(too_late_E)), TOO_LATE),
        _with_reason(events.filter(pa.array(orphan)), ORPHAN),
    ]
    dropped = 0
    if not rules.correct:
        rejected.append(_with_reason(fresh.filter(pa.array(written_E)), LATE))
        dropped = int(written_E.sum())
    after = State(index.take(alive), events.filter(pa.array(stays)).combine_chunks(), seen, watermark)
    return Step(
        state=after,
        accepted=accepted,
        events=pa.concat_tables(
            [events.filter(pa.array(stays & came)), _gone(waiting.filter(pa.array(misfit_M)))]
        ).combine_chunks(),
        closed=closed,
        corrections=corrections,
        late_impressions=late_impressions,
        rejected=pa.concat_tables(rejected).sort_by(
            [(name, "ascending") for name in (TIME, STREAM, EVENT_ID, EXAMPLE_ID, TASK)]
        ),
        counts={
            "joined": sum(len(part.index) for part in closed),
            "late_dropped": dropped + int(too_late_E.sum()),
            "corrections": corrections.num_rows,
            "duplicate_impressions": doubled,
            "duplicate_events": doubled_events,
            "orphans": int(orphan.sum()),
            "late_impressions": late_impressions.num_rows,
            "before_impression": int(early_M.sum() + early_E.sum()),
            "after_window": int(misfit_M.sum() + misfit_E.sum() - early_M.sum() - early_E.sum()),
            "open": int((after.index.time + rules.window_us > watermark).sum()),
            "waiting": int((place[stays] < 0).sum()),
            "state_rows": after.rows,
        },
    )


def _take_impressions(rules: Rules, state: State, impressions: pa.Table) -> tuple[pa.Table, pa.Table, int]:
    """The impressions to keep, those that come too late (with a reason), and the number of doubled ones."""
    ids, times = impressions[EXAMPLE_ID].to_numpy(), impressions[TIME].to_numpy()
    first = first_of(ids) & (state.index.find(ids) < 0)
    late = first & (times < state.watermark - rules.lateness_us)
    return (
        impressions.filter(pa.array(first & ~late)).combine_chunks(),
        _with_reason(impressions.filter(pa.array(late)), LATE_IMPRESSION),
        int((~first).sum()),
    )


def _drop_known(state: State, feedback: pa.Table) -> tuple[pa.Table, int]:
    """Events that neither the state nor an earlier row of the batch has, and the number of the others."""
    keep = np.ones(feedback.num_rows, np.bool_)
    streams, held = feedback[STREAM].to_numpy(), state.feedback[STREAM].to_numpy()
    for stream in np.unique(streams):
        rows = np.flatnonzero(streams == stream)
        ids = feedback[EVENT_ID].take(pa.array(rows)).combine_chunks()
        known = pc.is_in(ids, value_set=state.feedback[EVENT_ID].filter(pa.array(held == stream)).combine_chunks())
        codes = ids.dictionary_encode().indices.to_numpy(zero_copy_only=False).astype(np.int64)
        keep[rows] = first_of(codes) & ~known.to_numpy(zero_copy_only=False)
    return feedback.filter(pa.array(keep)), int((~keep).sum())


def first_of(values: Int64) -> Bool:
    """Which rows hold their value for the first time: ``[n] -> [n]``."""
    first = np.zeros(len(values), np.bool_)
    first[np.unique(values, return_index=True)[1]] = True
    return first


def _close(
    rules: Rules, group: Group, index: Index, is_new_N: Bool, events: pa.Table, before: int, watermark: int
) -> Closed:
    """The group's examples whose windows closed between two watermarks, or, of late impressions, before both."""
    ends_N = index.time + group.window_us
    closing = index.take((ends_N <= watermark) & (is_new_N | (ends_N > before)))
    closing = closing.take(np.lexsort((closing.example_id, closing.time)))
    return Closed(group, closing, label_columns(rules, group.tasks, closing.example_id, events))


def _corrections(rules: Rules, index: Index, waiting: pa.Table, kept: pa.Table, late: pa.Table) -> pa.Table:
    """One record for each (example, task) whose written label the late events change."""
    touched = np.unique(late[EXAMPLE_ID].to_numpy())
    place = index.find(touched)
    every = tuple(range(len(rules.tasks)))
    old = label_columns(rules, every, touched, waiting)
    new = label_columns(rules, every, touched, pa.concat_tables([waiting, kept]))
    late_ids, late_tasks = late[EXAMPLE_ID].to_numpy(), _tasks(late)
    parts = [CORRECTIONS.empty_table()]
    for task, name in enumerate(rules.tasks):
        changed = pc.not_equal(pc.fill_null(old[task], np.inf), pc.fill_null(new[task], np.inf))
        mine = np.isin(touched, late_ids[late_tasks == task]) & changed.to_numpy(zero_copy_only=False)
        times = index.time[place[mine]]
        parts.append(
            pa.Table.from_arrays(
                [
                    pa.array(touched[mine]),
                    pa.array(times),
                    period_names(times, rules.period_us),
                    pa.repeat(name, int(mine.sum())).cast(pa.string()),
                    new[task].filter(pa.array(mine)),
                    old[task].filter(pa.array(mine)),
                ],
                schema=CORRECTIONS,
            )
        )
    return pa.concat_tables(parts).sort_by([(name, "ascending") for name in (TIME, EXAMPLE_ID, TASK)])


def _gone(events: pa.Table) -> pa.Table:
    column = pa.array(np.full(events.num_rows, GONE, np.int8))
    return events.set_column(events.column_names.index(TASK), FEEDBACK.field(TASK), column)


def _tasks(events: pa.Table) -> Int64:
    tasks: Int64 = events[TASK].to_numpy().astype(np.int64)
    return tasks


def _at(values: Values, place: Int64) -> Values:
    """``values[place]``; anything where the place is -1."""
    return values[place] if len(values) else np.zeros(len(place), values.dtype)


def _with_reason(table: pa.Table, reason: str) -> pa.Table:
    return with_reasons(table, pa.array([reason] * table.num_rows, pa.string()))


REJECTED = FEEDBACK.append(pa.field(REASON, pa.string()))
"""Columns of rejected feedback."""
