"""The join on disk: files in, files out, restarts, refusals."""

from __future__ import annotations

import datetime
import json
import sqlite3
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feedback_streams import S, join_config

from rayfm.augment.config import load_augment
from rayfm.augment.join import FeedbackJoin
from rayfm.augment.journal import BatchCommitted
from rayfm.config import CapacityError, ConfigError, DataError, write_yaml
from rayfm.data.sources.parquet import ParquetConfig, ParquetSource
from rayfm.schema import Schema

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


def test_an_example_is_written_when_every_window_has_closed(tmp_path):
    """The longest window is 40 s; the impressions' disorder is 4 s, the clicks' 8 s, the others' 6 s."""
    with FeedbackJoin(join_config(tmp_path)) as join:
        first = join.process(
            impressions((1, 0), (2, 1)),
            {
                "clicks": clicks(("a", 1, 9.5), ("b", 2, 11)),
                "other": others(
                    ("a", 1, 3, "spent", 2.0), ("c", 1, 4, "spent", 0.5), ("d", 1, 8, "rating", 4.0),
                    ("e", 1, 5, "rating", 5.0), ("f", 1, 6, "longest", 7.0), ("g", 1, 39.9, "buy", None),
                ),
            },
        )  # fmt: skip
        assert first["watermark"] == at(-3).isoformat(), "the impressions' newest time less their disorder"
        assert (first["joined"], first["open"]) == (0, 2)
        assert first["after_window"] == 1, "the click on 2 came exactly at the end of its window"

        # The impressions and others move on, the clicks stand at 11 s less 8 s: a click may still come.
        held = join.process(impressions((3, 90)), {"other": others(("h", 3, 91, "buy", None))})
        assert (held["watermark"], held["joined"]) == (at(3).isoformat(), 0)

        done = join.process(None, {"clicks": clicks(("i", 2, 48.9))})
        assert (done["watermark"], done["joined"]) == (at(40.9).isoformat(), 1), "1 is closed, 2 in 0.1 s"
        assert done["after_window"] == 1
        (row,) = read(tmp_path, "examples")
        assert row == {
            "example_id": 1, "time": T0, "traffic": "feed", "price": 1.0,
            "click": 1.0, "buy": 1.0, "longest": 7.0, "spent": 2.5, "rating": 4.0,
        }  # fmt: skip
        assert join.process(through=at(41))["joined"] == 1
        assert read(tmp_path, "examples")[1] == {
            "example_id": 2, "time": T0 + S, "traffic": "feed", "price": 2.0,
            "click": 0.0, "buy": 0.0, "longest": None, "spent": 0.0, "rating": -1.0,
        }  # fmt: skip


def test_a_stream_that_says_nothing_holds_every_label_back(tmp_path):
    with FeedbackJoin(join_config(tmp_path)) as join:
        counts = join.process(impressions((1, 0), (2, 5000)), {"clicks": clicks(("a", 2, 5000))})
        assert (counts["watermark"], counts["joined"]) == (None, 0)
        assert join.process(through=at(100))["joined"] == 1


def test_per_task_writes_each_task_when_its_own_window_closes(tmp_path):
    with FeedbackJoin(join_config(tmp_path, emit="per_task")) as join:
        join.process(impressions((1, 0)), {"clicks": clicks(("a", 1, 3)), "other": others(("b", 1, 4, "spent", 2.0))})
        assert join.process(through=at(9))["joined"] == 0
        assert join.process(through=at(10))["joined"] == 1
        (row,) = read(tmp_path, "examples")
        assert (row["click"], row["buy"], row["spent"]) == (1.0, None, None), "only the click's window has closed"
        assert join.process(through=at(30))["joined"] == 3
        (row,) = read(tmp_path, "examples/task=spent")
        assert (row["click"], row["spent"]) == (None, 2.0)
        assert join.process(through=at(4000))["complete"] == [
            f"examples/task={task}/2023-11-14T22" for task in ("buy", "click", "longest", "rating", "spent")
        ]


