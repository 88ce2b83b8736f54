"""Sums over ranks: exact for counts of rows, and on the device that the process group reduces on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import training_runs as runs
from example_store import write_store
from torch._subclasses.fake_tensor import FakeTensorMode

from rayfm.training.checkpoint import Cursor
from rayfm.training.loop import TrainingLoop
from rayfm.training.ranks import sum_over_ranks
from rayfm.training.trainer import single_process_group

MANY = 2**24 + 1
"""The first whole number that float32 does not have."""


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What is reduced, in a group whose other rank has the same values."""
    reduced: list[torch.Tensor] = []

    def all_reduce(value: torch.Tensor) -> None:
        reduced.append(value)
        value.mul_(2)

    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    return reduced


def test_counts_are_summed_exactly(two_ranks: list[torch.Tensor]) -> None:
    own = torch.tensor(MANY)
    assert int(sum_over_ranks(own, torch.device("cpu"))) == 2 * MANY
    assert int(own) == MANY, "this rank's own count stays"


def test_what_nccl_reduces_is_on_the_gpu(two_ranks: list[torch.Tensor]) -> None:
    with FakeTensorMode():
        total = sum_over_ranks(torch.tensor(7), torch.device("cuda", 0))
    assert [value.device.type for value in two_ranks] == ["cuda"]
    assert total.device.type == "cpu"


def test_a_checkpoint_holds_the_count_of_a_long_period(tmp_path: Path) -> None:
    write_store(tmp_path / "store", list(runs.PERIODS[:1]), impressions=10, considerations=0)
    spec = runs.spec(tmp_path / "store", tmp_path / "run", runs.learner("fm"))
    with single_process_group():
        loop = TrainingLoop(spec, runs.Free())
        loop.learners[0].optimizers.init_state()
        loop._checkpoint(Cursor(period=runs.PERIODS[0], step=3), {}, {"examples": MANY})
    [state] = spec.folder.glob("checkpoints/*/state.json")
    assert json.loads(state.read_text())["partial"]["examples"] == MANY
