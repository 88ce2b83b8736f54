"""How large a model is, counted: parameters of tables and of everything else, and operations per example.

What an operation is: a matrix product of ``[m, k]`` and ``[k, n]`` has 2 m k n (a product and a sum each), as
``torch.utils.flop_counter`` counts; elementwise arithmetic has one per element that comes out, a reduction one per
element that goes in, a softmax 5 and a layer norm 7 per element; a row that is pooled has one per element, and one more
where it is weighted. Biases inside matrix products, comparisons, copies and the look-ups themselves are not counted.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface, EmbeddingCollectionInterface

from rayfm.data.batch import Batch
from rayfm.models.base import MODELS, ModelConfig
from rayfm.models.build import build_model
from rayfm.models.synthetic import synthetic_batch
from rayfm.schema import Feature, Schema, Table, Task

HISTORY = 50
"""Items in the history of the reference schema."""

REFERENCE_SCHEMA = Schema(
    tables={name: Table(rows=100_000) for name in ("user", "item", *(f"c{i}" for i in range(2, 26)))},
    features=(
        *(Feature(name=f"d{i}", kind="dense") for i in range(13)),
        *(Feature(name=name, kind="sparse") for name in ("user", "item", *(f"c{i}" for i in range(2, 26)))),
        Feature(name="history", kind="sequence", table="item", max_len=HISTORY),
    ),
    tasks=(Task(name="click"),),
)
"""What models are compared on: 13 dense features, 26 ids with a table of 100,000 rows each, a history of 50 items."""

REFERENCE_KEYS: dict[str, Any] = {"item_features": ("item", *(f"c{i}" for i in range(14, 26)))}
"""For models that have such a key and no default for it."""

_POOLING = (torch.ops.aten._embedding_bag, torch.ops.aten._embedding_bag_forward_only)
_PER_ELEMENT = {
    torch.ops.aten._softmax: 5,
    torch.ops.aten._log_softmax: 5,
    torch.ops.aten._safe_softmax: 5,
    torch.ops.aten.native_layer_norm: 7,
    torch.ops.aten.cumsum: 1,
}
_MOVES = (torch.ops.aten.clone, torch.ops.aten.positive, torch.ops.aten.where, torch.ops.aten.masked_fill)


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """What was counted of a model."""

    table_parameters: int
    """Of the embedding collections."""
    dense_parameters: int
    """Of everything else."""
    matmul_flops: int
    """Operations of matrix products, per example."""
    other_flops: int
    """All other operations, per example: elementwise, reductions, pooling."""

    @property
    def flops(self) -> int:
        """Operations per example."""
        return self.matmul_flops + self.other_flops


class _OtherOperations(TorchDispatchMode):
    """Counts the operations outside of matrix products."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count += _operations(func, args, kwargs or {}, out)
        return out


def _operations(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    kind = getattr(func, "overloadpacket", None)
    if kind in _POOLING:
        weight, ids = args[:2]
        weights = args[6] if len(args) > 6 else kwargs.get("per_sample_weights")
        return int(ids.numel() * weight.shape[1] * (1 if weights is None else 2))
    if kind in _PER_ELEMENT:
        return _PER_ELEMENT[kind] * _elements(args[0])
    if torch.Tag.reduction in func.tags:
        return _elements(args[0])
    if torch.Tag.pointwise in func.tags and kind not in _MOVES:
        return _elements(out)
    return 0


def _elements(value: Any) -> int:
    return value.numel() if isinstance(value, Tensor) and value.is_floating_point() else 0


def count_flops(model: nn.Module, batch: Batch | Tensor) -> tuple[int, int]:
    """Operations of one forward of ``batch``: those of matrix products, and the others.

    Example::

        >>> count_flops(nn.Sequential(nn.Linear(10, 4), nn.ReLU()), torch.rand(1, 10))
        (80, 4)

    Attention is counted as its two products and its softmax, whichever kernel computes it otherwise.
    """
    other, products = _OtherOperations(), FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), other, products:
        model(batch)
    return products.get_total_flops(), other.count


def model_size(config: ModelConfig, schema: Schema, tasks: tuple[str, ...]) -> ModelSize:
    """Count a model at its config's scale.

    The operations are those of one more row in a batch of rows whose lists are as long as they can be (``max_len``, or
    8 without one), so what a model computes once per batch is not among them. They do not depend on how many rows the
    tables have, so no table is held in memory.

    Raises:
        ConfigError: the model cannot be built.
    """
    nothing = build_model(config, schema, tasks, device=torch.device("meta"))
    tables = sum(parameter.numel() for parameter in table_parameters(nothing))
    small = {name: table.model_copy(update={"rows": min(table.rows, 8)}) for name, table in schema.tables.items()}
    schema = schema.model_copy(update={"tables": small})
    # A view of a parameter that a module returns stops the flop counter where it could have a gradient.
    model = build_model(config, schema, tasks, seed=0).eval().requires_grad_(False)
    few, more = (count_flops(model, synthetic_batch(schema, rows, longest=True)) for rows in (2, 3))
    return ModelSize(
        table_parameters=tables,
        dense_parameters=sum(parameter.numel() for parameter in nothing.parameters()) - tables,
        matmul_flops=more[0] - few[0],
        other_flops=more[1] - few[1],
    )


def reference_config(kind: str) -> ModelConfig:
    """A registered model's defaults, and what ``REFERENCE_KEYS`` says of keys that have none.

    Raises:
        pydantic.ValidationError: the model needs another key.
    """
    fields = MODELS[kind].Config.model_fields
    given = {key: value for key, value in REFERENCE_KEYS.items() if key in fields and fields[key].is_required()}
    config: ModelConfig = MODELS[kind].Config(**given)
    return config


def table_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The tables of a model's embedding collections."""
    collections = (EmbeddingBagCollectionInterface, EmbeddingCollectionInterface)
    return [p for module in model.modules() if isinstance(module, collections) for p in module.parameters()]
