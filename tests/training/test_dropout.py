"""Dropout's masks follow from seed, step and rank, and from nothing else that the process does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import training_runs as runs
from example_store import write_store
from torch import nn

from rayfm.training.dropout import has_dropout, step_masks
from rayfm.training.learner import LearnerConfig
from rayfm.training.loop import TrainingLoop

CPU = torch.device("cpu")


def mask(*place: int) -> torch.Tensor:
    with step_masks(*place, CPU):
        return nn.functional.dropout(torch.ones(200), 0.5)


def test_masks_follow_from_their_place_alone() -> None:
    torch.manual_seed(1)
    first = mask(3, 10, 0)
    torch.manual_seed(2)
    torch.rand(5)
    assert torch.equal(mask(3, 10, 0), first)
    for other in ((4, 10, 0), (3, 11, 0), (3, 10, 1)):
        assert not torch.equal(mask(*other), first)
    before = torch.get_rng_state()
    mask(3, 10, 0)
    assert torch.equal(torch.get_rng_state(), before), "what others draw stays as it was"


def test_only_what_drops_is_dropout() -> None:
    assert has_dropout(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.1))))
    assert not has_dropout(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0)))


def dropping(seed: int) -> LearnerConfig:
    learner = runs.learner("dcnv2", seed=seed)
    return learner.model_copy(update={"model": learner.model.model_copy(update={"dropout": 0.5})})


class CrashError(Exception):
    pass


def test_neither_a_resume_nor_another_learner_changes_the_masks(tmp_path: Path) -> None:
    write_store(tmp_path / "store", list(runs.PERIODS), impressions=200, considerations=0)

    def spec(name: str, *learners: LearnerConfig):
        made = runs.spec(tmp_path / "store", tmp_path / name, *learners, checkpoint_every=2)
        return made.model_copy(update={"periods": runs.PERIODS[:2], "publish": False})

    whole, alone = spec("whole", dropping(2), dropping(1)), spec("alone", dropping(1))
    runs.train_here(whole)

    def report(self, period, step, steps, phase) -> None:
        if (period, step, phase) == (runs.PERIODS[1], 3, "train"):
            raise CrashError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLoop, "_report", report)
        with pytest.raises(CrashError):
            runs.train_here(alone)
    runs.train_here(alone)
    expected, found = runs.losses(whole), runs.losses(alone)
    assert len(found) == 4
    for key, value in found.items():
        assert value == pytest.approx(expected[key], rel=1e-6), key