@pytest.mark.parametrize("late", ["drop", "correct"])
def test_late_feedback(tmp_path, late):
    with FeedbackJoin(join_config(tmp_path, late=late)) as join:
        join.process(
            impressions((1, 0), (2, 1)), {"other": others(("a", 1, 4, "spent", 2.0), ("b", 2, 4, "buy", None))}
        )
        assert join.process(through=at(50))["joined"] == 2
        events = [("c", 1, 5, "spent", 0.5), ("d", 1, 6, "spent", 1.0), ("e", 2, 9, "buy", None)]
        counts = join.process(None, {"other": others(*events)})
        again = join.process(None, {"other": others(*events)})
        if late == "drop":
            assert (counts["late_dropped"], counts["corrections"]) == (3, 0)
            rows = read(tmp_path, "rejects/join/feedback")
            assert {row["reason"] for row in rows} == {"late: the example is written"}
            assert (rows[0]["stream"], rows[0]["task"], rows[0]["event_id"]) == ("other", "spent", "c")
            assert not (tmp_path / "corrections").exists()
        else:
            assert (counts["late_dropped"], counts["corrections"]) == (0, 1), "a second buy changes nothing"
            assert read(tmp_path, "corrections") == [
                {"example_id": 1, "time": T0, "period": "2023-11-14T22", "task": "spent", "label": 3.5, "previous": 2.0}
            ]
            assert (again["corrections"], again["duplicate_events"]) == (0, 3)
        # 40 s of window, 15 s of lateness, 2 s of tolerance: after 57 s nothing is known of 1, after 58 s nothing of 2.
        assert join.process(through=at(57))["state_rows"] == (4 if late == "drop" else 7)
        assert join.process(through=at(57.5))["state_rows"] == (2 if late == "drop" else 3)
        counts = join.process(None, {"other": others(("z", 1, 7, "spent", 9.0))})
        assert (counts["late_dropped"], counts["corrections"], counts["waiting"]) == (1, 0, 0)


def test_orphans_duplicates_and_what_lies_outside_the_window(tmp_path):
    with FeedbackJoin(join_config(tmp_path)) as join:
        counts = join.process(
            impressions((1, 10), (1, 10), (2, 11)),
            {"clicks": clicks(("a", 1, 12), ("a", 1, 12), ("b", 1, 7.9), ("c", 1, 8), ("d", 9, 10), ("e", 5, 12))},
        )
        assert (counts["duplicate_impressions"], counts["duplicate_events"]) == (1, 1)
        assert counts["before_impression"] == 1, "2 s before its impression is tolerated, 2.1 s are not"
        assert counts["waiting"] == 2
        counts = join.process(impressions((1, 10), (5, 11)), {"other": others(("a", 1, 12, "buy", None))})
        assert (counts["duplicate_impressions"], counts["duplicate_events"]) == (1, 0), "ids are a stream's own"
        assert counts["waiting"] == 1
        counts = join.process(through=at(27))
        assert (counts["orphans"], counts["waiting"]) == (0, 1)
        counts = join.process(through=at(27.1))
        assert (counts["orphans"], counts["waiting"]) == (1, 0), "the event's time, 15 s of lateness, 2 s of tolerance"
        rows = {row["event_id"]: row["reason"] for row in read(tmp_path, "rejects/join/feedback")}
        assert rows == {"b": "feedback before its impression", "d": "orphan: no impression came"}
        late = join.process(impressions((7, 12), (8, 12.2)))
        assert (late["late_impressions"], late["open"]) == (1, 4)
        assert [row["example_id"] for row in read(tmp_path, "rejects/join/impressions")] == [7]


def test_bad_rows_go_to_rejects_with_their_reason(tmp_path):
    config = join_config(tmp_path)
    far = 4_000 * 365 * 24 * 3600
    with FeedbackJoin(config, clock=lambda: T0 + HOUR) as join:
        shown = pa.table(
            {
                "example_id": pa.array([1, None, 3, 4, 5], pa.int64()),
                "time": pa.array([T0, T0, None, -5, T0 + 3 * HOUR], pa.int64()),
                "kind": ["impression"] * 5,
            }
        )
        shown = pa.concat_tables([shown, pa.table({"example_id": [6], "time": [T0], "kind": ["consideration"]})])
        events = others(
            ("a", 1, 3, "spent", None), ("b", 1, 3, "spent", float("nan")), ("c", 1, 3, "bui", 1.0),
            (None, 1, 3, "buy", None), ("e", 1, 3, "rating", 2.0), ("f", 1, min(far, 7300), "buy", None),
        )  # fmt: skip
        counts = join.process(shown, {"other": events})
        assert (counts["bad"], counts["rows"], counts["open"]) == (10, {"impressions": 6, "other": 6}, 1)
        assert [row["reason"] for row in read(tmp_path, "rejects/read/impressions")] == [
            "null example id", "null time", "time cannot be read", "time in the future", "not an impression",
        ]  # fmt: skip
        rows = read(tmp_path, "rejects/read/other")
        assert [(row["event_id"], row["reason"]) for row in rows] == [
            ("a", "value is null or not finite"), ("b", "value is null or not finite"), ("c", "unknown task"),
            (None, "null event id"), ("f", "time in the future"),
        ]  # fmt: skip
        assert join.state.seen["impressions"] == T0, "a wrong clock does not move the watermark"


