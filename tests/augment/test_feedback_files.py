"""The join on disk: files in, files out, restarts, refusals."""

from __future__ import annotations

import json
import sqlite3

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feedback_streams import join_config
from feedback_tables import at, clicks, impressions, log_files, others, read, write

from rayfm.augment.join import FeedbackJoin
from rayfm.augment.journal import BatchCommitted
from rayfm.config import CapacityError, DataError
from rayfm.data.sources.parquet import ParquetConfig, ParquetSource
from rayfm.schema import Schema


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
