"""Random streams of impressions and feedback, and slow references for their join: row by row, in plain Python."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa

from rayfm.augment.config import JoinConfig
from rayfm.augment.rules import Rules
from rayfm.augment.state import FEEDBACK, NEVER, State
from rayfm.augment.step import step

S = 1_000_000
START = 1_700_000_000 * S
STREAMS = ("clicks", "other")
TASKS = {
    "click": {"window": "10s"},
    "buy": {"window": "40s"},
    "longest": {"window": "20s", "label": "max", "default": None},
    "spent": {"window": "30s", "label": "sum"},
    "rating": {"window": "15s", "label": "last", "default": -1.0},
}


def join_config(root: Any = "unused", **changes: Any) -> JoinConfig:
    """Windows, disorder and lateness of seconds."""
    data: dict[str, Any] = {
        "root": str(root),
        "impressions": {"path": f"{root}/logs/impressions", "disorder": "4s"},
        "feedback": {
            "clicks": {"path": f"{root}/logs/clicks", "disorder": "8s", "task": "click"},
            "other": {"path": f"{root}/logs/other", "disorder": "6s", "value": "value"},
        },
        "tasks": TASKS,
        "lateness": "15s",
        "before": "2s",
        "period": "1h",
    }
    return JoinConfig.model_validate(data | changes)


@dataclasses.dataclass(frozen=True)
class Event:
    stream: int
    event_id: str
    example_id: int
    task: int
    time: int
    value: float


@dataclasses.dataclass
class Streams:
    """Rows in the order of their arrival, stream by stream: impressions are (id, time)."""

    impressions: list[tuple[int, int]]
    events: list[list[Event]]


def random_streams(seed: int, late_s: float = 0.0, impressions: int = 40, wild: bool = False) -> Streams:
    """Streams whose rows come at most the stream's disorder and ``late_s`` seconds behind its newest time.

    Args:
        late_s: seconds of lateness beyond the disorder.
        wild: also rows of any lateness, and feedback without an impression.
    """
    rng = np.random.default_rng(seed)
    span = int(rng.integers(40, 200))
    ids = rng.permutation(impressions * 3)[:impressions]
    times = START + rng.integers(0, span, impressions) * S  # whole seconds: bounds are met exactly, again and again
    rows = list(zip(ids.tolist(), times.tolist(), strict=True))
    events: list[list[Event]] = [[], []]
    number = 0
    for example, time in rows:
        for _ in range(int(rng.integers(0, 5))):
            task = int(rng.integers(len(TASKS)))
            stream = 0 if task == 0 and rng.random() < 0.7 else 1
            lag = int(rng.integers(-4, 45)) * S
            value = float(np.float32(rng.normal())) if task > 1 else 0.0
            events[stream].append(Event(stream, f"e{number}", example, task, time + lag, value))
            number += 1
    if wild:
        for _ in range(10):
            time = START + int(rng.integers(0, span)) * S
            events[1].append(Event(1, f"e{number}", int(10_000 + rng.integers(5)), int(rng.integers(5)), time, 1.0))
            number += 1

    def arrive(items: list[Any], time_of: Any, disorder_s: float) -> list[Any]:
        doubled = items + [items[k] for k in rng.integers(0, len(items), len(items) // 5)] if items else []
        most = 60 if wild else disorder_s + late_s
        keys = [time_of(item) + float(rng.uniform(0, most)) * S for item in doubled]
        return [doubled[k] for k in np.argsort(keys, kind="stable")]

    return Streams(
        arrive(rows, lambda row: row[1], 4),
        [arrive(events[0], lambda event: event.time, 8), arrive(events[1], lambda event: event.time, 6)],
    )


def micro_batches(streams: Streams, seed: int) -> list[tuple[list[tuple[int, int]], list[list[Event]]]]:
    """The streams cut into batches at random, each stream at its own pace."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 12))

    def cut(items: list[Any]) -> list[list[Any]]:
        edges = np.sort(rng.integers(0, len(items) + 1, count - 1))
        return [items[a:b] for a, b in zip([0, *edges], [*edges, len(items)], strict=True)]

    return list(zip(cut(streams.impressions), map(list, zip(*map(cut, streams.events), strict=True)), strict=True))


def impression_table(rows: list[tuple[int, int]]) -> pa.Table:
    return pa.table(
        {
            "example_id": pa.array([row[0] for row in rows], pa.int64()),
            "time": pa.array([row[1] for row in rows], pa.int64()),
        }
    )


def event_table(events: list[Event]) -> pa.Table:
    return pa.table({name: [getattr(event, name) for event in events] for name in FEEDBACK.names}, schema=FEEDBACK)


class FastJoin:
    """`step` by `step`, everything kept."""

    def __init__(self, config: JoinConfig) -> None:
        self.rules, self.state, self.batch = Rules.of(config), State.empty(), 0
        self.written: list[tuple[str | None, int, int, tuple[float | None, ...]]] = []
        self.corrections: list[tuple[int, str, float | None, float | None]] = []
        self.rejected: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()

    def process(self, impressions: list[Any], events: list[list[Event]], through: int = NEVER) -> None:
        self.batch += 1
        newest = {}
        if impressions:
            newest["impressions"] = max(row[1] for row in impressions)
        for name, rows in zip(STREAMS, events, strict=True):
            if rows:
                newest[name] = max(event.time for event in rows)
        flat = [event for rows in events for event in rows]
        done = step(
            self.rules, self.state, self.batch, impression_table(impressions), event_table(flat), newest, through
        )
        for part in done.closed:
            labels = zip(*(column.to_pylist() for column in part.labels), strict=True)
            for example, time, row in zip(
                part.index.example_id.tolist(), part.index.time.tolist(), labels, strict=True
            ):
                self.written.append((part.group.name, example, time, row))
        self.corrections += [
            (row["example_id"], row["task"], row["label"], row["previous"]) for row in done.corrections.to_pylist()
        ]
        self.rejected.update(done.rejected["reason"].to_pylist())
        self.rejected.update(done.late_impressions["reason"].to_pylist())
        sums = {key: value for key, value in done.counts.items() if key not in ("open", "waiting", "state_rows")}
        self.counts.update(sums)
        self.state, self.accepted, self.events = done.state, done.accepted, done.events


