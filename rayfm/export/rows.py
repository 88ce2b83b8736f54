"""Rows to check an exported model on: inputs and what the trained model said of them, as plain tensors.

They are stored beside a snapshot's tensors, so that the machine that serves it compares its own compiled code with the
trained model, on real rows. They hold the rows of tables that features were hashed to; no label, no id of an example
or a user beyond that.

Shape letters: B examples, D dense features.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from rayfm.config import SnapshotError
from rayfm.data.batch import Batch
from rayfm.models.jagged import KeyOrder

_JAGGED = ("sparse", "weighted", "sequence")


@dataclasses.dataclass
class CheckRows:
    """A batch and the trained model's logits of it."""

    batch: Batch
    logits: dict[str, Tensor]
    """Task -> float32 ``[B]``, from the model as trained, in fp32 and without a calibrator."""

    def save(self, path: Path) -> None:
        """Write them as safetensors."""
        tensors = {"dense": self.batch.dense.contiguous()}
        keys: dict[str, object] = {}
        for name in _JAGGED:
            jagged: KeyedJaggedTensor | None = getattr(self.batch, name)
            if jagged is not None:
                keys[name] = list(jagged.keys())
                tensors |= {f"{name}.values": jagged.values(), f"{name}.lengths": jagged.lengths()}
                weights = jagged.weights_or_none()
                if weights is not None:
                    tensors[f"{name}.weights"] = weights
        if self.batch.representation is not None and self.batch.representation_mask is not None:
            keys["representation"] = [list(pair) for pair in self.batch.representation_widths]
            tensors["representation"] = self.batch.representation
            tensors["representation_mask"] = self.batch.representation_mask
        tensors |= {f"logits.{task}": value for task, value in self.logits.items()}
        # Clones: safetensors stores no tensor that shares memory with another.
        save_file(
            {name: value.clone().contiguous() for name, value in tensors.items()}, path, {"keys": json.dumps(keys)}
        )

    @classmethod
    def load(cls, path: Path) -> CheckRows:
        """Read them.

        Raises:
            SnapshotError: the file is not one of these.
        """
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                keys = json.loads((file.metadata() or {})["keys"])
                tensors = {name: file.get_tensor(name) for name in list(file.keys())}
            jagged = {
                name: KeyedJaggedTensor(
                    keys=list(keys[name]),
                    values=tensors[f"{name}.values"],
                    lengths=tensors[f"{name}.lengths"],
                    weights=tensors.get(f"{name}.weights"),
                )
                for name in _JAGGED
                if name in keys
            }
            batch = plain_batch(
                tensors["dense"],
                jagged,
                tensors.get("representation"),
                tensors.get("representation_mask"),
                tuple((str(name), int(width)) for name, width in keys.get("representation", ())),
            )
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise SnapshotError(f"{path}: no rows of an export check ({error}); publish the model again") from None
        return cls(
            batch, {name.removeprefix("logits."): v for name, v in tensors.items() if name.startswith("logits.")}
        )


def plain_batch(
    dense_BD: Tensor,
    jagged: Mapping[str, KeyedJaggedTensor],
    representation: Tensor | None = None,
    representation_mask: Tensor | None = None,
    widths: tuple[tuple[str, int], ...] = (),
) -> Batch:
    """A batch of inputs alone, without labels."""
    rows = int(dense_BD.shape[0])
    zeros = torch.zeros(rows, dtype=torch.int64)
    none = torch.zeros(rows, 0)
    return Batch(
        dense=dense_BD,
        sparse=jagged.get("sparse"),
        weighted=jagged.get("weighted"),
        sequence=jagged.get("sequence"),
        labels=none,
        label_mask=none.bool(),
        supervision=none,
        supervision_mask=none.bool(),
        example_id=torch.arange(rows),
        kind=zeros,
        traffic=zeros,
        weight=torch.ones(rows),
        group=zeros - 1,
        user=torch.arange(rows),
        representation=representation,
        representation_mask=representation_mask,
        representation_widths=widths,
    )


def only_inputs(
    batch: Batch, features: Iterable[str] | None, rows: int, represented: Iterable[str] | None = None
) -> Batch:
    """The first ``rows`` rows of ``batch`` on the CPU, with the ids of ``features`` and the vectors of ``represented``
    alone (None: all)."""
    batch = batch.to(torch.device("cpu"))
    wanted = None if features is None else set(features)
    jagged = {}
    for name in _JAGGED:
        ids: KeyedJaggedTensor | None = getattr(batch, name)
        if ids is None:
            continue
        keys: list[str] = ids.keys()
        kept = tuple(key for key in keys if wanted is None or key in wanted)
        chosen = KeyOrder(kept).select(ids) if kept else None
        if chosen is not None:
            jagged[name] = _first_rows(chosen, len(batch), rows)
    read = None if represented is None else set(represented)
    widths = tuple(pair for pair in batch.representation_widths if read is None or pair[0] in read)
    vectors = [batch.represented(name) for name, _ in widths] if batch.representation is not None else []
    return plain_batch(
        batch.dense[:rows],
        jagged,
        torch.cat([value[:rows] for value, _ in vectors], dim=1) if vectors else None,
        torch.stack([known[:rows] for _, known in vectors], dim=1) if vectors else None,
        widths if vectors else (),
    )


def _first_rows(ids: KeyedJaggedTensor, batch_rows: int, rows: int) -> KeyedJaggedTensor:
    lengths_KB = ids.lengths().view(-1, batch_rows)
    kept_KB = torch.zeros_like(lengths_KB, dtype=torch.bool)
    kept_KB[:, :rows] = True
    keep_N = kept_KB.reshape(-1).repeat_interleave(lengths_KB.reshape(-1).long())
    weights = ids.weights_or_none()
    return KeyedJaggedTensor(
        keys=list(ids.keys()),
        values=ids.values()[keep_N],
        lengths=lengths_KB[:, :rows].reshape(-1),
        weights=None if weights is None else weights[keep_N],
    )
