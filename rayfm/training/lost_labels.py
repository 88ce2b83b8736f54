"""Labels that a policy hides, for experiments on data that has them all (SEAD section 3, signal loss).

Shape letters: B examples, T tasks.
"""

from __future__ import annotations

import dataclasses

import torch
from pydantic import Field

from rayfm.config import Config
from rayfm.data.batch import Batch
from rayfm.schema import Schema, salt_of, unit_interval

_SALT = salt_of("lost_labels")
"""A draw of its own: considerations are sampled by the plain hash of the same ids."""


class LostLabels(Config):
    """What a model's training does not get to see: positives turn into false negatives."""

    traffics: tuple[str, ...] = Field(min_length=1)
    """Traffics whose users did not consent."""
    kept: float = Field(ge=0, le=1)
    """Share of their positives that is reported all the same, chosen by the example's id."""


def lose_labels(batch: Batch, lost: LostLabels, schema: Schema) -> Batch:
    """The batch with the hidden positives of its binary tasks as negatives; all else is shared with ``batch``."""
    traffics = torch.tensor([schema.traffics.index(name) for name in lost.traffics], device=batch.traffic.device)
    draw_B = torch.from_numpy(unit_interval(batch.example_id.cpu().numpy(), _SALT))
    hidden_B = torch.isin(batch.traffic, traffics) & (draw_B >= lost.kept).to(batch.traffic.device)
    binary_T = torch.tensor([schema.task(task).kind == "binary" for task in batch.tasks], device=hidden_B.device)
    hidden_BT = hidden_B.unsqueeze(1) & binary_T
    return dataclasses.replace(batch, labels=batch.labels.masked_fill(hidden_BT, 0.0))