def test_times_as_text_and_ids_as_numbers(tmp_path):
    feedback = {"clicks": {"path": "x", "task": "click", "time": {"column": "at", "unit": "iso"}}}
    config = join_config(tmp_path, feedback=feedback, tasks={"click": {"window": "10s"}})
    with FeedbackJoin(config) as join:
        table = pa.table(
            {"event_id": [7, 8], "example_id": [1, 1], "at": ["2023-11-14T22:00:05", "14 November"], "more": [1, 2]}
        )
        counts = join.process(impressions((1, 0)), {"clicks": table})
        assert (counts["bad"], counts["state_rows"]) == (1, 2)
        assert join.state.feedback["event_id"].to_pylist() == ["7"]
        assert read(tmp_path, "rejects/read/clicks") == [
            {"event_id": 8, "example_id": 1, "at": "14 November", "more": 2, "reason": "time cannot be read"}
        ]


@pytest.mark.parametrize(
    ("shown", "events", "message"),
    [
        (impressions((1, 0)).drop_columns("time"), None, r"'time' \(impressions.time.column\) is missing"),
        (impressions((1, 0)).rename_columns(["example", "time", "t", "p"]), None, r"did you mean 'example'"),
        (impressions((1, 0), click=pa.array([1.0])), None, "column 'click' is a task, whose column the join makes"),
        (
            impressions((1, 0)).set_column(0, "example_id", pa.array(["a"])), None,
            r"column 'example_id' is string, the schema wants int64; fix the source or the schema$",
        ),
        (None, others(("a", 1, 0, "buy", 1.0)).drop_columns("value"), r"'value' \(feedback.other.value\) is missing"),
        (None, others(("a", 1, 0, "buy", 1.0)).drop_columns("event_id"), r"'event_id' \(feedback.other.event_id\)"),
        (None, others(("a", 1, 0, "buy", 1.0)).drop_columns("task"), r"'task' \(feedback.other.task.column\)"),
        (
            None, others(("a", 1, 0, "buy", 1.0)).set_column(0, "event_id", pa.array([1.5])),
            "event ids are integers or text",
        ),
    ],
)  # fmt: skip
def test_columns_that_cannot_be_used_refuse_the_batch(tmp_path, shown, events, message):
    with FeedbackJoin(join_config(tmp_path)) as join:
        with pytest.raises(DataError, match=message):
            join.process(shown, {} if events is None else {"other": events}, where="a.parquet")
        assert join.batch == 0
        assert join.process(impressions((1, 0)))["open"] == 1


def test_impressions_keep_the_columns_of_the_first(tmp_path):
    with FeedbackJoin(join_config(tmp_path)) as join:
        join.process(impressions((1, 0)))
        with pytest.raises(DataError, match="column 'size' is new"):
            join.process(impressions((2, 0), size=pa.array([1])))
        with pytest.raises(DataError, match="column 'price' is missing, which earlier impressions had"):
            join.process(impressions((2, 0)).drop_columns("price"))
        with pytest.raises(DataError, match="column 'price' is string, earlier impressions had float"):
            join.process(impressions((2, 0)).set_column(3, "price", pa.array(["cheap"])))
        with pytest.raises(DataError, match="no stream of feedback is called 'views'"):
            join.process(None, {"views": clicks()})
        assert join.process(impressions((2, 0)).select(["price", "time", "example_id", "traffic"]))["open"] == 2


