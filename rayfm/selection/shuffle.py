"""A batch in which one feature's values are handed to other rows.

The plain way of perturbing a feature: whatever reads the batch sees the shuffled feature. What is scored fast
(`rayfm.selection.replay`) is held to it.

Shape letters: B rows, K keys of a KeyedJaggedTensor.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from rayfm.config import DataError
from rayfm.data.batch import Batch


def shuffled(batch: Batch, feature: str, order_B: Tensor, dense: tuple[str, ...]) -> Batch:
    """The batch with row i's values of ``feature`` taken from row ``order_B[i]``; all else stays.

    Args:
        batch: the rows.
        feature: a feature of any kind.
        order_B: int64 ``[B]``, a permutation.
        dense: names of the columns of ``batch.dense``.

    Raises:
        DataError: the batch lacks the feature.
    """
    if feature in dense:
        moved_BD = batch.dense.clone()
        moved_BD[:, dense.index(feature)] = batch.dense[order_B, dense.index(feature)]
        return dataclasses.replace(batch, dense=moved_BD)
    for field in ("sparse", "weighted", "sequence"):
        ids: KeyedJaggedTensor | None = getattr(batch, field)
        if ids is not None and feature in ids.keys():  # noqa: SIM118 (a method, not a mapping's)
            return dataclasses.replace(batch, **{field: shuffled_lists(ids, feature, order_B)})
    raise DataError(f"the batch lacks feature {feature!r}; add it to the features that the reader reads")


def shuffled_lists(ids: KeyedJaggedTensor, key: str, order_B: Tensor) -> KeyedJaggedTensor:
    """The ids with row i's list of ``key``, weights included, taken from row ``order_B[i]``."""
    keys = list(ids.keys())
    position, rows = keys.index(key), len(order_B)
    lengths_KB = ids.lengths().view(len(keys), rows).clone()
    totals = lengths_KB.long().sum(dim=1).tolist()
    first = sum(totals[:position])
    own_B = lengths_KB[position].long()
    moved_B = own_B[order_B]
    starts_B = own_B.cumsum(0) - own_B
    shift_B = starts_B[order_B] - (moved_B.cumsum(0) - moved_B)
    index = torch.arange(ids.values().numel(), device=order_B.device)
    index[first : first + totals[position]] += torch.repeat_interleave(shift_B, moved_B)
    lengths_KB[position] = moved_B.to(lengths_KB.dtype)
    weights = ids.weights_or_none()
    return KeyedJaggedTensor(
        keys=keys,
        values=ids.values()[index],
        lengths=lengths_KB.reshape(-1),
        weights=None if weights is None else weights[index],
    )
