"""The join of batches: windows, late feedback, bad rows, configs that are refused."""

from __future__ import annotations

import pyarrow as pa
import pytest
from feedback_streams import S, join_config
from feedback_tables import HOUR, T0, at, clicks, impressions, others, read

from rayfm.augment.config import load_augment
from rayfm.augment.join import FeedbackJoin
from rayfm.config import CapacityError, ConfigError, DataError, write_yaml


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
