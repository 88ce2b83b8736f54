"""Rows of a table as they were before training: for an id that gets a row which was another's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor

from rayfm.data.vocabulary import IntArray
from rayfm.training.init import normal_values
from rayfm.training.sharding import local_shards


@torch.no_grad()
def reset_rows(
    weights: dict[str, Any], state: dict[str, dict[str, Any]], name: str, rows_K: IntArray, seed: int, std: float
) -> None:
    """Give rows of one table their first values, and what the optimiser remembers of them its own: zeros.

    Args:
        weights: the sharded module's ``state_dict``.
        state: its optimisers' state by parameter, as in a checkpoint; tensors that are in use, not copies.
        name: the table's weight in ``weights``.
        rows_K: the rows, none twice.
        seed: the model's.
        std: standard deviation of the table's first values.
    """
    value = weights[name]
    height, columns = value.shape
    for shard, row, column in local_shards(value):
        mine_M = _within(rows_K, row, shard.shape[0])
        first = normal_values(mine_M, name.split(".")[-2], seed, std, column, shard.shape[1], columns)
        shard[torch.from_numpy(mine_M - row).to(shard.device)] = first.to(shard)
    for key, values in state.items():
        if key.endswith(name):
            for remembered in values.values():
                for piece, row in _pieces(remembered, height):
                    mine_M = _within(rows_K, row, piece.shape[0])
                    piece[torch.from_numpy(mine_M - row).to(piece.device)] = 0


def _within(rows_K: IntArray, start: int, height: int) -> IntArray:
    mine: IntArray = rows_K[(rows_K >= start) & (rows_K < start + height)].astype(np.int64)
    return mine


def _pieces(value: Any, height: int) -> Iterator[tuple[Tensor, int]]:
    """This rank's pieces of a state with a row (or a number) a table row, each with the table row it starts at.

    A table that is cut by columns remembers a number a row for each of its parts, one part behind the other.
    """
    if isinstance(value, ShardedTensor):
        for shard in value.local_shards():
            yield shard.tensor, shard.metadata.shard_offsets[0] % height
    elif isinstance(value, DTensor):
        local: Any = value.to_local()
        for piece, offsets in zip(local.local_shards(), local.local_offsets(), strict=True):
            yield piece, offsets[0] % height
    elif isinstance(value, Tensor) and value.ndim and value.shape[0] == height:
        yield value, 0
