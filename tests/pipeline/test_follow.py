"""Which periods a following run takes, when, and who may be how far ahead: without Ray."""

from __future__ import annotations

import datetime
import threading

import pyarrow.parquet as pq
import pytest
from example_store import DAY_US, every_feature_rows, write_store
from small_pipeline import FIRST_DAY_US, small_pipeline, write_log

from rayfm.config import ConfigError, DataError, RayfmError
from rayfm.data.sources.base import SOURCES, Period
from rayfm.pipeline.follow import (
    Admission,
    Arrival,
    Follower,
    FollowingTickets,
    LatePeriodError,
    Stream,
    complete_in_source,
    complete_in_store,
    complete_periods,
    lag,
)
from rayfm.pipeline.plan import choose_periods
from rayfm.pipeline.stream import Pipeline
from rayfm.pipeline.tickets import Tickets, metadata_path
from rayfm.snapshots import SQLiteMetadataStore
from rayfm.training.follow import StopRequested

DAY = 86_400.0
DAYS = [f"2024-01-{day:02d}" for day in range(1, 10)]


def arrival(day: int, at: float = 0.0) -> Arrival:
    """The ``day``-th day as a complete period; its times are in days."""
    return Arrival(DAYS[day - 1], (day - 1) * DAY, day * DAY, at)


@pytest.fixture
def tickets(tmp_path):
    return Tickets(SQLiteMetadataStore(metadata_path(tmp_path)), "run")


# -- which periods are complete -----------------------------------------------------------------------------------


def period(day: int) -> Period:
    start = datetime.datetime(2024, 1, day, tzinfo=datetime.UTC)
    return Period(name=DAYS[day - 1], start=start, end=start + datetime.timedelta(days=1))


def test_a_sources_newest_period_is_complete_when_a_later_one_began_or_its_time_is_over():
    periods = [period(1), period(2), period(3)]
    end = periods[2].end.timestamp()

    def names(prepared=(), close_after_s=None, now=end):
        return [found.period for found in complete_in_source(periods, set(prepared), close_after_s, now)]

    assert names() == DAYS[:2]
    assert names(prepared=[DAYS[2]]) == DAYS[:3], "a manifest in the store declares it complete"
    assert names(close_after_s=60.0, now=end + 59.0) == DAYS[:2]
    assert names(close_after_s=60.0, now=end + 60.0) == DAYS[:3]
    assert complete_in_source([], set(), None, end) == []


def test_a_stores_complete_periods_are_those_with_a_manifest(tmp_path):
    store = write_store(tmp_path, DAYS[:3], impressions=8, lanes=4)
    (store.period_dir(DAYS[1]) / "manifest.json").unlink()
    found = complete_in_store(store, 4, [DAYS[0]])
    assert [each.period for each in found] == [DAYS[2]]
    assert found[0].start == datetime.datetime(2024, 1, 3, tzinfo=datetime.UTC).timestamp()
    with pytest.raises(DataError, match=r"period=2024-01-03: has 4 lanes, and data\.lanes is 8"):
        complete_in_store(store, 8, [DAYS[0]])


# -- in which order they are taken --------------------------------------------------------------------------------


def test_what_follows_directly_is_taken_at_once_and_in_order():
    admission = Admission(600.0, "log")
    found = admission.admit([arrival(1), arrival(2), arrival(3)], [DAYS[0]], DAY, now=0.0)
    assert [each.period for each in found] == DAYS[1:3]


def test_after_a_gap_a_period_waits_for_what_may_fill_it():
    admission = Admission(600.0, "log")
    late = [arrival(1), arrival(3), arrival(4)]
    assert admission.admit(late, [DAYS[0]], DAY, now=0.0) == []
    assert admission.admit(late, [DAYS[0]], DAY, now=599.0) == []
    filled = [arrival(1), arrival(2), arrival(3), arrival(4)]
    assert [each.period for each in admission.admit(filled, [DAYS[0]], DAY, now=599.5)] == DAYS[1:4]


def test_a_gap_that_nothing_fills_is_left_behind():
    admission = Admission(600.0, "log")
    late = [arrival(1), arrival(3), arrival(4)]
    admission.admit(late, [DAYS[0]], DAY, now=0.0)
    assert [each.period for each in admission.admit(late, [DAYS[0]], DAY, now=600.0)] == DAYS[2:4]


