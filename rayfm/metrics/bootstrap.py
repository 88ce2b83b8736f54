"""Bootstrap weights that every model, rank and run draws alike, because they are a hash of (user, replicate).

A replicate of the bootstrap gives each user Poisson(1) copies (Chamandy et al., Estimating uncertainty for massive
data streams, 2012). As the copies depend on nothing but the user and the replicate's number, sums over ranks and
periods merge, and two models scored on the same rows are compared replicate by replicate.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rayfm.schema import mix64

_SALT = 0x7261_7966_6D62_6F6F
_LANES = 4
"""Replicates that share one 64-bit hash, 16 bits each."""


def _poisson_table() -> npt.NDArray[np.float32]:
    """Inverse CDF of Poisson(1) at the 65,536 values of a 16-bit uniform: mean and variance are 1 to 1e-4."""
    cdf: list[float] = []
    term = math.exp(-1)
    for k in range(1, 10):
        cdf.append(sum(cdf[-1:]) + term)
        term /= k
    uniform = (np.arange(1 << 16) + 0.5) / (1 << 16)
    return np.searchsorted(np.array(cdf), uniform).astype(np.float32)


_POISSON = _poisson_table()


def bootstrap_weights(user: Tensor, replicates: int) -> Tensor:
    """Copies of each row's user in each replicate.

    Compute it once per batch and pass it to every model's ``MetricState.update``.

    Args:
        user: int64 ``[B]``.
        replicates: R.

    Returns:
        float32 ``[B, R]`` of small whole numbers, Poisson(1) distributed, equal for equal users.
    """
    unique, inverse = np.unique(user.numpy(), return_inverse=True)
    seeds = mix64(unique.astype(np.int64), _SALT)
    groups = -(-replicates // _LANES)
    steps = np.arange(1, groups + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    hashes = mix64(seeds[:, None] + steps[None, :])
    shifts = np.arange(_LANES, dtype=np.uint64) * np.uint64(16)
    # The lanes by shifting, not by a view, so that the byte order of the machine does not matter.
    uniform = ((hashes[:, :, None] >> shifts) & np.uint64(0xFFFF)).astype(np.uint16)
    copies = _POISSON[uniform.reshape(len(unique), groups * _LANES)[:, :replicates]]
    return torch.from_numpy(copies[inverse])