def test_a_state_that_would_grow_too_large_refuses_the_batch(tmp_path):
    with FeedbackJoin(join_config(tmp_path, max_state_rows=3)) as join:
        join.process(impressions((1, 0), (2, 1)))
        with pytest.raises(CapacityError, match=r"4 rows would wait .* holds the watermark back is 'clicks' \(nothing"):
            join.process(impressions((3, 2), (4, 3)))
        assert join.batch == 1
        # The streams that are behind can still be brought on, and then there is room.
        join.process(None, {"clicks": clicks(("a", 1, 100)), "other": others(("b", 1, 200, "buy", None))})
        assert join.process(impressions((3, 200)))["joined"] == 2


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


def test_files_become_examples_that_prepare_reads(tmp_path):
    log_files(tmp_path)
    config = join_config(tmp_path, batch_rows=7)
    lines = []
    with FeedbackJoin(config) as join:
        batches = join.run(watch=lines.append)
        assert join.run() == 0, "every row is read once"
    # 40, 20 and 8 rows a file, at most 7 a batch.
    assert batches == len(lines) == 3 * (6 + 3 + 2)
    assert [json.loads(line) for line in (tmp_path / "counts.jsonl").read_text().splitlines()] == lines
    assert max(line["state_rows"] for line in lines) < 40, "the stream that is furthest behind is read first"
    with FeedbackJoin(config) as join:
        assert join.run(through=at(3 * 3600 + 100)) == 1
    rows = read(tmp_path, "examples")
    assert [row["example_id"] for row in rows] == list(range(120))
    for row in rows:
        assert row["click"] == (row["example_id"] % 2 == 0)
        assert row["buy"] == (row["example_id"] % 5 == 0)

    schema = Schema.model_validate(
        {
            "tables": {}, "features": [{"name": "price", "kind": "dense"}], "traffics": ["feed"],
            "tasks": [{"name": "click"}, {"name": "buy"}, {"name": "longest", "kind": "regression"}],
        }
    )  # fmt: skip
    source = ParquetSource(
        ParquetConfig(
            path=str(tmp_path / "examples"), example_id="example_id", traffic={"column": "traffic"}, period="1h"
        ),
        schema,
    )
    assert [period.name for period in source.periods()] == [f"2023-11-{t}" for t in ("14T22", "14T23", "15T00")]
    assert source.estimated_rows() == 120
    complete = json.loads((tmp_path / "complete" / "period=2023-11-14T22.json").read_text())
    assert (complete["period"], complete["rows"]) == ("2023-11-14T22", 40)
    assert sum(pq.read_metadata(tmp_path / file["path"]).num_rows for file in complete["files"]) == 40
    assert len(list((tmp_path / "complete").iterdir())) == 3


def test_a_missing_column_is_told_before_the_first_batch(tmp_path):
    log_files(tmp_path, hours=1)
    write(tmp_path, clicks__0=clicks(("a", 1, 0)).drop_columns("event_id"))
    with FeedbackJoin(join_config(tmp_path)) as join:
        with pytest.raises(DataError, match=r"0\.parquet: column 'event_id' \(feedback\.clicks\.event_id\) is missing"):
            join.run()
        assert join.batch == 0
    (tmp_path / "logs" / "clicks" / "0.parquet").unlink()
    with FeedbackJoin(join_config(tmp_path)) as join, pytest.raises(DataError, match=r"no \.parquet file matches"):
        join.run()
    (tmp_path / "logs" / "clicks" / "0.parquet").write_text("no Parquet")
    with FeedbackJoin(join_config(tmp_path)) as join, pytest.raises(DataError, match="corrupt or unreadable Parquet"):
        join.run()


def test_a_log_may_have_a_column_called_reason(tmp_path):
    with FeedbackJoin(join_config(tmp_path)) as join:
        join.process(impressions((1, 0), (2, 1), reason=pa.array(["new", "old"])), through=at(100))
        counts = join.process(impressions((3, 2), reason=pa.array(["odd"])))
        assert counts["late_impressions"] == 1
    assert [row["reason"] for row in read(tmp_path, "examples")] == ["new", "old"]
    (row,) = read(tmp_path, "rejects/join/impressions")
    assert (row["reason"], row["reason_"]) == ("impression later than the lateness allows", "odd")


def test_new_files_are_read_and_changed_ones_refused(tmp_path):
    log_files(tmp_path, hours=1)
    with FeedbackJoin(join_config(tmp_path)) as join:
        assert join.run() == 3
    log_files(tmp_path, hours=2)
    with FeedbackJoin(join_config(tmp_path)) as join:
        assert join.run() == 3
    write(tmp_path, impressions__1=impressions((1, 0)))
    with FeedbackJoin(join_config(tmp_path)) as join, pytest.raises(DataError, match=r"1\.parquet: has .* bytes"):
        join.run()


