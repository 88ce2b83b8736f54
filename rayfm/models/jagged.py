"""Ids of a batch as an embedding collection wants them: with its keys, in its order, for any number of rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from rayfm.config import DataError
from rayfm.data.batch import Batch


class KeyOrder:
    """Picks exactly ``keys`` of a batch's ids, in that order: a sharded collection relies on one order for all batches.

    Args:
        keys: the features of a collection, in its order.
    """

    def __init__(self, keys: tuple[str, ...]) -> None:
        self.keys = keys
        # Orders of keys already met, as (positions, the same on a device). Not a buffer: DistributedModelParallel
        # fills buffers that were built on meta with zeros.
        self._orders: dict[tuple[tuple[str, ...], torch.device], tuple[list[int], Tensor]] = {}

    def select(self, ids: KeyedJaggedTensor | None) -> KeyedJaggedTensor | None:
        """``ids`` with these keys.

        Raises:
            DataError: a key is not there.
        """
        found = tuple(ids.keys()) if ids is not None else ()
        if found == self.keys:
            return ids
        device = ids.device() if ids is not None else torch.device("cpu")
        order = self._orders.get((found, device))
        if order is None:
            missing = [key for key in self.keys if key not in found]
            if missing:
                raise DataError(f"the batch lacks feature {missing[0]!r}; add it to the features that the reader reads")
            positions = [found.index(key) for key in self.keys]
            order = positions, torch.tensor(positions, dtype=torch.int32, device=device)
            self._orders[found, device] = order
        return ids.permute(*order) if ids is not None else ids


def join(first: KeyedJaggedTensor | None, second: KeyedJaggedTensor | None) -> KeyedJaggedTensor | None:
    """The keys of both, of which either may be missing."""
    if first is None or second is None:
        return first if second is None else second
    return KeyedJaggedTensor.concat([first, second])


def no_rows(keys: tuple[str, ...], batch: Batch, is_weighted: bool = False) -> KeyedJaggedTensor:
    """``keys`` without any row, on the batch's device."""
    device = batch.example_id.device
    return KeyedJaggedTensor(
        keys=list(keys),
        values=torch.zeros(0, dtype=torch.int64, device=device),
        lengths=torch.zeros(0, dtype=torch.int32, device=device),
        weights=torch.zeros(0, device=device) if is_weighted else None,
    )


def padded(ids: KeyedJaggedTensor | None, rows: int) -> KeyedJaggedTensor | None:
    """``ids`` with empty lists up to ``rows`` rows: only the lengths change."""
    if ids is None or not ids.keys():
        return ids
    keys = ids.keys()
    lengths = ids.lengths().view(len(keys), ids.lengths().numel() // len(keys))
    return KeyedJaggedTensor(
        keys=keys,
        values=ids.values(),
        lengths=functional.pad(lengths, (0, rows - lengths.shape[1])).reshape(-1),
        weights=ids.weights_or_none(),
        length_per_key=ids.length_per_key_or_none(),  # as before; else counting them would wait for a GPU
    )
