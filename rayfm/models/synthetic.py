"""Random batches of a schema, for examples in docstrings, numerical checks and benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from rayfm.data.batch import CONSIDERATION, Batch
from rayfm.schema import Feature, Schema

DEFAULT_MAX_LEN = 8
"""Longest random list of a feature without ``max_len``."""


def synthetic_batch(
    schema: Schema,
    rows: int,
    *,
    seed: int = 0,
    supervision: tuple[str, ...] = (),
    considerations: float = 0.0,
    coverage: float = 1.0,
    longest: bool = False,
) -> Batch:
    """A random batch; the same arguments give the same one.

    Args:
        schema: what to fill.
        rows: B.
        seed: of a generator of its own.
        supervision: names of supervision columns, filled with uniform numbers in (0, 1).
        considerations: share of rows that are considerations, without labels.
        coverage: share of supervision that is there.
        longest: give every list its greatest length, instead of a random one.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device="cpu")

    kinds = {kind: [f for f in schema.features if f.kind == kind] for kind in ("sparse", "multi", "sequence")}
    weighted = [feature for feature in schema.features if feature.kind == "weighted"]
    dense = [feature for feature in schema.features if feature.kind == "dense"]
    kind = (uniform(rows) < considerations).long() * CONSIDERATION
    labels = torch.stack([(uniform(rows) < 0.3).float() if t.kind == "binary" else uniform(rows) for t in schema.tasks])
    mask = (kind != CONSIDERATION).unsqueeze(1).expand(rows, len(schema.tasks))
    covered = uniform(rows, len(supervision)) < coverage
    ids = torch.arange(rows, device="cpu")
    return Batch(
        dense=torch.randn(rows, len(dense), generator=generator, device="cpu"),
        sparse=_ids(schema, [*kinds["sparse"], *kinds["multi"]], rows, generator, longest),
        weighted=_ids(schema, weighted, rows, generator, longest),
        sequence=_ids(schema, kinds["sequence"], rows, generator, longest),
        labels=labels.T.contiguous() * mask,
        label_mask=mask.contiguous(),
        supervision=uniform(rows, len(supervision)) * covered,
        supervision_mask=covered,
        example_id=ids,
        kind=kind,
        traffic=(uniform(rows) * len(schema.traffics)).long(),
        weight=torch.ones(rows, device="cpu"),
        group=torch.full((rows,), -1, device="cpu"),
        user=ids.clone(),
        tasks=tuple(task.name for task in schema.tasks),
        supervision_names=supervision,
    )


def _ids(
    schema: Schema, features: list[Feature], rows: int, generator: torch.Generator, full: bool
) -> KeyedJaggedTensor | None:
    if not features:
        return None
    values, lengths, weights = [], [], []
    for feature in features:
        longest = (feature.max_len or DEFAULT_MAX_LEN) if feature.is_list else 1
        shortest = longest if full else int(not feature.is_list)
        counts = torch.randint(shortest, longest + 1, (rows,), generator=generator, dtype=torch.int32, device="cpu")
        total = int(counts.sum())
        lengths.append(counts)
        values.append(
            torch.randint(0, schema.tables[feature.table_name].rows, (total,), generator=generator, device="cpu")
        )
        if feature.kind == "weighted":
            weights.append(torch.rand(total, generator=generator, device="cpu"))
    return KeyedJaggedTensor(
        keys=[feature.name for feature in features],
        values=torch.cat(values),
        lengths=torch.cat(lengths),
        weights=torch.cat(weights) if weights else None,
    )
