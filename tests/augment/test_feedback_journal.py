"""What a join keeps between batches is bounded."""

from __future__ import annotations

import json
import sqlite3

import numpy as np
import pyarrow as pa
import pytest
from feedback_streams import join_config
from feedback_tables import at, clicks, impressions, others, read

from rayfm.augment.join import FeedbackJoin
from rayfm.config import DataError


def test_the_state_on_disk_is_bounded(tmp_path, monkeypatch):
    """Rows that are over leave the disk, and one that lives long does not keep its neighbours."""
    import rayfm.augment.join as module

    monkeypatch.setattr(module, "COMPACT_ROWS", 20)
    config = join_config(tmp_path)
    with FeedbackJoin(config) as join:
        for number in range(60):
            ids = range(number * 10, number * 10 + 10)
            times = [(example, number * 10 + (500 if example % 10 == 0 and number == 3 else 0)) for example in ids]
            join.process(
                impressions(*times),
                {
                    "clicks": clicks(*((f"c{example}", example, number * 10 + 1) for example in ids)),
                    "other": others((f"o{number}", ids[3], number * 10 + 3, "buy", None)),
                },
            )
            held = sum(
                pa.ipc.open_file(pa.memory_map(str(path))).read_all().num_rows
                for path in (tmp_path / "state").iterdir()
            )
            assert held <= 2 * join.state.rows + 2 * 20 + 20
            if number % 7 == 0:
                with pytest.raises(DataError):
                    FeedbackJoin(config)
        state = join.state
    with FeedbackJoin(config) as join:
        assert join.state.feedback.equals(state.feedback)
        assert join.state.index.row.tolist() == state.index.row.tolist()
        join.process(through=at(10_000))
    assert sorted(row["example_id"] for row in read(tmp_path, "examples")) == list(range(600))
    assert all(
        row["price"] == row["example_id"] and row["click"] == 1.0
        for row in read(tmp_path, "examples")
        if row["example_id"] != 30
    )


def some_batches(join: FeedbackJoin, first: int, count: int) -> None:
    """An impression and a click a batch, ids falling; nothing is over after them."""
    for number in range(first, first + count):
        join.process(impressions((1000 - number, number / 100)), {"clicks": clicks((f"c{number}", 1000 - number, 1))})


def test_the_journal_does_not_grow_with_the_batches(tmp_path):
    """One record stands; a start writes no more of counts.jsonl than what it lacks."""
    config, path = join_config(tmp_path), tmp_path / "counts.jsonl"
    with FeedbackJoin(config) as join:
        some_batches(join, 0, 30)
    with sqlite3.connect(tmp_path / "journal.sqlite") as database:
        assert database.execute("SELECT batch FROM batches").fetchall() == [(30,)]
    whole = path.read_bytes()
    assert [json.loads(line)["batch"] for line in whole.splitlines()] == list(range(1, 31))
    old = path.stat().st_ino
    for damaged in (whole[:-20], whole + b"more", whole[:-50] + b"\0" * 50, whole[:3000], whole):
        path.write_bytes(damaged)
        FeedbackJoin(config).close()
        assert path.read_bytes() == whole
        assert path.stat().st_ino == old, "the file is mended, not made anew"
    path.unlink()
    FeedbackJoin(config).close()
    assert path.read_bytes() == whole


def test_a_journal_with_a_record_of_every_batch_is_brought_on(tmp_path):
    """As it was written before: each batch's record with its counts, and no table of them."""
    config, path = join_config(tmp_path), tmp_path / "counts.jsonl"
    with FeedbackJoin(config) as join:
        some_batches(join, 0, 5)
        state = join.state
    lines = path.read_text()
    with sqlite3.connect(tmp_path / "journal.sqlite") as database:
        ((newest,),) = database.execute("SELECT record FROM batches").fetchall()
        database.execute("DELETE FROM batches")
        for number, line in enumerate(lines.splitlines(), start=1):
            record = {**json.loads(newest), "batch": number, "counts": json.loads(line)}
            database.execute("INSERT INTO batches VALUES (?, ?)", (number, json.dumps(record)))
        database.execute("DROP TABLE counts")
        database.execute("DROP INDEX files_by_period")
    path.write_text(lines[:-7])
    with FeedbackJoin(config) as join:
        assert (join.batch, path.read_text()) == (5, lines)
        assert join.state.feedback.equals(state.feedback)
        some_batches(join, 5, 1)
        assert path.read_text().startswith(lines)
        assert path.read_text().count("\n") == 6
    with sqlite3.connect(tmp_path / "journal.sqlite") as database:
        assert database.execute("SELECT batch FROM batches").fetchall() == [(6,)]
        database.execute("UPDATE batches SET record = '{}'")
    with pytest.raises(DataError, match="the newest batch's record cannot be read; remove the folder and join anew"):
        FeedbackJoin(config)


def test_many_small_batches_do_not_make_many_segments(tmp_path, monkeypatch):
    import rayfm.augment.join as module

    monkeypatch.setattr(module, "COMPACT_SEGMENTS", 8)
    config = join_config(tmp_path)
    written = 0
    with FeedbackJoin(config) as join:
        for number in range(100):
            some_batches(join, number, 1)
            files = sorted((tmp_path / "state").iterdir())
            for kind in ("impressions", "feedback"):
                assert sum(path.name.startswith(kind) for path in files) <= 9
            newest = tmp_path / "state" / f"impressions-{join.batch:08d}.arrow"
            written += pa.ipc.open_file(pa.memory_map(str(newest))).read_all().num_rows
        state = join.state
    assert len(state.index) == state.feedback.num_rows == 100
    assert written < 100 * 6, "all of them anew for each eighth batch would be more"
    sorts, argsort = [], np.argsort
    monkeypatch.setattr(np, "argsort", lambda *args, **kwargs: sorts.append(1) or argsort(*args, **kwargs))
    with FeedbackJoin(config) as join:
        assert len(sorts) == 1, "however many segments there are"
        for name in ("example_id", "time", "segment", "row"):
            assert getattr(join.state.index, name).tolist() == getattr(state.index, name).tolist()
        assert join.state.feedback.equals(state.feedback)
        join.process(through=at(100))
    rows = read(tmp_path, "examples")
    assert [(row["example_id"], row["price"], row["click"]) for row in rows] == [
        (1000 - number, 1000 - number, 1.0) for number in range(100)
    ]
