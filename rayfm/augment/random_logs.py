"""Random logs to try a join on: impressions with a few features, and feedback that depends on them."""

from __future__ import annotations

import datetime
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from rayfm.augment.config import IMPRESSIONS, AugmentConfig, FeedbackConfig, RandomLogsConfig, StreamConfig
from rayfm.augment.durations import duration_us
from rayfm.augment.rules import Int64
from rayfm.config import ConfigError
from rayfm.data.sources.days import HOUR_US
from rayfm.data.sources.times import microseconds
from rayfm.data.staging import disk_errors

TRAFFICS = ("feed", "search", "video")
USERS, ITEMS = 500, 200
RATE = 0.12
"""About how many impressions get an event of a task; of each further task, half as many."""

DOUBLED, LATE, ORPHANED = 0.01, 0.02, 0.005
"""Shares of rows that come twice, that come later than the disorder allows, and of events without an impression."""


def write_random_logs(config: AugmentConfig) -> bool:
    """Write each stream's files, an hour of arrivals each, unless they are there; whether they were written.

    The same config gives the same files.

    Raises:
        ConfigError: some streams have files and others do not, or a path is no local folder.
    """
    logs = config.random_logs
    if logs is None:
        return False
    streams: dict[str, StreamConfig] = {IMPRESSIONS: config.impressions, **config.feedback}
    for name, stream in streams.items():
        if "://" in stream.path or any(sign in stream.path for sign in "*?["):
            raise ConfigError(f"random_logs: the path of {name!r}, {stream.path!r}, must be a local folder")
    there = [name for name, stream in streams.items() if Path(stream.path).expanduser().exists()]
    if len(there) == len(streams):
        return False
    if there:
        raise ConfigError(
            f"random_logs: {streams[there[0]].path} is there already; remove it, or leave random_logs out"
        )
    # The impressions' folder is made last: only with it all are there.
    for name, (table, arrival) in reversed(random_tables(config, logs).items()):
        _write(Path(streams[name].path).expanduser(), table, arrival)
    return True


def random_tables(config: AugmentConfig, logs: RandomLogsConfig) -> dict[str, tuple[pa.Table, Int64]]:
    """Each stream's rows in the order of their arrival, and when each arrives (microseconds)."""
    rng = np.random.default_rng(logs.seed)
    rows = logs.hours * logs.impressions_per_hour
    start = microseconds(logs.start)
    times = np.sort(start + rng.integers(0, logs.hours * HOUR_US, rows))
    user, item = rng.integers(0, USERS, rows), rng.integers(0, ITEMS, rows)
    price = rng.lognormal(2.0, 0.5, rows)
    taste = rng.normal(size=USERS)[user] + rng.normal(size=ITEMS)[item] - 0.1 * price
    impressions = {
        config.impressions.example_id: pa.array(np.arange(rows)),
        config.impressions.time.column: _timestamps(times),
        "traffic": pa.array(TRAFFICS, pa.string()).take(pa.array(rng.integers(0, len(TRAFFICS), rows))),
        "user_id": pa.array(user),
        "item": pa.array(item),
        "price": pa.array(price.astype(np.float32)),
    }
    found = {IMPRESSIONS: _arrive(rng, pa.table(impressions), times, config.impressions, config)}
    events: dict[str, list[pa.Table]] = {name: [] for name in config.feedback}
    for place, (task, rules) in enumerate(config.tasks.items()):
        odds = RATE * 0.5**place * np.exp(taste - taste.mean())
        hit = np.flatnonzero(rng.random(rows) < np.minimum(odds, 0.9))
        examples = np.where(rng.random(len(hit)) < ORPHANED, rows + hit, hit)
        lag = rng.exponential(duration_us(rules.window) / 4, len(hit)).astype(np.int64)
        stream = _stream_of(config, task)
        events[stream].append(_events(config.feedback[stream], task, examples, times[hit] + lag, rng))
    for name, parts in events.items():
        table = pa.concat_tables([part for part in parts if part.num_rows] or parts[:1])
        ids = pa.array(np.arange(table.num_rows)).cast(pa.string())
        table = table.append_column(config.feedback[name].event_id, ids)
        own = table[config.feedback[name].time.column].cast(pa.int64()).to_numpy()
        found[name] = _arrive(rng, table, own, config.feedback[name], config)
    return found


def _stream_of(config: AugmentConfig, task: str) -> str:
    """The stream that a task's events go to: one of its own before one for all."""
    values = config.tasks[task].label != "any"
    able = [name for name, stream in config.feedback.items() if not values or stream.value is not None]
    own = [name for name in able if config.feedback[name].task == task]
    shared = [name for name in able if not isinstance(config.feedback[name].task, str)]
    return (own + shared)[0]


def _events(stream: FeedbackConfig, task: str, examples: Int64, times: Int64, rng: np.random.Generator) -> pa.Table:
    columns = {stream.example_id: pa.array(examples), stream.time.column: _timestamps(times)}
    if not isinstance(stream.task, str):
        columns[stream.task.column] = pa.repeat(task, len(examples))
    if stream.value is not None:
        columns[stream.value] = pa.array(np.round(rng.exponential(30.0, len(examples)), 1))
    return pa.table(columns)


def _arrive(
    rng: np.random.Generator, table: pa.Table, times: Int64, stream: StreamConfig, config: AugmentConfig
) -> tuple[pa.Table, Int64]:
    """Rows in the order of their arrival: within the disorder, but for some; some of them twice."""
    rows = np.append(np.arange(len(times)), np.flatnonzero(rng.random(len(times)) < DOUBLED))
    arrival = times[rows] + (rng.random(len(rows)) * duration_us(stream.disorder)).astype(np.int64)
    late = rng.random(len(rows)) < LATE
    arrival[late] += (rng.random(int(late.sum())) * 3 * duration_us(config.lateness)).astype(np.int64)
    order = np.argsort(arrival, kind="stable")
    return table.take(pa.array(rows[order])), arrival[order]


def _timestamps(times: npt.NDArray[np.int64]) -> pa.Array:
    return pa.array(times).cast(pa.timestamp("us", "UTC"))


def _write(folder: Path, table: pa.Table, arrival: Int64) -> None:
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    hours = arrival // HOUR_US
    cuts = np.flatnonzero(np.diff(hours, prepend=-1))
    with disk_errors(folder):
        temporary.mkdir(parents=True)
        for first, last in zip(cuts, np.append(cuts[1:], len(hours)), strict=True):
            hour = datetime.datetime.fromtimestamp(int(hours[first]) * 3600, datetime.UTC)
            rows = table.slice(int(first), int(last - first))
            pq.write_table(rows, temporary / f"{hour:%Y-%m-%dT%H}.parquet", compression="zstd")
        temporary.rename(folder)
