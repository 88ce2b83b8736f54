"""Where a training that has diverged went wrong first: an input, a table, or another parameter."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rayfm.data.batch import Batch
from rayfm.schema import Schema
from rayfm.training.sharding import local_shards

HUGE = 1e4
"""What a feature that was scaled, or a weight that learns well, does not reach."""


@dataclasses.dataclass(frozen=True, order=True)
class Finding:
    """Something that may be the cause; causes come before what follows from them."""

    rank: int
    """Order among findings: not finite before huge, inputs before tables before other parameters."""
    text: str


def diagnose(state: dict[str, Any], batch: Batch, schema: Schema) -> str:
    """What is first among all ranks' findings; every rank calls this and gets the same.

    Args:
        state: the module's, by name, with this rank's shards.
        batch: this rank's rows of the step.
        schema: names the features.
    """
    mine = [*inputs(batch, schema), *parameters(state, schema)]
    found: list[Any] = [mine]
    if dist.get_world_size() > 1:
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, mine)
    everywhere = sorted({finding for part in found for finding in part})
    return "; ".join(finding.text for finding in everywhere[:3]) or "inputs, tables and parameters are all finite"


def inputs(batch: Batch, schema: Schema) -> list[Finding]:
    """Features, labels, supervision and weights of a batch that are not finite, or huge."""
    found = []
    dense = [feature.name for feature in schema.features if feature.kind == "dense"]
    columns = [(f"dense feature {name!r}", batch.dense[:, i]) for i, name in enumerate(dense)]
    columns += [(f"label {name!r}", batch.labels[:, i]) for i, name in enumerate(batch.tasks)]
    columns += [(f"supervision {name!r}", batch.supervision[:, i]) for i, name in enumerate(batch.supervision_names)]
    columns += [("sampling_weight", batch.weight)]
    for name, values in columns:
        found += _value(name, values, batch.example_id)
    if batch.weighted is not None:
        for key in batch.weighted.keys():  # noqa: SIM118 a method of a KeyedJaggedTensor
            jagged = batch.weighted[key]
            owner = torch.repeat_interleave(batch.example_id, jagged.lengths())
            found += _value(f"weights of feature {key!r}", jagged.weights(), owner)
    return found


def _value(name: str, values: Tensor, example_id: Tensor) -> list[Finding]:
    if not values.numel():
        return []
    bad = ~torch.isfinite(values)
    if bad.any():
        place = int(bad.nonzero()[0, 0])
        return [Finding(0, f"{name} is {float(values[place])} in example {int(example_id[place])}")]
    place = int(values.abs().argmax())
    if float(values[place].abs()) < HUGE:
        return []
    return [Finding(3, f"{name} is {float(values[place]):.3g} in example {int(example_id[place])}")]


def parameters(state: dict[str, Any], schema: Schema) -> list[Finding]:
    """This rank's rows of tables, and other parameters, that are not finite, or huge."""
    found = []
    for name, value in state.items():
        parts = name.split(".")
        is_table = {"embedding_bags", "embeddings"} & set(parts) and parts[-2] in schema.tables
        table = parts[-2] if is_table else None
        for shard, row, _ in local_shards(value):
            if not shard.is_floating_point() or not shard.numel():
                continue
            largest = float(shard.abs().max())  # NaN where any is
            if largest < HUGE:
                continue
            not_finite = ~torch.isfinite(shard)
            many = bool(not_finite.any())
            if table is None:
                what = f"parameter {name}"
                found.append(Finding(2, f"{what} is not finite") if many else Finding(5, f"{what} is {largest:.3g}"))
                continue
            features = [
                feature.name for feature in schema.features if feature.kind != "dense" and feature.table_name == table
            ]
            readers = f" (of {', '.join(features)})" if features else ""
            rows = (not_finite if many else shard.abs() == largest).any(1).nonzero()[:, 0]
            first = f"table {table!r}{readers}: row {int(rows[0]) + row}"
            more = f" and {len(rows) - 1} more are" if len(rows) > 1 else " is"
            found.append(
                Finding(1, f"{first}{more} not finite") if many else Finding(4, f"{first} reaches {largest:.3g}")
            )
    return found
