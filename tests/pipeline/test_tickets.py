from __future__ import annotations

import threading
import time

import pytest
from example_store import write_store

from rayfm.config import DataError, LabelError, RayfmError
from rayfm.pipeline.config import LabelsConfig
from rayfm.pipeline.tickets import Tickets, TrainerTickets, check_order, metadata_path
from rayfm.snapshots import SQLiteMetadataStore
from rayfm.training.spec import PinnedLabels

PERIODS = ("2024-01-01", "2024-01-02", "2024-01-03", "2024-01-04")


@pytest.fixture
def tickets(tmp_path):
    return Tickets(SQLiteMetadataStore(metadata_path(tmp_path)), "run")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store"), list(PERIODS), impressions=8)


def labelled(tickets: Tickets, period: str, coverage: float = 1.0, teacher: str = "fm") -> None:
    ticket = {"version": f"{period}-v", "table_version": 3, "coverage": {"impression": coverage, "consideration": 0.0}}
    tickets.put("labelled", teacher, period, ticket)


def test_a_ticket_is_there_once_it_is_put(tickets):
    assert tickets.get("trained", "fm", "2024-01-01") is None
    tickets.put("trained", "fm", "2024-01-01", {"versions": {"fm": "v1"}})
    assert tickets.get("trained", "fm", "2024-01-01") == {"versions": {"fm": "v1"}}
    assert tickets.get("labelled", "fm", "2024-01-01") is None
    assert tickets.get("trained", "vm", "2024-01-01") is None
    tickets.put("trained", "fm", "2024-01-01", {"versions": {"fm": "v2"}})
    assert tickets.get("trained", "fm", "2024-01-01") == {"versions": {"fm": "v2"}}


def test_tickets_outlive_the_process_and_runs_do_not_mix(tmp_path, tickets):
    tickets.put("trained", "fm", "2024-01-01", {"a": 1})
    again = SQLiteMetadataStore(metadata_path(tmp_path))
    assert Tickets(again, "run").get("trained", "fm", "2024-01-01") == {"a": 1}
    assert Tickets(again, "other").get("trained", "fm", "2024-01-01") is None