def test_files_that_are_read_are_not_opened_again(tmp_path, monkeypatch):
    import rayfm.augment.streams as module

    opened = []

    def open_parquet(filesystem, path):
        opened.append("/".join(path.split("/")[-2:]))
        return pq.ParquetFile(path, filesystem=filesystem)

    monkeypatch.setattr(module, "open_parquet", open_parquet)
    config = join_config(tmp_path, batch_rows=30)

    def run(hours: int) -> list[str]:
        log_files(tmp_path, hours)
        write(tmp_path, impressions__00empty=impressions())
        opened.clear()
        with FeedbackJoin(config) as join:
            join.run()
        return sorted(opened)

    def newest(hour: int) -> list[str]:
        """A run looks at the columns of each stream's newest file."""
        return [f"{stream}/{hour}.parquet" for stream in ("clicks", "impressions", "other")]

    assert len(run(2)) > 6
    assert run(2) == newest(1)
    # Offsets as they were written before the files' rows were kept: [rows taken, bytes].
    with sqlite3.connect(tmp_path / "journal.sqlite") as database:
        for source, value in database.execute("SELECT * FROM offsets").fetchall():
            if source.endswith("00empty.parquet"):
                database.execute("DELETE FROM offsets WHERE source = ?", (source,))
            else:
                old = json.dumps(json.loads(value)[:2])
                database.execute("UPDATE offsets SET value = ? WHERE source = ?", (old, source))
    assert {"clicks/0.parquet", "impressions/00empty.parquet"} <= set(run(2))
    assert {"clicks/0.parquet", "impressions/00empty.parquet"} <= set(run(3)), "no batch, so nothing was kept"
    assert run(3) == newest(2)
    with FeedbackJoin(config) as join:
        join.run(through=at(3 * 3600 + 100))
    assert [row["example_id"] for row in read(tmp_path, "examples")] == list(range(120))


def test_a_stream_that_ran_ahead_is_told_with_its_neighbour(tmp_path):
    log_files(tmp_path)
    (tmp_path / "logs" / "clicks" / "1.parquet").unlink()
    (tmp_path / "logs" / "clicks" / "2.parquet").unlink()
    with FeedbackJoin(join_config(tmp_path, batch_rows=7, max_state_rows=60)) as join:
        with pytest.raises(CapacityError, match=r"back is 'clicks' \(stands at 2023-11-14T22:57:02"):
            join.run()
        before = join.batch
    log_files(tmp_path)
    with FeedbackJoin(join_config(tmp_path, batch_rows=7, max_state_rows=60)) as join:
        assert join.batch == before
        join.run(through=at(4 * 3600))
    assert [row["example_id"] for row in read(tmp_path, "examples")] == list(range(120))


def test_one_process_at_a_time_and_one_config(tmp_path):
    with FeedbackJoin(join_config(tmp_path)), pytest.raises(DataError, match="another process runs this join"):
        FeedbackJoin(join_config(tmp_path))
    tasks = {**join_config().dump()["tasks"], "buy": {"window": "41s"}}
    with pytest.raises(DataError, match=r"was joined with another 'tasks\.buy\.window'"):
        FeedbackJoin(join_config(tmp_path, tasks=tasks))
    with pytest.raises(DataError, match=r"was joined with another 'late'"):
        FeedbackJoin(join_config(tmp_path, late="correct"))
    FeedbackJoin(join_config(tmp_path, batch_rows=3, max_state_rows=9)).close()


