"""Rows of one request: what the objectives that compare them (``pairwise``, ``listwise``) have in common.

Shape letters: B examples of the batch, N rows that are compared, G requests, P pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayfm.config import DataError
from rayfm.data.batch import Batch

_SCRAMBLE = 0x9E3779B97F4A7C15 - (1 << 64)
"""An odd 64-bit number (2^64 over the golden ratio): multiplying by it permutes int64."""


def require_requests(batch: Batch, objective: str) -> None:
    """Refuse a batch of which no row says which request it belongs to.

    Raises:
        DataError: naming the objective.
    """
    if len(batch) and not bool((batch.group != -1).any()):
        raise DataError(
            f"objective {objective!r} compares rows of one request, but no row of the batch has a request_id; give the "
            "source a column request_id, or leave the objective out"
        )


def request_rows(batch: Batch, mask: Tensor) -> tuple[Tensor, Tensor, int]:
    """The rows that can be compared: those in ``mask`` that belong to a request with at least two of them.

    Args:
        batch: the examples; ``group`` -1 is no request.
        mask: bool ``[B]``.

    Returns:
        Their positions in the batch ``[N]``, request by request; the number of each one's request in [0, G) ``[N]``,
        which rises; and G.
    """
    rows = (mask & (batch.group != -1)).nonzero().squeeze(1)
    rows = rows[torch.argsort(batch.group[rows], stable=True)]
    _, counts_G = torch.unique_consecutive(batch.group[rows], return_counts=True)
    compared = counts_G > 1
    rows = rows[torch.repeat_interleave(compared, counts_G)]
    counts_G = counts_G[compared]
    request_N = torch.repeat_interleave(torch.arange(len(counts_G), device=rows.device), counts_G)
    return rows, request_N, len(counts_G)


def request_pairs(request_N: Tensor, example_id_N: Tensor, at_most: int) -> tuple[Tensor, Tensor]:
    """Pairs of rows of one request, each pair once: ``[P]`` and ``[P]`` positions in ``[0, N)``.

    A row is paired with the ``at_most`` rows that come before it when its request is put into an order that follows
    from the example ids alone, so that neither the order of the log nor the number of workers chooses the pairs.

    Args:
        request_N: the number of each row's request; rises.
        example_id_N: int64.
        at_most: bound of the pairs per row, and so of the memory: P <= N x at_most.
    """
    order = torch.argsort(example_id_N * _SCRAMBLE)
    order = order[torch.argsort(request_N[order], stable=True)]
    position = torch.arange(len(order), device=order.device)
    start = torch.searchsorted(request_N, request_N)  # of each row's request: the rows are sorted by it
    before = (position - start).clamp_max(at_most)
    later = torch.repeat_interleave(position, before)
    # 1, 2, ..., before[i] for each row i.
    steps = torch.arange(1, len(later) + 1, device=order.device)
    steps = steps - torch.repeat_interleave(before.cumsum(0) - before, before)
    return order[later], order[later - steps]