def test_a_period_before_what_was_taken_is_refused_by_name():
    with pytest.raises(LatePeriodError, match="log: period 2024-01-02 is complete now, and the run has gone on to"):
        Admission(600.0, "log").admit([arrival(1), arrival(2), arrival(3)], [DAYS[0], DAYS[2]], 3 * DAY, now=0.0)
    with pytest.raises(LatePeriodError, match="period 2024-01-01 is complete now"):
        Admission(600.0, "log").admit([arrival(1), arrival(2)], [DAYS[1]], 2 * DAY, now=0.0)


# -- the durable list -----------------------------------------------------------------------------------------------


def test_the_stream_outlives_the_process_in_order(tickets, tmp_path):
    stream = Stream(tickets)
    for place in range(9):
        stream.append(place, arrival(place + 1, at=float(place)))
    again = Stream(Tickets(SQLiteMetadataStore(metadata_path(tmp_path)), "run"))
    assert again.arrivals() == [arrival(day, at=day - 1.0) for day in range(1, 10)]
    assert (again.at(3), again.at(9)) == (DAYS[3], None)
    assert not again.ended()
    stream.end()
    assert again.ended()
    stream.go_on()
    stream.go_on()
    assert not again.ended()
    assert Stream(Tickets(tickets.metadata, "other")).arrivals() == []


def test_lag_counts_periods_and_seconds_of_the_data():
    taken = [arrival(1), arrival(2), arrival(3)]
    found = lag("fm", 3, taken, arrival(3))
    assert (found.periods, found.seconds, found.trained, str(found)) == (0, 0.0, DAYS[2], "up to date")
    found = lag("fm", 1, taken, arrival(3))
    assert (found.periods, found.seconds, found.trained) == (2, 2 * DAY, DAYS[0])
    assert str(found) == "2 periods behind (172,800 s)"
    found = lag("fm", 0, taken, arrival(5))
    assert (found.periods, found.seconds, found.trained) == (4, 5 * DAY, None), "the newest is not yet taken"


# -- what a trainer is told -----------------------------------------------------------------------------------------


def in_thread(work):
    """``work`` in a thread; a list that gets its result, and the thread."""
    results: list = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return results, thread


def test_the_next_period_is_waited_for(tickets, tmp_path):
    stream, store = Stream(tickets), write_store(tmp_path, DAYS[:1], impressions=8)
    stream.append(0, arrival(1))
    trainer = FollowingTickets(tickets, "fm", store, (DAYS[0],), labels_on=True)
    results, thread = in_thread(lambda: trainer.next_period(DAYS[0]))
    thread.join(0.4)
    assert not results
    stream.append(1, arrival(2))
    thread.join(5)
    assert results == [DAYS[1]]
    assert trainer.periods == tuple(DAYS[:2])
    assert trainer.labelled == (DAYS[1],)
    stream.end()
    assert trainer.next_period(DAYS[0]) == DAYS[1]
    assert trainer.next_period(DAYS[1]) is None


@pytest.mark.parametrize("how", ["stop", "fail"])
def test_waiting_for_the_next_period_ends_with_the_run(tickets, tmp_path, how):
    store = write_store(tmp_path, DAYS[:1], impressions=8)
    trainer = FollowingTickets(tickets, "fm", store, (DAYS[0],))
    results, thread = in_thread(lambda: trainer.next_period(DAYS[0]))
    if how == "stop":
        tickets.stop()
    else:
        tickets.fail("vm", "it diverged")
    thread.join(5)
    assert isinstance(results[0], StopRequested if how == "stop" else RayfmError)
    assert trainer.stopping() == (how == "stop")
    tickets.clear_stop()
    assert not trainer.stopping()


def test_a_teacher_waits_for_trainers_that_are_too_far_behind(tickets, tmp_path):
    store = write_store(tmp_path, DAYS[:5], impressions=8)
    teacher = FollowingTickets(tickets, "fm", store, tuple(DAYS[:5]), readers={"vm": DAYS[0], "late": DAYS[2]}, ahead=2)
    teacher.wait_prepared(DAYS[0])
    teacher.wait_prepared(DAYS[1])
    results, thread = in_thread(lambda: teacher.wait_prepared(DAYS[2]))
    thread.join(0.2)
    assert not results, "vm has not trained the first period"
    tickets.put("trained", "vm", DAYS[0], {})
    thread.join(5)
    assert results == [None], "a trainer that begins later is not waited for before that"
    tickets.put("trained", "vm", DAYS[1], {})
    tickets.put("trained", "vm", DAYS[2], {})
    teacher.wait_prepared(DAYS[3])
    results, thread = in_thread(lambda: teacher.wait_prepared(DAYS[4]))
    thread.join(0.2)
    assert not results
    tickets.put("trained", "late", DAYS[2], {})
    thread.join(5)
    assert results == [None]


