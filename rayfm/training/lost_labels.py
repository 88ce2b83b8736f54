"""Labels that a policy hides, for experiments on data that has them all (SEAD section 3, signal loss).

Shape letters: B examples, T tasks.
"""

from __future__ import annotations

import dataclasses

import torch
from pydantic import Field
from torch import Tensor

from rayfm.config import Config
from rayfm.data.batch import Batch
from rayfm.schema import Schema


class LostLabels(Config):
    """What a model's training does not get to see: positives turn into false negatives."""

    traffics: tuple[str, ...] = Field(min_length=1)
    """Traffics whose users did not consent."""
    kept: float = Field(ge=0, le=1)
    """Share of their positives that is reported all the same, chosen by the example's id."""


def uniform_of(example_id: Tensor) -> Tensor:
    """A number in [0, 1) that follows from an id alone, the same on every rank and in every run: ``[B]`` -> ``[B]``.

    The finaliser of SplitMix64 (Steele et al. 2014), with its logical shifts, on signed integers.
    """

    def shifted(x: Tensor, by: int) -> Tensor:
        return (x >> by) & ((1 << (64 - by)) - 1)

    x = example_id + -7046029254386353131
    x = (x ^ shifted(x, 30)) * -4658895280553007687
    x = (x ^ shifted(x, 27)) * -7723592293110705685
    x = x ^ shifted(x, 31)
    return shifted(x, 11).double() / (1 << 53)


def lose_labels(batch: Batch, lost: LostLabels, schema: Schema) -> Batch:
    """The batch with the hidden positives of its binary tasks as negatives; all else is shared with ``batch``."""
    traffics = torch.tensor([schema.traffics.index(name) for name in lost.traffics], device=batch.traffic.device)
    hidden_B = torch.isin(batch.traffic, traffics) & (uniform_of(batch.example_id) >= lost.kept)
    binary_T = torch.tensor([schema.task(task).kind == "binary" for task in batch.tasks], device=hidden_B.device)
    hidden_BT = hidden_B.unsqueeze(1) & binary_T
    return dataclasses.replace(batch, labels=batch.labels.masked_fill(hidden_BT, 0.0))
