"""Which rows an objective's terms are over: by kind, by whether the label is known, by traffic.

Shape letters: B examples.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rayfm.config import ConfigError, nearest
from rayfm.data.batch import CONSIDERATION, IMPRESSION, Batch
from rayfm.schema import Schema

Rows = Literal["all", "impressions", "considerations", "unlabelled"]


def rows_mask(batch: Batch, rows: Rows, task: str) -> Tensor:
    """bool ``[B]``: the rows that ``rows`` names; ``unlabelled``: those whose true label of ``task`` is not known."""
    if rows == "impressions":
        return batch.kind == IMPRESSION
    if rows == "considerations":
        return batch.kind == CONSIDERATION
    if rows == "unlabelled":
        return ~batch.label(task)[1]
    return torch.ones_like(batch.kind, dtype=torch.bool)


def traffic_positions(objective: str, traffics: tuple[str, ...] | None, schema: Schema) -> tuple[int, ...] | None:
    """Positions of traffics in the schema, as ``Batch.traffic`` has them; None stays None, which is every traffic.

    Args:
        objective: the objective's name, for the message.
        traffics: names of traffics.
        schema: the pipeline's schema.

    Raises:
        ConfigError: the schema lacks one.
    """
    if traffics is None:
        return None
    known = list(schema.traffics)
    for traffic in traffics:
        if traffic not in known:
            raise ConfigError(
                f"objective {objective!r}: traffic {traffic!r} is not in the schema{nearest(traffic, known)}"
            )
    return tuple(known.index(traffic) for traffic in traffics)


def traffic_mask(batch: Batch, positions: tuple[int, ...] | None) -> Tensor:
    """bool ``[B]``: the rows of the traffics at ``positions`` of the schema's; None keeps every row."""
    if positions is None:
        return torch.ones_like(batch.traffic, dtype=torch.bool)
    mask = torch.zeros_like(batch.traffic, dtype=torch.bool)
    for position in positions:
        mask = mask | (batch.traffic == position)
    return mask
