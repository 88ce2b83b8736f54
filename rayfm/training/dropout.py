"""Dropout whose masks follow from the seed, the step and the rank alone.

Drawn from the process's generator they would also follow from what else the process draws: from the other learners of
the group, and from where a resumed run began.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd


def has_dropout(module: nn.Module) -> bool:
    """Whether a part of it is one of torch's dropout modules, with a share above 0."""
    return any(isinstance(part, _DropoutNd) and part.p > 0 for part in module.modules())


@contextmanager
def step_masks(seed: int, step: int, rank: int, device: torch.device) -> Iterator[None]:
    """Inside, dropout draws what (seed, step, rank) say; outside, the generators stay as they were.

    Args:
        seed: the learner's.
        step: how many steps it has made.
        rank: whose rows are masked; each rank has masks of its own.
        device: this rank's.
    """
    digest = hashlib.blake2b(f"dropout/{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int.from_bytes(digest, "little"))
        yield