def test_many_writers_of_one_ticket(tickets):
    def put(value: int) -> None:
        for _ in range(10):
            tickets.put("trained", "fm", "p", {"value": value})

    threads = [threading.Thread(target=put, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tickets.get("trained", "fm", "p")["value"] in range(4)


def test_wait_returns_what_another_thread_puts(tickets):
    later = threading.Timer(0.15, tickets.put, ("trained", "fm", "p", {"a": 1}))
    later.start()
    assert tickets.wait("trained", "fm", "p") == {"a": 1}
    later.join()


def test_wait_gives_up_at_its_time_limit(tickets):
    started = time.monotonic()
    assert tickets.wait("trained", "fm", "p", timeout=0.1) is None
    assert time.monotonic() - started >= 0.1
    assert tickets.wait("trained", "fm", "p", timeout=0.0) is None


def test_a_failure_ends_every_wait(tickets):
    later = threading.Timer(0.1, tickets.fail, ("vm", "no labels"))
    later.start()
    with pytest.raises(RayfmError, match="stopped because vm failed: no labels"):
        tickets.wait("trained", "fm", "p")
    later.join()


def test_the_first_failure_stands_until_it_is_cleared(tickets):
    tickets.fail("vm", "the cause")
    tickets.fail("fm", "a consequence")
    assert tickets.failure() == {"who": "vm", "message": "the cause"}
    tickets.put("trained", "fm", "p", {})
    assert tickets.wait("trained", "fm", "p") == {}, "what stands is given even so"
    tickets.clear_failure()
    assert tickets.failure() is None
    tickets.check()
    tickets.clear_failure()


def test_the_first_period_has_no_labels(tickets, store):
    trainer = TrainerTickets(tickets, "vm", store, PERIODS, teachers=("fm",), labels=LabelsConfig(wait=0.0))
    labelled(tickets, PERIODS[0])
    assert trainer.wait_labels(PERIODS[0]) == {}


def test_labels_are_pinned_by_teacher(tickets, store):
    trainer = TrainerTickets(tickets, "vm", store, PERIODS, teachers=("fm", "big"), labels=LabelsConfig(wait=0.0))
    labelled(tickets, PERIODS[1])
    labelled(tickets, PERIODS[1], teacher="big")
    pinned = PinnedLabels(version="2024-01-02-v", table_version=3)
    assert trainer.wait_labels(PERIODS[1]) == {"fm": pinned, "big": pinned}


def test_too_little_coverage_fails(tickets, store):
    labels = LabelsConfig(min_coverage=0.9, wait=0.0)
    trainer = TrainerTickets(tickets, "vm", store, PERIODS, teachers=("fm",), labels=labels)
    labelled(tickets, PERIODS[1], coverage=0.9)
    assert set(trainer.wait_labels(PERIODS[1])) == {"fm"}
    labelled(tickets, PERIODS[2], coverage=0.875)
    with pytest.raises(LabelError) as error:
        trainer.wait_labels(PERIODS[2])
    message = str(error.value)
    assert "vm: labels of fm for period 2024-01-03 cover 87.5% of the impressions" in message
    assert "min_coverage 90.0%" in message
    assert "\n" not in message


def test_labels_that_do_not_come_fail(tickets, store):
    trainer = TrainerTickets(tickets, "vm", store, PERIODS, teachers=("fm",), labels=LabelsConfig(wait=0.05))
    with pytest.raises(LabelError, match=r"labels of fm for period 2024-01-02 are not there after 0\.05 s"):
        trainer.wait_labels(PERIODS[1])


def test_train_without_leaves_the_teacher_out_and_says_so(tickets, store):
    labels = LabelsConfig(min_coverage=0.9, wait=0.0, on_missing="train_without")
    trainer = TrainerTickets(tickets, "vm", store, PERIODS, teachers=("fm", "big"), labels=labels)
    labelled(tickets, PERIODS[1])
    labelled(tickets, PERIODS[1], coverage=0.5, teacher="big")
    assert set(trainer.wait_labels(PERIODS[1])) == {"fm"}
    assert tickets.get("without", "vm.big", PERIODS[1]) == {"reason": "cover 50.0% of the impressions"}
    assert trainer.wait_labels(PERIODS[2]) == {}
    assert tickets.get("without", "vm.fm", PERIODS[2]) == {"reason": "are not there"}


def test_a_teacher_runs_at_most_one_period_ahead_of_its_labels(tickets, store):
    teacher = TrainerTickets(tickets, "fm", store, PERIODS, labelled=PERIODS[1:])
    teacher.wait_prepared(PERIODS[0])
    teacher.wait_prepared(PERIODS[1])
    passed = threading.Event()

    def go_on() -> None:
        teacher.wait_prepared(PERIODS[2])
        passed.set()

    thread = threading.Thread(target=go_on)
    thread.start()
    assert not passed.wait(0.2), "the labels of the second period need the snapshot of the first"
    labelled(tickets, PERIODS[1])
    assert passed.wait(5)
    thread.join()


def test_a_teacher_that_labels_nothing_waits_for_nothing(tickets, store):
    TrainerTickets(tickets, "fm", store, PERIODS).wait_prepared(PERIODS[3])


def test_a_period_that_is_not_prepared(tickets, store):
    trainer = TrainerTickets(tickets, "vm", store, (*PERIODS, "2024-01-05"), prepare_timeout=0.0)
    with pytest.raises(DataError, match="period 2024-01-05 is not in the store; run `rayfm prepare`"):
        trainer.wait_prepared("2024-01-05")
    patient = TrainerTickets(tickets, "vm", store, (*PERIODS, "2024-01-05"))
    tickets.fail("prepare", "disk full")
    with pytest.raises(RayfmError, match="prepare failed: disk full"):
        patient.wait_prepared("2024-01-05")
    assert patient.stopped()


def test_a_trainer_tells_what_it_trained_and_why_it_stopped(tickets, store):
    trainer = TrainerTickets(tickets, "vm", store, PERIODS)
    assert not trainer.stopped()
    trainer.trained(PERIODS[0], {"vm.none.1": "v"})
    assert tickets.get("trained", "vm", PERIODS[0]) == {"versions": {"vm.none.1": "v"}}
    trainer.failed("it diverged")
    assert trainer.stopped()
    assert tickets.failure() == {"who": "vm", "message": "it diverged"}


def test_periods_go_forward():
    check_order(PERIODS)
    check_order(())
    for wrong in (("2024-01-02", "2024-01-01"), ("2024-01-01", "2024-01-01")):
        with pytest.raises(DataError, match=f"period 2024-01-01 comes after {wrong[0]}"):
            check_order(wrong)