# -- the follower -----------------------------------------------------------------------------------------------------


class Followed:
    """A follower over a log that grows a file a day, whose preparation only writes down what it was asked for."""

    def __init__(self, folder, **follow):
        self.folder, self.done, self.prepared, self.taken = folder, 0, [], []
        write_log(folder / "log", rows=8)  # three days, of which two are complete
        self.config = small_pipeline(folder, follow=follow)
        self.tickets = Tickets(SQLiteMetadataStore(metadata_path(folder)), "run")
        self.stream = Stream(self.tickets)
        self.pipeline = Pipeline(self.config, follow=True)
        for place, each in enumerate(self.pipeline.arrivals):
            self.stream.append(place, each)
        self.follower = Follower(
            self.config, self.stream, self.pipeline.store, self._prepare, lambda: self.done, self.taken.append
        )

    def _prepare(self, source, periods):
        self.prepared += periods
        for name in periods:
            path = self.pipeline.store.period_dir(name) / "manifest.json"
            path.parent.mkdir(parents=True)
            path.touch()

    def grow(self, day: int) -> None:
        table = every_feature_rows(8, seed=day, start=FIRST_DAY_US + (day - 1) * DAY_US)
        pq.write_table(table, self.folder / "log" / f"{DAYS[day - 1]}.parquet")

    def names(self) -> list[str]:
        return [each.period for each in self.stream.arrivals()]


def test_a_growing_log_is_taken_and_prepared_as_far_as_trainers_keep_up(tmp_path):
    log = Followed(tmp_path, ahead=2)
    assert log.names() == DAYS[:2]
    assert not log.follower.look()
    assert log.prepared == DAYS[:2]
    log.grow(4)
    log.grow(5)
    log.follower.look()
    assert log.names() == DAYS[:4]
    assert [each.period for each in log.taken] == DAYS[2:4]
    assert log.prepared == DAYS[:2], "the slowest trainer has finished none: at most two ahead"
    log.done = 1
    log.follower.look()
    assert log.prepared == DAYS[:3]
    assert log.stream.newest().period == DAYS[3]
    log.done = 3
    log.follower.look()
    assert log.prepared == DAYS[:4]


def test_a_day_that_is_filled_in_later_ends_the_run_with_its_name(tmp_path):
    log = Followed(tmp_path, gap_s=0.0)
    log.grow(6)
    log.grow(7)
    log.follower.look()
    assert log.names() == [*DAYS[:3], DAYS[5]]
    log.grow(4)
    with pytest.raises(
        LatePeriodError, match="period 2024-01-04 is complete now, and the run has gone on to 2024-01-06"
    ):
        log.follower.look()


def test_a_file_that_is_being_written_is_tried_again(tmp_path):
    log = Followed(tmp_path, gap_s=600.0)
    half = tmp_path / "log" / "2024-01-04.parquet"
    half.write_bytes(b"PAR1")
    assert not log.follower.look()
    log.grow(4)
    log.follower.look()
    assert log.names() == DAYS[:3]


