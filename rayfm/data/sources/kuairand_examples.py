"""From KuaiRand's rows to examples, a bucket of users at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayfm.config import DataError, nearest
from rayfm.data.sources import kuairand_files as files
from rayfm.data.sources.base import KIND_COLUMN
from rayfm.data.sources.files import parquet_errors
from rayfm.data.sources.history import Clock, Events
from rayfm.schema import EXAMPLE_ID, TIME, TRAFFIC, Feature, Schema, mix64

Int64 = npt.NDArray[np.int64]

TASKS = {
    "click": "is_click",
    "long_view": "long_view",
    "like": "is_like",
    "follow": "is_follow",
    "comment": "is_comment",
    "forward": "is_forward",
    "hate": "is_hate",
    "watch_time": "play_time_ms",
}
"""Task -> column of the log; ``watch_time`` is in seconds."""

USER_TEXT = frozenset(
    {
        "user_active_degree",
        "follow_user_num_range",
        "fans_user_num_range",
        "friend_user_num_range",
        "register_days_range",
    }
)
USER_COLUMNS = (
    *("user_active_degree", "is_lowactive_period", "is_live_streamer", "is_video_author"),
    *("follow_user_num", "follow_user_num_range", "fans_user_num", "fans_user_num_range"),
    *("friend_user_num", "friend_user_num_range", "register_days", "register_days_range"),
    *(f"onehot_feat{number}" for number in range(18)),
)
VIDEO_TEXT = frozenset({"video_type", "upload_dt", "upload_type", "tag"})
VIDEO_COLUMNS = (
    *("author_id", "video_type", "upload_dt", "upload_type", "visible_status", "video_duration"),
    *("server_width", "server_height", "music_id", "music_type", "tag"),
)
SEQUENCES = {
    "watched": ("is_click", "watch_seq"),
    "liked": ("is_like", "like_seq"),
    "long_watched": ("long_view", "long_watch_seq"),
}
"""Sequence feature -> flag in the log, list in the history file."""

LOG_FEATURES = ("user_id", "video_id", "tab", "hour")

BLOCK_ROWS = 32_768
"""Rows of the blocks that go on to prepare."""

FILE_SHIFT = 40
DEFAULT_LENGTH = 50


@dataclasses.dataclass(frozen=True)
class ExampleBuilder:
    """Everything that a task needs to build the examples of a bucket of users."""

    schema: Schema
    folder: Path
    logs: tuple[files.LogFile, ...]
    history: Path | None
    delay_ms: int
    buckets: int
    spans: tuple[tuple[int, int], ...]
    """``[start, end)`` in milliseconds of the wanted periods."""
    log_span: tuple[int, int]
    """``[start, end)`` of the whole log; a row outside has a bad time and is handed on to be rejected."""


def build_buckets(batch: pa.Table, builder: ExampleBuilder) -> Iterator[pa.Table]:
    """Examples of the user buckets in ``batch["id"]``; a bucket's users, all their rows, are held in memory at once."""
    schema, folder, buckets = builder.schema, builder.folder, builder.buckets
    names = {feature.name for feature in schema.features}
    users = _side(folder, files.USERS, "user_id", [name for name in USER_COLUMNS if name in names], USER_TEXT)
    videos = _side(folder, files.VIDEOS, "video_id", [name for name in VIDEO_COLUMNS if name in names], VIDEO_TEXT)
    sequences = [feature for feature in schema.features if feature.name in SEQUENCES]
    for bucket in batch["id"].to_pylist():
        log = _read_bucket(builder.logs, bucket, buckets, _log_columns(schema))
        events = _events(log, sequences, builder.history, bucket, buckets)
        wanted = _wanted_rows(log["time_ms"], builder)
        for start in range(0, len(wanted), BLOCK_ROWS):
            rows = log.take(pa.array(wanted[start : start + BLOCK_ROWS]))
            yield _examples(rows, schema, users, videos, events, builder.delay_ms)


def _log_columns(schema: Schema) -> list[str]:
    columns = ["user_id", "video_id", "time_ms", "hourmin", "tab", *(TASKS[task.name] for task in schema.tasks)]
    columns += [SEQUENCES[feature.name][0] for feature in schema.features if feature.name in SEQUENCES]
    return list(dict.fromkeys(columns))


def _side(folder: Path, stem: str, key: str, columns: list[str], text: frozenset[str]) -> pa.Table | None:
    if not columns:
        return None
    return files.read_features(files.find_required(folder, stem), key, columns, text)


def _in_bucket(users: Int64, bucket: int, buckets: int) -> npt.NDArray[np.bool_]:
    mine: npt.NDArray[np.bool_] = mix64(users) % np.uint64(buckets) == np.uint64(bucket)
    return mine


def _read_bucket(logs: tuple[files.LogFile, ...], bucket: int, buckets: int, columns: list[str]) -> pa.Table:
    """The bucket's rows of all logs, with ``example_id``; a null user counts as user -1."""
    pieces = []
    for log in logs:
        row = 0
        for table in files.read_batches(log.path, columns):
            ids = (log.index << FILE_SHIFT) + np.arange(row, row + table.num_rows, dtype=np.int64)
            row += table.num_rows
            table = table.append_column(EXAMPLE_ID, pa.array(ids))
            if buckets > 1:
                mine = _in_bucket(table["user_id"].fill_null(-1).to_numpy(), bucket, buckets)
                table = table.filter(pa.array(mine))
            pieces.append(table)
    return pa.concat_tables(pieces).combine_chunks()


