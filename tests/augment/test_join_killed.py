"""Kill -9 wherever it may fall, resume: the folder is that of a run that nobody disturbed, bit for bit."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feedback_streams import STREAMS, TASKS, join_config, random_streams
from killed_join import join_until_killed

from rayfm.config import write_yaml


def write_logs(root: Path, seed: int) -> None:
    """Random streams, late rows and orphans included, in files of a few dozen rows."""
    streams = random_streams(seed, impressions=150, wild=True)
    shown = pa.table(
        {"example_id": [row[0] for row in streams.impressions], "time": [r[1] for r in streams.impressions]}
    )
    names = [f"item {row[0] % 7}" for row in streams.impressions]
    tables = {"impressions": shown.append_column("item", pa.array(names))}
    for stream, events in zip(STREAMS, streams.events, strict=True):
        columns: dict[str, Any] = {
            name: [getattr(event, name) for event in events] for name in ("event_id", "example_id", "time", "value")
        }
        columns["task"] = [list(TASKS)[event.task] for event in events]
        tables[stream] = pa.table(columns)
    for stream, table in tables.items():
        for number, start in enumerate(range(0, table.num_rows, 40)):
            path = root / "logs" / stream / f"{number:03d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table.slice(start, 40), path, row_group_size=9)


def contents(root: Path) -> dict[str, bytes]:
    """Every file of a join's folder but the journal."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not path.name.startswith("journal.sqlite")
    }


def journal(root: Path) -> dict[str, list[Any]]:
    with sqlite3.connect(root / "journal.sqlite") as database:
        return {
            table: database.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall()
            for table in ("batches", "counts", "offsets", "files", "periods")
        }


def config_file(folder: Path, logs: Path, emit: str) -> Path:
    streams = join_config(logs).dump()
    config = join_config(
        folder / "joined",
        impressions=streams["impressions"],
        feedback=streams["feedback"],
        late="correct",
        emit=emit,
        batch_rows=25,
    )
    folder.mkdir()
    write_yaml(config, folder / "join.yaml")
    return folder / "join.yaml"


@pytest.mark.parametrize(
    ("seed", "emit"), [(0, "complete"), (1, "complete"), (2, "per_task"), (3, "per_task"), (4, "per_task")]
)
def test_a_join_that_is_killed_again_and_again_ends_as_an_unbroken_one(tmp_path, seed, emit):
    write_logs(tmp_path, seed)
    unbroken, broken = (config_file(tmp_path / name, tmp_path, emit) for name in ("unbroken", "broken"))
    ready = processes.context().Process(target=int)  # the first process waits for the libraries' import
    ready.start()
    ready.join()
    begin = time.perf_counter()
    assert join_until_killed(unbroken) == 0
    took = time.perf_counter() - begin
    wanted = contents(unbroken.parent / "joined")
    assert {name.split("/")[0] for name in wanted} == {
        "examples", "corrections", "rejects", "state", "counts.jsonl",
    }  # fmt: skip

    rng = np.random.default_rng(seed)
    kills, code = 0, -9
    while code != 0:
        if kills % 4 == 3:
            code = join_until_killed(broken, kill_after_s=took * float(rng.uniform(0.02, 0.2)))
        else:
            code = join_until_killed(broken, kill_at=int(rng.integers(1, 160)))
        assert code in (0, -9)
        kills += code != 0
        for name in contents(broken.parent / "joined"):
            if name.startswith("examples"):
                assert name in wanted, "a reader sees committed files alone"
    assert kills >= 5
    found = contents(broken.parent / "joined")
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []
    assert journal(broken.parent / "joined") == journal(unbroken.parent / "joined")