def test_damage_is_named(tmp_path):
    with FeedbackJoin(join_config(tmp_path)) as join:
        join.process(impressions((1, 0)))
    (segment,) = (tmp_path / "state").glob("*.arrow")
    segment.write_bytes(segment.read_bytes()[:100])
    with pytest.raises(DataError, match=rf"{segment.name}: is missing or damaged .* join anew"):
        FeedbackJoin(join_config(tmp_path))
    (tmp_path / "journal.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(DataError, match=r"journal\.sqlite: is damaged"):
        FeedbackJoin(join_config(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        FeedbackJoin(join_config(tmp_path / "file"))


@pytest.mark.parametrize("blocked", ["rejects", "complete", "counts.jsonl"])
def test_a_disk_error_after_the_commit_leaves_the_committed_batch_alone(tmp_path, blocked):
    """Files where folders belong, or the other way round, stop the moving of what is committed."""
    config, obstacle = join_config(tmp_path), tmp_path / blocked
    with FeedbackJoin(config) as join:
        join.process(impressions((1, 0), (2, 1)))
        counts = (tmp_path / "counts.jsonl").read_text()
        if blocked == "counts.jsonl":
            obstacle.unlink()
            obstacle.mkdir()
        else:
            obstacle.write_text("")
        shown = impressions((3, 9000), (4, 9001))
        with pytest.raises(BatchCommitted, match="batch 2 is committed; open the join again"):
            join.process(shown, {"other": others(("a", 1, 3, "spent", None))}, offsets={"shown": 4}, through=at(9000))
        with pytest.raises(DataError, match="the join is closed; open it again"):
            join.process(impressions((5, 9002), (6, 9003)))
        with pytest.raises(DataError, match="the join is closed; open it again"):
            _ = join.offsets
    # As long as it is so, the join cannot be opened; the refusal does not keep the folder.
    with pytest.raises((DataError, CapacityError), match=r"cannot be written|cannot write"):
        FeedbackJoin(config)
    obstacle.rmdir() if blocked == "counts.jsonl" else obstacle.unlink()
    with FeedbackJoin(config) as join:
        assert (join.batch, join.offsets) == (2, {"shown": 4})
        assert join.state.index.example_id.tolist() == [3, 4]
        assert join.process(impressions((5, 9002)))["open"] == 3
    assert [row["example_id"] for row in read(tmp_path, "examples")] == [1, 2]
    assert [row["event_id"] for row in read(tmp_path, "rejects/read/other")] == ["a"]
    assert json.loads((tmp_path / "complete" / "period=2023-11-14T22.json").read_text())["rows"] == 2
    lines = (tmp_path / "counts.jsonl").read_text()
    assert lines.startswith(counts)
    assert [json.loads(line)["batch"] for line in lines.splitlines()] == [1, 2, 3]


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("tasks.click.window=0m", r"'tasks\.click\.window': is zero"),
        ("tasks.click.window=30", r"'tasks\.click\.window': write a number and a unit"),
        ("tasks.click.window=soon", r"'tasks\.click\.window': write a number and a unit"),
        ("lateness=-5m", r"'lateness': is negative"),
        ("impressions.disorder=-1s", r"'impressions\.disorder': is negative"),
        ("before=20000d", r"'before': is longer than ten years"),
        ("feedback.clicks.task=clik", r"feedback\.clicks\.task: 'clik' is not one of the tasks; did you mean 'click'"),
        ("tasks.like={window: 5m}", r"no stream of feedback has task 'like'"),
        ("tasks.click.label=max", r"task 'click': label 'max' needs values, and no stream of it names a 'value'"),
        ("tasks.click.default=1", "label any with default 1"),
        ("tasks.click.default=.inf", "default is not finite"),
        ("tasks.user_id={window: 5m}", r"task 'user_id': the name is reserved"),
        ("feedback.impressions={path: x}", r"a stream of feedback cannot be called 'impressions'"),
        ("late=ignore", r"'late': Input should be 'drop' or 'correct'"),
        ("emit=sometimes", "'emit': Input should be 'complete' or 'per_task'"),
        ("max_state_rows=0", "'max_state_rows': Input should be greater than 0"),
        ("lateness_=1m", "unknown key 'lateness_'; did you mean 'lateness'"),
        ("impressions.id=a", r"unknown key 'impressions\.id'"),
    ],
)
def test_configs_that_are_refused(tmp_path, change, message):
    feedback = {"clicks": {"path": "clicks", "task": "click"}}
    path = tmp_path / "join.yaml"
    write_yaml(join_config(feedback=feedback, tasks={"click": {"window": "5m"}}), path)
    assert load_augment(path).tasks["click"].window == "5m"
    with pytest.raises(ConfigError, match=message):
        load_augment(path, [change])


def test_a_config_without_tasks_or_streams(tmp_path):
    path = tmp_path / "join.yaml"
    path.write_text("root: x\nimpressions: {path: a}\nfeedback: {}\ntasks: {}\n")
    with pytest.raises(ConfigError, match=r"'feedback': Dictionary should have at least 1"):
        load_augment(path)