def _wanted_rows(times: pa.ChunkedArray, builder: ExampleBuilder) -> Int64:
    """Rows of the wanted periods, and those with a bad time, for prepare to reject."""
    values = times.fill_null(-1).to_numpy()
    wanted = (values < builder.log_span[0]) | (values >= builder.log_span[1])
    for start, end in builder.spans:
        wanted |= (values >= start) & (values < end)
    return np.flatnonzero(wanted)


def _events(
    log: pa.Table, sequences: list[Feature], history: Path | None, bucket: int, buckets: int
) -> dict[str, Events]:
    """Per sequence feature the bucket's events, from the log and from the history file.

    The history file tells the order of its events and the time of the newest alone; so each of them counts as having
    happened at that time, the latest that is possible.
    """
    if not sequences:
        return {}
    usable = log.filter(pc.and_(pc.and_(log["user_id"].is_valid(), log["video_id"].is_valid()), _positive(log)))
    users, times, videos = (usable[name].to_numpy() for name in ("user_id", "time_ms", "video_id"))
    past = _read_history(history, sequences, bucket, buckets)
    every = [log["user_id"].fill_null(-1).to_numpy(), past["user_id"].to_numpy()]
    clock = Clock.of(np.concatenate(every), np.concatenate([times, past["last_time_ms"].to_numpy()]))
    events = {}
    for feature in sequences:
        flag, name = SEQUENCES[feature.name]
        happened = pc.fill_null(pc.equal(usable[flag], 1), False).to_numpy()
        lists = past[name].combine_chunks()
        counts = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
        events[feature.name] = Events.of(
            clock,
            np.concatenate([np.repeat(past["user_id"].to_numpy(), counts), users[happened]]),
            np.concatenate([np.repeat(past["last_time_ms"].to_numpy(), counts), times[happened]]),
            np.concatenate([lists.flatten().to_numpy(), videos[happened]]),
        )
    return events


def _positive(log: pa.Table) -> pa.ChunkedArray:
    return pc.fill_null(pc.greater_equal(log["time_ms"], 0), False)


def _read_history(path: Path | None, sequences: list[Feature], bucket: int, buckets: int) -> pa.Table:
    names = [SEQUENCES[feature.name][1] for feature in sequences]
    types = {"user_id": pa.int64(), "last_time_ms": pa.int64(), **dict.fromkeys(names, pa.list_(pa.int64()))}
    schema = pa.schema(list(types.items()))
    if path is None:
        return schema.empty_table()
    with parquet_errors(str(path)):
        known = pq.read_schema(path).names
        for name in types:
            if name not in known:
                raise DataError(f"{path}: column {name!r} is missing{nearest(name, known)}")
        table = pq.read_table(path, columns=list(types)).select(list(types)).cast(schema).combine_chunks()
    return table.filter(pa.array(_in_bucket(table["user_id"].to_numpy(), bucket, buckets))).combine_chunks()


def _examples(
    rows: pa.Table,
    schema: Schema,
    users: pa.Table | None,
    videos: pa.Table | None,
    events: dict[str, Events],
    delay: int,
) -> pa.Table:
    """Examples in the store's columns from rows of the log."""
    rows = rows.combine_chunks()
    times = rows["time_ms"]
    columns: dict[str, pa.Array | pa.ChunkedArray] = {
        EXAMPLE_ID: rows[EXAMPLE_ID],
        TIME: pc.multiply(times, 1000),
        TRAFFIC: rows["tab"].cast(pa.string()),
        KIND_COLUMN: pa.repeat("impression", rows.num_rows),
        "user_id": rows["user_id"],
    }
    user_rows, video_rows = _find_rows(users, "user_id", rows), _find_rows(videos, "video_id", rows)
    for feature in schema.features:
        if feature.name in SEQUENCES:
            own = events[feature.name]
            where = own.before(
                rows["user_id"].fill_null(-1).to_numpy(),
                times.fill_null(-1).to_numpy(),
                delay,
                feature.max_len or DEFAULT_LENGTH,
            )
            values, offsets = own.gather(*where)
            columns[feature.name] = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))
        elif feature.name == "hour":
            columns["hour"] = pc.divide(rows["hourmin"], 100)
        elif feature.name in LOG_FEATURES:
            columns[feature.name] = rows[feature.name]
        elif users is not None and feature.name in USER_COLUMNS:
            columns[feature.name] = users[feature.name].take(user_rows)
        elif videos is not None:
            columns[feature.name] = videos[feature.name].take(video_rows)
        columns[feature.name] = _as_feature(columns[feature.name], feature)
    for task in schema.tasks:
        label = rows[TASKS[task.name]].cast(pa.float32())
        columns[task.name] = pc.divide(label, 1000.0) if task.name == "watch_time" else label
    return pa.table(columns)


def _find_rows(side: pa.Table | None, key: str, rows: pa.Table) -> pa.Array:
    """Row of ``side`` (sorted by ``key``) for each of ``rows``, null where it has none."""
    if side is None or not side.num_rows:
        return pa.nulls(rows.num_rows, pa.int64())
    known, wanted = side[key].to_numpy(), rows[key].fill_null(-1).to_numpy()
    found = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return pa.array(found, mask=known[found] != wanted)


def _as_feature(column: pa.Array | pa.ChunkedArray, feature: Feature) -> pa.Array | pa.ChunkedArray:
    """The official value as the schema's kind and id type want it: text as ids, numbers as ids or as a dense value."""
    target = feature.arrow_type()
    if column.type == target:
        return column
    if feature.is_list:
        if not pa.types.is_list(column.type):  # tag: "20,43"
            column = pc.split_pattern(column.cast(pa.string()), ",")
        return column.cast(target)
    if pa.types.is_string(column.type) and feature.kind != "dense" and feature.id_type == "int64":
        raise DataError(f"kuairand: {feature.name!r} is text; write `id_type: string` for it in the schema")
    return column.cast(target)
