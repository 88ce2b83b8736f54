"""A small example store with every kind of feature, written by hand for tests of what reads it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayfm.data.store import ExampleStore, LaneFile, PeriodManifest, file_sha256
from rayfm.schema import Schema

DAY_US = 86_400_000_000


class IdLookup:
    """Supervision that can be checked: the example id's last digits, missing for every seventh."""

    columns = ("teacher/click",)

    def rows(self, period, kind, lane, start, stop, ids):
        assert stop - start == len(ids)
        return (ids % 1000 / 1000).astype(np.float32)[:, None], (ids % 7 != 0)[:, None]


class IdVectors:
    """Stored representations that can be checked: two numbers of the example id, missing for every fifth."""

    name, width = "teacher", 2

    def vectors(self, period, kind, lane, start, stop, ids):
        assert stop - start == len(ids)
        return np.stack([ids % 100, ids % 9], 1).astype(np.float32), ids % 5 != 0


def every_feature_schema() -> Schema:
    return Schema.model_validate(
        {
            "tables": {"user": {"rows": 100}, "ad": {"rows": 50}, "tag": {"rows": 20}, "topic": {"rows": 30}},
            "features": [
                {"name": "age", "kind": "dense", "transform": "log1p", "missing": 30.0, "std": 2.0},
                {"name": "user", "kind": "sparse"},
                {"name": "ad", "kind": "sparse", "id_type": "string"},
                {"name": "tags", "kind": "multi", "table": "tag", "max_len": 3},
                {"name": "history", "kind": "sequence", "table": "ad", "id_type": "string", "max_len": 4},
                {"name": "topics", "kind": "weighted", "table": "topic"},
            ],
            "tasks": [{"name": "click"}, {"name": "watch", "kind": "regression", "transform": "log1p"}],
            "traffics": ["feed", "search"],
        }
    )


def every_feature_rows(rows: int, seed: int, kind: str = "impression", start: int = 0) -> pa.Table:
    """``rows`` examples in time order; the click depends on user, ad and age, so that a model can learn it."""
    rng = np.random.default_rng(seed)

    def offsets(low: int, high: int) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(rng.integers(low, high, rows))]).astype(np.int32)

    tags, history, topics = offsets(0, 6), offsets(0, 8), offsets(0, 3)
    user, ad = rng.integers(0, 40, rows), rng.integers(0, 30, rows)
    age = rng.random(rows, dtype=np.float32) * 50
    rate = 1 / (1 + np.exp(-(np.sin(user) + np.cos(ad * 1.7) + age / 50 - 0.5)))
    unlabelled = pa.nulls(rows, pa.float32())
    columns = {
        "example_id": pa.array(rng.permutation(rows) + seed * 1_000_000),
        "time": pa.array(np.sort(rng.integers(start, start + DAY_US, rows))),
        "traffic": pa.array(rng.choice(["feed", "search"], rows)),
        "age": pa.array(age, mask=rng.random(rows) < 0.1),
        "user": pa.array(user, mask=rng.random(rows) < 0.05),
        "ad": pa.array(np.char.add("ad", ad.astype(str)).tolist()),
        "tags": pa.ListArray.from_arrays(tags, pa.array(rng.integers(0, 99, tags[-1]))),
        "history": pa.ListArray.from_arrays(
            history, pa.array(np.char.add("ad", rng.integers(0, 30, history[-1]).astype(str)).tolist(), pa.string())
        ),
        "topics": pa.ListArray.from_arrays(topics, pa.array(rng.integers(0, 99, topics[-1]))),
        "topics__weights": pa.ListArray.from_arrays(topics, pa.array(rng.random(topics[-1], dtype=np.float32))),
        "click": unlabelled if kind == "consideration" else pa.array((rng.random(rows) < rate).astype(np.float32)),
        "watch": unlabelled if kind == "consideration" else pa.array(rng.random(rows, dtype=np.float32) * 30),
        "user_id": pa.array(user),
        "request_id": pa.array(np.arange(rows) // 4),
        "logged/ranking/click": pa.array(rate.astype(np.float32), mask=rng.random(rows) < 0.2),
    }
    return pa.table(columns)


def write_store(
    root: Path, periods: list[str], impressions: int = 1000, considerations: int = 0, lanes: int = 4
) -> ExampleStore:
    """A store of complete periods; each row of the time order goes to lane ``row % lanes``."""
    store = ExampleStore(root)
    for position, period in enumerate(periods):
        files = []
        for kind, rows in (("impression", impressions), ("consideration", considerations)):
            if not rows:
                continue
            seed = 2 * position + (kind == "consideration")
            table = every_feature_rows(rows, seed + 1, kind, position * DAY_US)
            for lane in range(lanes):
                part = table.take(pa.array(np.arange(lane, rows, lanes)))
                path = store.lane_path(period, kind, lane)
                path.parent.mkdir(parents=True, exist_ok=True)
                pq.write_table(part, path, row_group_size=64)
                files.append(
                    LaneFile(
                        kind=kind, lane=lane, rows=part.num_rows, bytes=path.stat().st_size, sha256=file_sha256(path)
                    )
                )
        columns = {field.name: str(field.type) for field in table.schema}
        store.commit(
            PeriodManifest(
                period=period, start=period, end=period, lanes=lanes, files=tuple(files), columns=columns, source="test"
            )
        )
    return store
