from __future__ import annotations

import asyncio
import pickle
import threading
import time

import pytest

from rayfm.config import DataError, SnapshotError
from rayfm.serving.http.problems import Problem, problem_of
from rayfm.serving.http.queue import Deadline, Queue


def run(coroutine):
    return asyncio.run(coroutine)


def until(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_work_is_done_in_a_thread_of_the_queue():
    queue = Queue(2)
    assert run(queue.run(Deadline(10), lambda: threading.current_thread().name)).startswith("rayfm-score")
    assert queue.taken == 0


def test_an_error_is_the_callers_and_frees_its_place():
    queue = Queue(1)
    for _ in range(3):
        with pytest.raises(DataError, match="mine"):
            run(queue.run(Deadline(10), lambda: (_ for _ in ()).throw(DataError("mine"))))
    assert queue.taken == 0


def test_a_full_queue_refuses_at_once():
    queue, gate = Queue(2), threading.Event()

    async def main():
        waiting = [asyncio.ensure_future(queue.run(Deadline(10), gate.wait)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Problem) as full:
            await queue.run(Deadline(10), gate.wait)
        with pytest.raises(Problem), queue.place():
            pass
        gate.set()
        assert await asyncio.gather(*waiting) == [True, True]
        return full.value

    problem = run(main())
    assert problem.status == 429
    assert int(problem.headers["Retry-After"]) >= 1
    assert run(queue.run(Deadline(10), lambda: 7)) == 7


def test_a_passed_deadline_answers_though_the_work_goes_on():
    queue, gate = Queue(1), threading.Event()
    with pytest.raises(Problem) as late:
        run(queue.run(Deadline(1.0), gate.wait))
    assert late.value.status == 504
    assert queue.taken == 1, "what runs keeps its place: the machine is still busy"
    gate.set()
    until(lambda: queue.taken == 0)


def test_work_that_waited_past_its_deadline_is_not_begun():
    queue, gate, begun = Queue(2), threading.Event(), []

    async def main():
        first = asyncio.ensure_future(queue.run(Deadline(10), gate.wait))
        await asyncio.sleep(0.01)
        with pytest.raises(Problem) as late:
            await queue.run(Deadline(0.02), lambda: begun.append(1))
        assert late.value.status == 504
        gate.set()
        await first

    run(main())
    assert run(queue.run(Deadline(10), lambda: 1)) == 1
    assert begun == []
    until(lambda: queue.taken == 0)


def test_a_caller_that_leaves_gives_up_a_place_it_waits_for():
    queue, gate = Queue(2), threading.Event()

    async def main():
        first = asyncio.ensure_future(queue.run(Deadline(10), gate.wait))
        await asyncio.sleep(0.01)
        second = asyncio.ensure_future(queue.run(Deadline(10), lambda: 1))
        await asyncio.sleep(0.01)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        assert queue.taken == 1
        gate.set()
        await first

    run(main())


@pytest.mark.parametrize(("text", "left"), [(None, 5.0), ("250", 0.25), ("1e3", 1.0), ("99999999", 5.0)])
def test_the_deadline_header_can_only_shorten(text, left):
    assert Deadline.of_header(text, 5.0).left == pytest.approx(left, abs=0.1)


@pytest.mark.parametrize("text", ["", "soon", "0", "-1", "nan", "inf", "1e999"])
def test_a_deadline_that_is_none_is_refused(text):
    with pytest.raises(Problem) as bad:
        Deadline.of_header(text, 5.0)
    assert bad.value.status == 400


def test_only_errors_about_the_request_are_told():
    assert problem_of(DataError("row 3 is bad")).detail == "row 3 is bad"
    for error in (SnapshotError("/secret/path"), ValueError("/secret/path"), KeyError("/secret/path")):
        problem = problem_of(error)
        assert problem.status == 500
        assert "secret" not in problem.detail
    problem = Problem(429, "full", {"Retry-After": "2"})
    assert problem_of(problem) is problem
    copy = pickle.loads(pickle.dumps(problem))
    assert (copy.status, copy.detail, copy.headers) == (429, "full", {"Retry-After": "2"})


# -- two steps ------------------------------------------------------------------------------------------------------


def test_one_request_is_prepared_while_another_is_worked_on():
    queue, working, prepared = Queue(4), threading.Event(), threading.Event()
    names = []

    def work(value):
        names.append(threading.current_thread().name)
        working.set()
        # The first is not over before the second was prepared.
        assert prepared.wait(10)
        return value + 1

    def prepare_second():
        names.append(threading.current_thread().name)
        assert working.wait(10)
        prepared.set()
        return 20

    async def main():
        return await asyncio.gather(
            queue.run_both(Deadline(10), lambda: 10, work), queue.run_both(Deadline(10), prepare_second, work)
        )

    assert run(main()) == [11, 21]
    assert {name.rpartition("_")[0] for name in names} == {"rayfm-score", "rayfm-prepare"}
    assert queue.taken == 0


@pytest.mark.parametrize("step", ["prepare", "work"])
def test_an_error_of_either_step_is_the_callers(step):
    queue = Queue(1)

    def fail(*_):
        raise DataError("mine")

    steps = {"prepare": lambda: 1, "work": lambda value: value, step: fail}
    for _ in range(3):
        with pytest.raises(DataError, match="mine"):
            run(queue.run_both(Deadline(10), steps["prepare"], steps["work"]))
    assert queue.taken == 0


@pytest.mark.parametrize("step", ["prepare", "work"])
def test_either_step_keeps_the_place_of_a_caller_who_gave_up(step):
    queue, gate, worked = Queue(1), threading.Event(), []
    steps = {"prepare": lambda: 1, "work": worked.append, step: lambda *_: gate.wait()}
    with pytest.raises(Problem) as late:
        run(queue.run_both(Deadline(0.5), steps["prepare"], steps["work"]))
    assert late.value.status == 504
    assert queue.taken == 1
    gate.set()
    until(lambda: queue.taken == 0)
    assert worked == [], "what was prepared too late is not worked on"


def test_a_caller_who_went_away_is_not_worked_for():
    queue, gate, worked = Queue(2), threading.Event(), []

    async def main():
        request = asyncio.ensure_future(queue.run_both(Deadline(10), gate.wait, worked.append))
        await asyncio.sleep(0.01)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        gate.set()

    run(main())
    until(lambda: queue.taken == 0)
    assert worked == []


def test_a_queue_that_closes_answers_those_who_wait():
    queue, gate = Queue(3), threading.Event()

    async def main():
        busy = asyncio.ensure_future(queue.run_both(Deadline(10), gate.wait, lambda value: value))
        waiting = asyncio.ensure_future(queue.run_both(Deadline(10), lambda: 1, lambda value: value))
        await asyncio.sleep(0.05)
        queue.close()
        with pytest.raises(Problem, match="is stopping") as first:
            await waiting
        gate.set()
        with pytest.raises(Problem, match="is stopping") as second:
            await busy
        return first.value.status, second.value.status

    assert run(main()) == (503, 503)
    assert queue.taken == 0
