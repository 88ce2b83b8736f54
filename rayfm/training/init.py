"""Initial table weights that do not depend on the sharding plan: element (row, column) is a hash, not a draw."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
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
    width = shard.shape[1]
    step = max(1, _CHUNK // max(1, width))
    for start in range(0, shard.shape[0], step):
        stop = min(start + step, shard.shape[0])
        rows = np.arange(row + start, row + stop, dtype=np.int64)
        shard[start:stop].copy_(normal_values(rows, table, seed, std, column, width, columns))


def normal_values(
    rows_K: npt.NDArray[np.int64], table: str, seed: int, std: float, column: int, width: int, columns: int
) -> Tensor:
    """The first values of any rows of a table, float32 ``[K, width]``: what `fill_normal` fills them with.

    Args:
        rows_K: the rows.
        table, seed, std, columns: as of `fill_normal`.
        column, width: the columns wanted.
    """
    salt = (salt_of(table) ^ (seed * 0x9E3779B97F4A7C15)) & (2**63 - 1)
    element = rows_K[:, None] * columns + np.arange(column, column + width, dtype=np.int64)
    bits = mix64(element.reshape(-1), salt)
    radius = np.sqrt(-2.0 * np.log(((bits >> np.uint64(40)).astype(np.float64) + 1.0) / 2**24))
    angle = (bits & np.uint64(2**24 - 1)).astype(np.float64) * (2 * np.pi / 2**24)
    values = (std * radius * np.cos(angle)).astype(np.float32).reshape(len(rows_K), width)
    return torch.from_numpy(values)