def test_a_file_that_stays_unreadable_is_an_error(tmp_path):
    log = Followed(tmp_path, gap_s=0.0)
    (tmp_path / "log" / "2024-01-04.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="2024-01-04"):
        log.follower.look()


def test_the_schedules_last_period_ends_the_stream(tmp_path):
    log = Followed(tmp_path, poll_s=0.01)
    config = log.config.model_copy(update={"schedule": log.config.schedule.model_copy(update={"last": DAYS[2]})})
    log.follower.config = config
    log.grow(4)
    log.grow(5)
    results, thread = in_thread(log.follower.run)
    thread.join(1)
    assert not results, "what is taken is not yet all prepared"
    log.done = 1
    thread.join(10)
    assert results == [None]
    assert log.names() == DAYS[:3]
    assert log.stream.ended()


def test_a_stop_ends_the_follower_and_leaves_the_stream_open(tmp_path):
    log = Followed(tmp_path, poll_s=60.0)
    results, thread = in_thread(log.follower.run)
    log.tickets.stop()
    thread.join(5)
    assert results == [None]
    assert not log.stream.ended()


def test_others_prepare(tmp_path):
    config = small_pipeline(tmp_path, follow={"prepare": False}, data={"source": {"path": str(tmp_path / "gone")}})
    with pytest.raises(ConfigError, match="no period is complete yet"):
        Pipeline(config, follow=True)
    store = write_store(tmp_path / "data", DAYS[:2], impressions=8, lanes=4)
    pipeline = Pipeline(config, follow=True)
    assert pipeline.periods == tuple(DAYS[:2])
    assert all(spec.follow for spec in pipeline.specs)
    pipeline.open(resume=False, overwrite=False)
    follower = Follower(config, pipeline.stream, store, _never, lambda: 0, pipeline.take)
    write_store(tmp_path / "data", DAYS[:4], impressions=8, lanes=4)
    # Their manifests say that each begins where it ends, so nothing joins up: all but the next wait for the gap.
    follower._admission.gap_s = 0.0
    assert not follower.look()
    assert pipeline.periods == tuple(DAYS[:4])
    assert [spec.periods[-1] for spec in pipeline.specs] == [DAYS[3]] * 2
    assert Pipeline(config).periods == tuple(DAYS[:4]), "without --follow: what the stream holds"


def _never(source, periods):
    raise AssertionError("nothing is prepared here")


# -- the plan ---------------------------------------------------------------------------------------------------------


def test_a_stream_needs_no_test_period_to_begin_with(tmp_path):
    config = small_pipeline(tmp_path, schedule={"warmup": 3, "last": DAYS[8]})
    assert choose_periods(config, DAYS[:2], open_end=True) == tuple(DAYS[:2])
    with pytest.raises(ConfigError, match="no period is complete yet"):
        choose_periods(config, [], open_end=True)


def test_a_run_that_did_not_follow_can_begin_to(tmp_path):
    config = small_pipeline(tmp_path)
    first = Pipeline(config)
    first.open(resume=False, overwrite=False)
    assert first.periods == tuple(DAYS[:3])
    write_store(
        tmp_path / "data", DAYS[2:3], impressions=8, lanes=4
    )  # it has prepared, and perhaps trained, the newest
    follows = Pipeline(config, follow=True)
    follows.open(resume=True, overwrite=False)
    assert follows.periods == tuple(DAYS[:3])
    assert [each.period for each in follows.stream.arrivals()] == DAYS[:3]
    other = small_pipeline(tmp_path, follow={"ahead": 5})
    Pipeline(other, follow=True).open(resume=True, overwrite=False)  # how it looks for periods may change
    assert SOURCES.build(config.data.source, config.schema_).periods()[-1].name == DAYS[2]


def test_overwriting_forgets_the_stream(tmp_path):
    config = small_pipeline(tmp_path)
    pipeline = Pipeline(config, follow=True)
    pipeline.open(resume=False, overwrite=False)
    (tmp_path / "log" / f"{DAYS[0]}.parquet").unlink()
    again = Pipeline(config, follow=True, anew=True)
    assert again.periods == (DAYS[1],)
    again.open(resume=False, overwrite=True)
    assert [each.period for each in again.stream.arrivals()] == [DAYS[1]]


def test_lag_of_a_pipeline_and_its_file(tmp_path):
    config = small_pipeline(tmp_path)
    pipeline = Pipeline(config, follow=True)
    pipeline.open(resume=False, overwrite=False)
    found = pipeline.lags()
    assert {name: (each.periods, each.seconds) for name, each in found.items()} == {
        "fm": (2, 2 * DAY),
        "students": (2, 2 * DAY),
    }
    for spec in pipeline.specs[:1]:
        path = spec.folder / "periods" / f"{DAYS[0]}.json"
        path.parent.mkdir(parents=True)
        record = {"trainer": spec.name, "period": DAYS[0], "examples": 8, "seconds": 1.0, "parts": {}, "losses": {}}
        import json

        path.write_text(json.dumps({**record, "versions": {}}))
    pipeline.write_events()
    lines = [json.loads(line) for line in (pipeline.run_dir / "progress.jsonl").read_text().splitlines()]
    assert [(e["period"], e["at"] > 0) for e in lines if e["event"] == "arrived"] == [(DAYS[0], True), (DAYS[1], True)]
    (trained,) = [event for event in lines if event["event"] == "trained"]
    assert 0 <= trained["delay_s"] < 60
    behind = {event["trainer"]: event for event in lines if event["event"] == "lag"}
    assert behind["fm"] == {
        "event": "lag", "period": DAYS[1], "trainer": "fm", "newest": DAYS[1], "trained": DAYS[0], "periods": 1,
        "seconds": DAY,
    }  # fmt: skip
    assert behind["students"]["periods"] == 2


def test_complete_periods_keep_to_the_schedule(tmp_path):
    config = small_pipeline(tmp_path, schedule={"first": DAYS[1], "last": DAYS[4]})
    pipeline = Pipeline(config, follow=True)
    source = SOURCES.build(config.data.source, config.schema_)
    assert [each.period for each in complete_periods(config, pipeline.store, source)] == [DAYS[1]]
