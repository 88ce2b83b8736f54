"""Small streams of impressions and feedback as tables and as files, and what a join left of them."""

from __future__ import annotations

import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from feedback_streams import S

HOUR = 3600 * S
T0 = 472_222 * HOUR
"""2023-11-14T22:00."""


def impressions(*rows: tuple[int, int], **columns) -> pa.Table:
    """(id, seconds after T0)."""
    ids, times = zip(*rows, strict=True) if rows else ((), ())
    return pa.table(
        {
            "example_id": pa.array(ids, pa.int64()),
            "time": pa.array([T0 + round(time * S) for time in times], pa.int64()),
            "traffic": pa.array(["feed"] * len(rows), pa.string()),
            "price": pa.array([float(example) for example in ids], pa.float32()),
            **columns,
        }
    )


def clicks(*rows: tuple[str, int, float]) -> pa.Table:
    """(event id, example, seconds after T0)."""
    events, examples, times = zip(*rows, strict=True) if rows else ((), (), ())
    return pa.table(
        {
            "event_id": pa.array(events, pa.string()),
            "example_id": pa.array(examples, pa.int64()),
            "time": pa.array([T0 + round(time * S) for time in times], pa.int64()),
        }
    )


def others(*rows: tuple[str, int, float, str, float | None]) -> pa.Table:
    """(event id, example, seconds after T0, task, value)."""
    table = clicks(*(row[:3] for row in rows))
    table = table.append_column("task", pa.array([row[3] for row in rows], pa.string()))
    return table.append_column("value", pa.array([row[4] for row in rows], pa.float64()))


def read(root: Path, what: str) -> list[dict]:
    files = sorted((root / what).rglob("*.parquet"))
    return [row for file in files for row in pq.read_table(file, partitioning=None).to_pylist()]


def at(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp((T0 + seconds * S) / 1e6, datetime.UTC)


def write(folder: Path, **tables: pa.Table) -> None:
    for name, table in tables.items():
        path = folder / "logs" / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path.with_suffix(".parquet"), row_group_size=3)


def log_files(root: Path, hours: int = 3, rows: int = 40) -> None:
    """A file an hour and stream; example k of an hour is clicked if k is even and bought if a multiple of 5."""
    for hour in range(hours):
        first, at_ = hour * rows, [hour * 3600 + k * 3600 / rows for k in range(rows)]
        shown = impressions(*((first + k, at_[k]) for k in range(rows)))
        clicked = clicks(*((f"c{first + k}", first + k, at_[k] + 2) for k in range(0, rows, 2)))
        bought = others(*((f"b{first + k}", first + k, at_[k] + 30, "buy", None) for k in range(0, rows, 5)))
        write(root, **{f"impressions__{hour}": shown, f"clicks__{hour}": clicked, f"other__{hour}": bought})
