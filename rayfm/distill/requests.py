"""Rows of one request: what the objectives that compare them (``pairwise``, ``listwise``) have in common.

The rows of a request lie in several lanes, and so on several ranks: ``prepare`` deals rows to the lanes in turn. Each
rank therefore gathers the few numbers that are compared from all of them, and compares whole requests. What two ranks
both see is counted by one of them, while each takes the gradient of its own rows: the sums over the ranks, and the
gradients, are those of one worker.

Shape letters: B examples of the batch, N rows that are compared, G requests, P pairs.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

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


@dataclasses.dataclass(frozen=True)
class RequestRows:
    """Rows that are compared, of all ranks, request by request."""

    score_N: Tensor
    """The student's, with gradients for this rank's own rows."""
    teacher_N: Tensor
    """The teacher's."""
    weight_N: Tensor
    example_id_N: Tensor
    own_N: Tensor
    """bool: the rows of this rank."""
    request_N: Tensor
    """The number of each row's request in [0, G); rises."""
    requests: int
    """G."""


def request_rows(batch: Batch, mask: Tensor, score: Tensor, teacher: Tensor) -> RequestRows:
    """The rows of this step, on any rank, that can be compared: those of a request with at least two of them.

    Every rank must call it in the same place.

    Args:
        batch: this rank's examples; ``group`` -1 is no request.
        mask: bool ``[B]``, the rows to take.
        score, teacher: the student's and the teacher's numbers, ``[B]``.
    """
    taken = (mask & (batch.group != -1)).nonzero().squeeze(1)
    score, teacher = score[taken], teacher[taken]
    numbers = torch.stack([score.detach(), teacher.to(score.dtype), batch.weight[taken].to(score.dtype)], 1)
    names = torch.stack([batch.group[taken], batch.example_id[taken]], 1)
    own = torch.ones_like(taken, dtype=torch.bool)
    if dist.is_initialized() and dist.get_world_size() > 1:
        numbers, names, sizes = _gather(numbers, names)
        first = sum(sizes[: dist.get_rank()])
        before, after = numbers[:first, 0], numbers[first + len(taken) :, 0]
        score = torch.cat([before, score, after])
        own = functional.pad(own, (first, len(score) - first - len(own)))
    else:
        score = score.clone()
    _, teacher, weight = numbers.unbind(1)
    group, example_id = names.unbind(1)
    order = torch.argsort(group, stable=True)
    _, counts_G = torch.unique_consecutive(group[order], return_counts=True)
    compared = counts_G > 1
    order = order[torch.repeat_interleave(compared, counts_G)]
    counts_G = counts_G[compared]
    request_N = torch.repeat_interleave(torch.arange(len(counts_G), device=order.device), counts_G)
    return RequestRows(
        score[order], teacher[order], weight[order], example_id[order], own[order], request_N, len(counts_G)
    )


def _gather(numbers: Tensor, names: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Both tensors of all ranks, rank by rank, and the rows of each."""
    world = dist.get_world_size()
    sizes = torch.zeros(world, dtype=torch.int64, device=names.device)
    sizes[dist.get_rank()] = len(names)
    dist.all_reduce(sizes)
    rows = sizes.tolist()

    def gathered(values: Tensor) -> Tensor:
        padded = functional.pad(values, (0, 0, 0, max(rows) - len(values)))
        parts = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, rows, strict=True)])

    return gathered(numbers), gathered(names), rows


def count_once(loss: Tensor, counted: Tensor) -> Tensor:
    """``loss`` where it is counted here; elsewhere 0, with the gradient of ``loss`` nevertheless."""
    return torch.where(counted, loss, loss - loss.detach())


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
