"""The queue of near-line labelling, in a real Redis, and its consumer without Ray and Celery."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from nearline_cases import (
    TEACHER,
    V1,
    Oracle,
    config,
    queued,
    rows,
    until,
)

from rayfm.config import CapacityError
from rayfm.serving.nearline.application import autoscaling
from rayfm.serving.nearline.consumer import NearLineConsumer, NotLabelled
from rayfm.serving.nearline.doorbell import Doorbell, sweep
from rayfm.serving.nearline.labels import NearLineLabels
from rayfm.serving.nearline.spool import Spool

# The queue, in a real Redis.


@pytest.fixture
def settings(root, redis_server, request):
    name = "".join(letter for letter in request.node.name if letter.isalnum())[:60]
    return config(root, run=name, redis=f"redis://{redis_server.address}/0", consumer={"sweep_s": 10.0, "stall_s": 61})


@pytest.fixture
def doorbell(settings):
    made = Doorbell(settings)
    yield made
    made.close()


def test_messages_carry_tickets_and_their_time(doorbell):
    assert doorbell.oldest() is None
    before = time.time()
    tickets = [f"ticket{number}" for number in range(3)]
    for ticket in tickets:
        doorbell.ring(ticket)
    assert doorbell.waiting() == 3
    assert before <= doorbell.oldest() <= time.time()


def test_the_sweeper_rings_for_what_was_lost_and_for_nothing_else(settings, doorbell):
    spool = Spool(settings.root, TEACHER)
    ticket = queued(spool)
    now = time.time()
    assert sweep(spool, doorbell, settings, now + 5) == 0, "its message may be on its way"
    assert sweep(spool, doorbell, settings, now + 11) == 1, "no message waits: it was lost"
    assert doorbell.waiting() == 1
    assert sweep(spool, doorbell, settings, time.time() + 1000) == 0, "its message waits, however long"
    doorbell._redis.delete(settings.queue)
    assert sweep(spool, doorbell, settings, time.time() + 11) == 1
    spool.note(ticket, "delivered")
    assert sweep(spool, doorbell, settings, time.time() + 1) == 0


def test_a_message_that_was_overtaken_is_lost(settings, doorbell):
    """What was sent before the message that is next, and is not in work, will never come."""
    spool = Spool(settings.root, TEACHER)
    lost, waits = queued(spool), queued(spool)
    doorbell.ring(waits)
    assert sweep(spool, doorbell, settings, time.time() + 100) == 0, "both may have been sent at the same time"
    path = spool.folder / "queued" / f"{lost}.arrow"
    os.utime(path, (time.time() - 60, time.time() - 60))
    assert sweep(spool, doorbell, settings, time.time() + 100) == 1
    assert doorbell.waiting() == 2


def test_what_only_fails_is_given_up_in_the_end(settings, doorbell):
    spool = Spool(settings.root, TEACHER)
    failing, waiting = queued(spool), queued(spool)
    spool.note(failing, "delivered")
    spool.note(failing, "failed", why="the service is down", lasting=False)
    sweep(spool, doorbell, settings, time.time() + settings.consumer.give_up_s - 5)
    assert spool.status(failing).state == "queued"
    sweep(spool, doorbell, settings, time.time() + settings.consumer.give_up_s + 5)
    assert spool.status(failing).state == "dead"
    assert "the service is down (still, 86400 s after" in spool.status(failing).reason
    assert spool.status(waiting).state == "queued", "what merely waits has not failed"


def test_a_redis_that_restarts_is_found_again(settings, doorbell, redis_server):
    doorbell.ring("before")
    redis_server.kill()
    try:
        started = time.monotonic()
        with pytest.raises(CapacityError, match=r"Redis at 127\.0\.0\.1:[0-9]+ does not answer"):
            doorbell.ring("meanwhile")
        with pytest.raises(CapacityError, match="does not answer"):
            doorbell.waiting()
        assert time.monotonic() - started < 30, "nobody hangs on a dead Redis"
    finally:
        redis_server.start()
    doorbell.ring("after")
    assert doorbell.waiting() == 2, "the append-only file kept the first"


def test_ray_serve_counts_the_same_queue(settings, doorbell):
    """The name and the address that the autoscaling policy is given lead to our messages."""
    several = settings.model_copy(
        update={"consumer": settings.consumer.model_copy(update={"max_replicas": 3, "queue_per_replica": 2})}
    )
    options = autoscaling(several)["autoscaling_config"]
    assert (options.min_replicas, options.max_replicas) == (1, 3)
    policy = options.policy.get_policy()
    policy = policy(**options.policy.policy_kwargs) if isinstance(policy, type) else policy
    for number in range(5):
        doorbell.ring(f"ticket{number}")
    context = SimpleNamespace(current_num_replicas=1, total_num_requests=0, config=options)

    async def decide():
        policy(context)
        for _ in range(100):
            await asyncio.sleep(0.01)
            if policy._queue_length:
                break
        return policy(context)

    wanted, state = asyncio.run(decide())
    assert state == {"queue_length": 5}
    assert wanted == 2.5, "five messages, two for each consumer"
    assert autoscaling(settings) == {"num_replicas": 1}


# The consumer, without its Ray and its Celery.


@pytest.fixture
def consumer(settings):
    oracle = Oracle()
    made = NearLineConsumer(settings.dump(), "none", oracle)
    made.oracle = oracle
    yield made
    made.stop()


def test_a_consumer_labels_a_ticket_and_forgets_one_that_is_done(consumer, settings):
    ticket = queued(consumer.spool, 4)
    consumer.label(ticket)
    assert consumer.spool.status(ticket).state == "committed"
    assert NearLineLabels(settings.root).rows(TEACHER)["example_id"].to_pylist() == [0, 1, 2, 3]
    consumer.label(ticket)
    assert consumer.oracle.asked == [4]
    consumer.check_health()


def test_a_ticket_that_keeps_failing_is_a_dead_letter_that_can_be_replayed(consumer, settings):
    ticket = queued(consumer.spool, 4)
    consumer.oracle.poison = {2}
    for _ in range(settings.consumer.retries):
        with pytest.raises(NotLabelled, match="index out of range"):
            consumer.label(ticket)
    consumer.label(ticket)  # the last time: there is nothing to try again
    status = consumer.spool.status(ticket)
    assert (status.state, status.reason) == ("dead", "RuntimeError: index out of range")
    consumer.label(ticket)
    assert consumer.spool.dead_rows(ticket).table.num_rows == 4
    consumer.oracle.poison = set()
    consumer.spool.replay(ticket)
    consumer.label(ticket)
    assert consumer.spool.status(ticket).state == "committed"
    assert NearLineLabels(settings.root).rows(TEACHER).num_rows == 4


def test_a_ticket_in_hand_is_neither_rung_for_nor_given_up_while_the_teacher_hangs(consumer, settings, monkeypatch):
    ticket = queued(consumer.spool, 4)
    hangs, asked = threading.Event(), threading.Event()

    def score(table, version):
        asked.set()
        assert hangs.wait(20)
        raise TimeoutError("no answer")

    consumer.batcher._label.__self__._score = score
    with ThreadPoolExecutor(20) as threads:
        first = threads.submit(consumer.label, ticket)
        assert asked.wait(20)
        path = consumer.spool.folder / "queued" / f"{ticket}.arrow"
        os.utime(path, (0, 0))
        later = time.time() + 60
        held = consumer._in_hand.tickets()
        assert held == {ticket}
        assert sweep(consumer.spool, consumer.doorbell, settings, later, in_hand=held) == 0
        until(lambda: path.stat().st_mtime > 0)  # nor do the sweepers of others ring for it
        consumer._starved_since = consumer._last_delivery = time.monotonic() - 100
        consumer.check_health()  # threads that wait for the teacher take no messages
        again = [threads.submit(consumer.label, ticket) for _ in range(15)]  # a message may come twice all the same
        until(lambda: consumer.spool.history(ticket).deliveries == 16)
        hangs.set()
        assert {type(future.exception(20)) for future in [first, *again]} == {NotLabelled}
    assert consumer._in_hand.tickets() == frozenset()
    assert sweep(consumer.spool, consumer.doorbell, settings, later) == 1
    history = consumer.spool.history(ticket)
    assert history.deliveries - history.failures > settings.consumer.crashes
    assert history.unfinished == frozenset()
    consumer.batcher._label.__self__._score = consumer.oracle
    consumer.label(ticket)
    assert consumer.spool.status(ticket).state == "committed"


def test_an_error_outside_a_try_ends_the_delivery_too(consumer, monkeypatch):
    ticket = queued(consumer.spool, 4)

    def full(batch):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(consumer.batcher, "_label", full)
    with pytest.raises(NotLabelled, match="No space left on device"):
        consumer.label(ticket)
    assert consumer.spool.history(ticket).unfinished == frozenset()


def test_a_forward_that_nobody_waits_for_is_cancelled(consumer, monkeypatch):
    cancelled = []

    def result(timeout_s):
        assert timeout_s == consumer.config.consumer.score_timeout_s
        raise TimeoutError("no replica")

    response = SimpleNamespace(result=result, cancel=lambda: cancelled.append(True))
    handle = SimpleNamespace(score=SimpleNamespace(remote=lambda rows, version: response))
    monkeypatch.setattr("rayfm.serving.nearline.consumer.serve.get_app_handle", lambda name: handle)
    with pytest.raises(TimeoutError, match="no replica"):
        consumer._ask_service(rows(2), V1)
    assert cancelled == [True]


@pytest.mark.parametrize("message", ["../../../etc/passwd", "", None, 7, ["x"]])
def test_a_message_that_is_not_ours_is_dropped(consumer, message):
    consumer.label(message)
    assert consumer.oracle.asked == []


def test_a_consumer_whose_batch_does_not_end_is_not_healthy(consumer, monkeypatch):
    monkeypatch.setattr(consumer.batcher, "_busy_since", time.monotonic() - 121)
    consumer.check_health()
    monkeypatch.setattr(consumer.batcher, "_busy_since", time.monotonic() - 123)
    with pytest.raises(RuntimeError, match="a batch has taken 123 s"):
        consumer.check_health()


def test_a_consumer_whose_threads_died_is_not_healthy(settings):
    consumer = NearLineConsumer(settings.dump(), "none", Oracle())
    consumer.check_health()
    consumer._adapter = SimpleNamespace(_worker_thread=SimpleNamespace(is_alive=lambda: False))
    with pytest.raises(RuntimeError, match="the thread that takes messages is dead"):
        consumer.check_health()
    consumer._adapter._worker_thread = SimpleNamespace(is_alive=lambda: True)
    consumer.check_health()
    consumer.batcher.stop()
    with pytest.raises(RuntimeError, match="the thread that labels"):
        consumer.check_health()
    consumer.stop()


def test_a_consumer_that_gets_nothing_while_messages_wait_is_not_healthy(consumer, monkeypatch):
    consumer._starved_since = time.monotonic()
    consumer.check_health()
    later = time.monotonic() + 62
    monkeypatch.setattr("rayfm.serving.nearline.consumer.time.monotonic", lambda: later)
    with pytest.raises(RuntimeError, match="messages wait, and none has come for 61 s"):
        consumer.check_health()
    consumer._starved_since = None
    consumer.check_health()
