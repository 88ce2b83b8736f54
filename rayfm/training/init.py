"""Initial table weights that do not depend on the sharding plan: element (row, column) is a hash, not a draw."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rayfm.schema import mix64, salt_of

_CHUNK = 1 << 20


@torch.no_grad()
def fill_normal(shard: Tensor, table: str, seed: int, std: float, row: int, column: int, columns: int) -> None:
    """Fill a shard ``[rows, width]`` with N(0, std^2), the same value for an element whatever shard it lies in.

    Args:
        shard: the shard's weights, filled in place.
        table: the table's name; tables differ under one seed.
        seed: the model's seed.
        std: standard deviation.
        row, column: position of the shard's first element in the table.
        columns: width of the whole table.
    """
    if std == 0.0:
        shard.zero_()
        return
    salt = (salt_of(table) ^ (seed * 0x9E3779B97F4A7C15)) & (2**63 - 1)
    width = shard.shape[1]
    step = max(1, _CHUNK // max(1, width))
    for start in range(0, shard.shape[0], step):
        stop = min(start + step, shard.shape[0])
        rows = np.arange(row + start, row + stop, dtype=np.int64)[:, None]
        element = rows * columns + np.arange(column, column + width, dtype=np.int64)
        bits = mix64(element.reshape(-1), salt)
        radius = np.sqrt(-2.0 * np.log(((bits >> np.uint64(40)).astype(np.float64) + 1.0) / 2**24))
        angle = (bits & np.uint64(2**24 - 1)).astype(np.float64) * (2 * np.pi / 2**24)
        values = (std * radius * np.cos(angle)).astype(np.float32).reshape(stop - start, width)
        shard[start:stop].copy_(torch.from_numpy(values))
