"""Following a job without Ray: the log once, the exit code, Ctrl-C, a server that goes away."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest
from fake_job_server import FakeClient, server

from rayfm.config import CapacityError, RayfmError
from rayfm.submission.follow import follow


def followed(client: FakeClient, retry_s: float = 5.0) -> tuple[int, str, list[str]]:
    pieces: list[str] = []
    notes: list[str] = []
    code = follow(server(client), "job-1", pieces.append, notes.append, retry_s, pause_s=0.01)
    return code, "".join(pieces), notes


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [("SUCCEEDED", 0, 0), ("FAILED", 3, 3), ("FAILED", -9, 137), ("FAILED", None, 1), ("STOPPED", None, 1)],
)
def test_the_exit_code_is_the_driver_s(status: str, code: int | None, expected: int) -> None:
    assert followed(FakeClient(["a\n"], status, code))[:2] == (expected, "a\n")


def test_a_job_that_never_ran_says_why() -> None:
    _, _, notes = followed(FakeClient([], "FAILED", None, "runtime env: no such image\n"))
    assert notes == ["job-1 failed: runtime env: no such image"]


def test_somebody_else_s_stop_is_said() -> None:
    assert followed(FakeClient([], "STOPPED", None))[2] == ["job-1 was stopped by somebody else"]


def test_after_a_broken_connection_nothing_is_written_twice_or_left_out() -> None:
    client = FakeClient(["one\ntw", ConnectionError("reset"), "o\n", RuntimeError("closed"), "three\n"])
    code, log, notes = followed(client)
    assert (code, log) == (0, "one\ntwo\nthree\n")
    assert client.connections == 3
    assert notes == [
        "http://ray:8265 does not answer any more: reset; trying again for 5 s",
        "http://ray:8265 refuses: closed; trying again for 5 s",
    ]


def test_pieces_may_be_cut_elsewhere_the_next_time() -> None:
    client = FakeClient(["one\ntw"])

    async def cut(found: FakeClient) -> None:
        found.log = ["one", "\ntwo\n", "three\n"]
        raise ConnectionError("reset")

    client.log.append(cut)
    assert followed(client)[:2] == (0, "one\ntwo\nthree\n")


def test_a_closed_connection_is_not_the_job_s_end() -> None:
    """A proxy may close one that is idle."""
    client = FakeClient(["a\n"])
    infos = iter(["RUNNING", "RUNNING", "SUCCEEDED"])

    def get_job_info(job: str, info: Any = client.get_job_info) -> Any:
        client.status = next(infos)
        return info(job)

    client.get_job_info = get_job_info
    assert followed(client)[:2] == (0, "a\n")
    assert client.connections == 3


def test_a_server_that_stays_away_is_given_up() -> None:
    class Gone(FakeClient):
        async def tail_job_logs(self, job: str) -> Any:
            raise ConnectionError("refused")
            yield

        def get_job_info(self, job: str) -> Any:
            raise ConnectionError("refused")

    with pytest.raises(CapacityError, match=r"does not answer any more.* ray job logs --follow job-1"):
        followed(Gone(), retry_s=0.05)


def test_a_job_that_the_server_has_forgotten_is_an_error() -> None:
    class Restarted(FakeClient):
        def get_job_info(self, job: str) -> Any:
            raise RuntimeError("Request failed with status code 404: Job job-1 does not exist.")

    with pytest.raises(RayfmError, match="job-1 does not exist"):
        followed(Restarted())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_job_which_is_followed_to_its_end(number: int, code: int) -> None:
    async def press(client: FakeClient) -> None:
        os.kill(os.getpid(), number)
        while not client.stopped:
            await asyncio.sleep(0.01)

    client = FakeClient(["working\n", press, "saved\n"], "SUCCEEDED", 0)
    assert followed(client) == (code, "working\nsaved\n", ["stopping job-1; once more leaves it to stop by itself"])
    assert client.stopped == ["job-1"]


def test_a_second_ctrl_c_leaves_a_job_that_does_not_end() -> None:
    async def press(client: FakeClient) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        while not client.stopped:
            await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(60)

    code, log, notes = followed(FakeClient(["working\n", press, "never\n"]))
    assert (code, log) == (130, "working\n")
    assert notes[-1] == "left job-1, which stops by itself; see: ray job status job-1"


def test_a_stop_that_does_not_arrive_is_said() -> None:
    class Deaf(FakeClient):
        def stop_job(self, job: str) -> bool:
            self.stopped.append(job)
            raise ConnectionError("refused")

    async def press(client: FakeClient) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        while not client.stopped:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)

    code, _, notes = followed(Deaf([press], "SUCCEEDED", 0))
    assert code == 0, "it ran to its end"
    assert notes[-1].startswith("cannot stop it:")
    assert notes[-1].endswith("try: ray job stop job-1")


def test_the_signals_are_the_process_s_own_again() -> None:
    before = signal.getsignal(signal.SIGINT)
    followed(FakeClient(["a\n"]))
    assert signal.getsignal(signal.SIGINT) is before
