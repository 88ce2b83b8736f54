"""Answers that take longer than a collective may."""

from __future__ import annotations

import datetime
import time
from pathlib import Path

import processes
import pytest
import torch.distributed as dist
import torch.multiprocessing

from rayfm.training import agree as module

TIMEOUT_S = 2.0


def _wait(rank: int, folder: str, meet_every_s: float) -> None:
    module.MEET_EVERY_S = meet_every_s
    limit = datetime.timedelta(seconds=TIMEOUT_S)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=limit)

    def ask() -> str:
        time.sleep(2.5 * TIMEOUT_S)
        return f"by rank {rank}"

    Path(folder, f"rank{rank}").write_text(module.agree(ask))
    assert module.agree(lambda: None) is None, "an answer may be nothing"
    dist.destroy_process_group()


def test_an_answer_may_take_longer_than_the_process_groups_timeout(tmp_path: Path) -> None:
    processes.start(_wait, (str(tmp_path), 0.5), 2)
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == ["by rank 0"] * 2


def test_without_meeting_it_would_fail(tmp_path: Path) -> None:
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match=r"(?i)timed? ?out"):
        processes.start(_wait, (str(tmp_path), 60.0), 2)


def _fail(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

    def ask() -> None:
        raise ValueError("the source is gone")

    if rank == 0:
        with pytest.raises(ValueError, match="the source is gone"):
            module.agree(ask)
        dist.broadcast_object_list([("released",)], src=0)  # the other one waits
    else:
        assert module.agree(ask) == "released"
    Path(folder, f"done{rank}").touch()


def test_what_the_question_raises_is_raised_where_it_was_asked(tmp_path: Path) -> None:
    processes.start(_fail, (str(tmp_path),), 2)
    assert all((tmp_path / f"done{rank}").exists() for rank in (0, 1))
