"""The join against slow references, whatever the micro-batches."""

from __future__ import annotations

from feedback_streams import (
    START,
    FastJoin,
    S,
    SlowJoin,
    Streams,
    join_config,
    micro_batches,
    random_streams,
    whole_log_labels,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from rayfm.augment.rules import Rules
from rayfm.augment.state import restore

SEEDS = st.integers(0, 2**32 - 1)
FAR = START + 10_000 * S
EMITS = st.sampled_from(["complete", "per_task"])


def play(join: FastJoin | SlowJoin, streams: Streams, seed: int) -> None:
    for impressions, events in micro_batches(streams, seed):
        join.process(impressions, events)
    join.process([], [[], []], FAR)


@settings(max_examples=40, deadline=None)
@given(SEEDS, SEEDS, EMITS)
def test_disorder_within_bounds_gives_the_labels_of_the_whole_log(seed, cuts, emit):
    streams = random_streams(seed)
    join = FastJoin(join_config(emit=emit))
    play(join, streams, cuts)
    wanted = whole_log_labels(join.rules, streams)
    if emit == "complete":
        assert sorted(join.written) == sorted((None, key, *value) for key, value in wanted.items())
    else:
        assert sorted(join.written) == sorted(
            (task, key, time, (labels[place],))
            for key, (time, labels) in wanted.items()
            for place, task in enumerate(join.rules.tasks)
        )
    assert join.counts["late_dropped"] == join.counts["late_impressions"] == join.counts["corrections"] == 0
    assert join.state.rows == 0, "all of it is over"


@settings(max_examples=40, deadline=None)
@given(SEEDS, SEEDS, EMITS)
def test_lateness_within_bounds_is_corrected_to_the_labels_of_the_whole_log(seed, cuts, emit):
    streams = random_streams(seed, late_s=15)
    join = FastJoin(join_config(late="correct", emit=emit))
    play(join, streams, cuts)
    wanted = whole_log_labels(join.rules, streams)
    labels: dict[int, dict[str, float | None]] = {}
    groups = {group.name: group for group in join.rules.groups}
    for group, example, _, row in join.written:
        names = [join.rules.tasks[task] for task in groups[group].tasks]
        assert not labels.get(example, {}).keys() & set(names), "an example is written once"
        labels.setdefault(example, {}).update(zip(names, row, strict=True))
    for example, task, label, previous in join.corrections:
        assert labels[example][task] == previous
        labels[example][task] = label
    assert labels == {key: dict(zip(join.rules.tasks, row, strict=True)) for key, (_, row) in wanted.items()}
    assert join.counts["late_dropped"] == join.counts["late_impressions"] == 0


@settings(max_examples=80, deadline=None)
@given(SEEDS, SEEDS, EMITS, st.sampled_from(["drop", "correct"]))
def test_streams_of_any_lateness_are_joined_as_the_slow_rules_say(seed, cuts, emit, late):
    streams = random_streams(seed, wild=True)
    config = join_config(emit=emit, late=late)
    fast, slow = FastJoin(config), SlowJoin(config)
    for impressions, events in [*micro_batches(streams, cuts), ([], [[], []])]:
        fast.process(impressions, events)
        slow.process(impressions, events)
        assert fast.state.watermark == slow.watermark
        assert set(fast.state.index.example_id.tolist()) == set(slow.times)
        assert set(fast.state.feedback["event_id"].to_pylist()) == {event_id for _, event_id in slow.events}
    assert sorted(fast.written, key=repr) == sorted(slow.written, key=repr)
    assert sorted(fast.corrections) == sorted(slow.corrections)
    assert fast.rejected == slow.rejected
    assert fast.counts["duplicate_impressions"] + fast.counts["duplicate_events"] == slow.duplicates
    assert fast.counts["joined"] == len(fast.written)
    assert fast.counts["orphans"] == slow.rejected["orphan: no impression came"]


@settings(max_examples=40, deadline=None)
@given(SEEDS, SEEDS, st.sampled_from(["drop", "correct"]))
def test_the_state_follows_from_the_segments_and_the_watermark(seed, cuts, late):
    """What a restart restores is what an unbroken run has, after every batch."""
    rules = Rules.of(join_config(late=late))
    join = FastJoin(join_config(late=late))
    segments, feedback = {}, {}
    for impressions, events in micro_batches(random_streams(seed, wild=True), cuts):
        join.process(impressions, events)
        segments[join.batch] = join.accepted
        feedback[join.batch] = join.events
        again = restore(rules, segments, feedback, join.state.seen, join.state.watermark)
        for name in ("example_id", "time", "segment", "row"):
            assert getattr(again.index, name).tolist() == getattr(join.state.index, name).tolist()
        assert again.feedback.equals(join.state.feedback)