def slow_label(rules: Rules, task: int, events: list[Event]) -> float | None:
    """The label that these events of one (example, task) make."""
    if not events:
        return rules.defaults[task]
    values = [event.value for event in sorted(events, key=lambda e: (e.time, e.stream, e.event_id))]
    made = {"any": 1.0, "max": max(values), "last": values[-1]}
    total = 0.0
    for value in values:
        total += value
    return float(np.float32(made.get(rules.labels[task], total)))


def fits(rules: Rules, time: int, event: Event) -> bool:
    return -rules.before_us <= event.time - time < int(rules.windows_T[event.task])


def whole_log_labels(rules: Rules, streams: Streams) -> dict[int, tuple[int, tuple[float | None, ...]]]:
    """What a join of the complete log says: example -> (time, labels)."""
    times: dict[int, int] = {}
    for example, time in streams.impressions:
        times.setdefault(example, time)
    unique = {(event.stream, event.event_id): event for rows in streams.events for event in rows}
    found = {}
    for example, time in times.items():
        labels = []
        for task in range(len(rules.tasks)):
            mine = [e for e in unique.values() if e.example_id == example and e.task == task and fits(rules, time, e)]
            labels.append(slow_label(rules, task, mine))
        found[example] = (time, tuple(labels))
    return found


class SlowJoin:
    """The join's rules, batch by batch and row by row, for streams of any lateness."""

    def __init__(self, config: JoinConfig) -> None:
        self.rules = Rules.of(config)
        self.times: dict[int, int] = {}
        self.done: set[tuple[int, int]] = set()
        self.events: dict[tuple[int, str], Event] = {}
        self.seen: dict[str, int] = {}
        self.watermark = NEVER
        self.written: list[tuple[str | None, int, int, tuple[float | None, ...]]] = []
        self.corrections: list[tuple[int, str, float | None, float | None]] = []
        self.rejected: Counter[str] = Counter()
        self.duplicates = 0

    def labels_of(self, example: int, task: int) -> float | None:
        mine = [event for event in self.events.values() if (event.example_id, event.task) == (example, task)]
        return slow_label(self.rules, task, mine)

    def process(self, impressions: list[Any], events: list[list[Event]], through: int = NEVER) -> None:
        rules, before = self.rules, self.watermark
        new, held = set(), set(self.events)
        for example, time in impressions:
            self.seen["impressions"] = max(self.seen.get("impressions", NEVER), time)
            if example in self.times or example in new:
                self.duplicates += 1
            elif time < before - rules.lateness_us:
                self.rejected["impression later than the lateness allows"] += 1
                new.add(example)  # its twin in this batch is a duplicate, whatever became of it
                continue
            else:
                self.times[example] = time
            new.add(example)
        for key, event in list(self.events.items()):
            if event.example_id in new and event.example_id in self.times:
                self._misfit(key, event)
        ids: set[tuple[int, str]] = set()
        touched: dict[tuple[int, int], float | None] = {}
        for event in (event for rows in events for event in rows):
            stream = STREAMS[event.stream]
            self.seen[stream] = max(self.seen.get(stream, NEVER), event.time)
            key = (event.stream, event.event_id)
            if key in ids or key in held:
                self.duplicates += 1
                continue
            ids.add(key)
            time = self.times.get(event.example_id)
            if time is None:
                if event.time + rules.before_us < before - rules.lateness_us:
                    self.rejected["late: older than the lateness allows, and no impression known"] += 1
                    continue
            elif self._misfit(key, event):
                continue
            elif (event.example_id, int(rules.group_of_T[event.task])) in self.done:
                if not rules.correct:
                    self.rejected["late: the example is written"] += 1
                    continue
                pair = (event.example_id, event.task)
                if pair not in touched:
                    touched[pair] = self.labels_of(*pair)
            self.events[key] = event
        for (example, task), old in touched.items():
            label = self.labels_of(example, task)
            if label != old:
                self.corrections.append((example, rules.tasks[task], label, old))
        self.watermark = max(before, through)
        if len(self.seen) == 3:
            self.watermark = max(
                self.watermark, min(self.seen[stream] - slack for stream, slack in rules.disorder_us.items())
            )
        for place, group in enumerate(rules.groups):
            for example, time in self.times.items():
                if (example, place) not in self.done and time + group.window_us <= self.watermark:
                    self.done.add((example, place))
                    labels = tuple(self.labels_of(example, task) for task in group.tasks)
                    self.written.append((group.name, example, time, labels))
        for key, event in list(self.events.items()):
            gone = event.time + rules.before_us < self.watermark - rules.lateness_us
            if event.example_id not in self.times and gone:
                self.rejected["orphan: no impression came"] += 1
                del self.events[key]
        for example, time in list(self.times.items()):
            if time + rules.memory_us < self.watermark:
                del self.times[example]
                self.events = {key: event for key, event in self.events.items() if event.example_id != example}

    def _misfit(self, key: tuple[int, str], event: Event) -> bool:
        lag = event.time - self.times[event.example_id]
        if fits(self.rules, self.times[event.example_id], event):
            return False
        self.rejected["feedback before its impression" if lag < 0 else "feedback after its window"] += 1
        self.events.pop(key, None)
        return True
