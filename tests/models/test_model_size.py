"""Parameters and operations, counted and computed by hand."""

from __future__ import annotations

import doctest

import pytest
import torch
from model_batches import SCHEMA, SIZES, TASKS, is_table, small_config, small_model
from torch import nn
from torch.nn import functional

from rayfm.models import MODELS, size
from rayfm.models.embeddings import FeatureEmbeddings
from rayfm.models.mlp import MLP
from rayfm.models.size import REFERENCE_SCHEMA, count_flops, model_size, reference_config
from rayfm.models.synthetic import synthetic_batch
from rayfm.schema import Feature, Schema, Table, Task


def test_an_mlp() -> None:
    assert count_flops(MLP(10, (8, 4)), torch.rand(1, 10)) == (2 * 10 * 8 + 2 * 8 * 4, 8 + 4)
    assert count_flops(MLP(10, (8, 4)), torch.rand(3, 10)) == (3 * 224, 3 * 12)
    assert count_flops(MLP(10, (8,), layer_norm=True), torch.rand(1, 10)) == (160, 7 * 8 + 8)


class Attention(nn.Module):
    def forward(self, x_BLC: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(x_BLC, x_BLC, x_BLC)


def test_attention_is_two_products_and_a_softmax() -> None:
    products, other = count_flops(Attention(), torch.rand(2, 5, 8))
    assert products == 2 * (2 * 5 * 8 * 5) * 2
    # The softmax of each score, and queries and keys scaled by the root of 1 / sqrt(8).
    assert other == 2 * (5 * 5 * 5) + 2 * 2 * 5 * 8


def test_what_is_no_arithmetic_is_not_counted() -> None:
    class Moves(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x.clone(), torch.where(x > 0, x, x)], dim=1).transpose(0, 1).contiguous()

    assert count_flops(Moves(), torch.rand(4, 4)) == (0, 0)


def test_pooling() -> None:
    schema = Schema(
        tables={"item": Table(rows=10), "topic": Table(rows=10)},
        features=(
            Feature(name="item", kind="sparse"),
            Feature(name="seen", kind="sequence", table="item", max_len=5),
            Feature(name="topics", kind="weighted", table="topic", max_len=3),
        ),
        tasks=(Task(name="click"),),
    )
    embeddings = FeatureEmbeddings(schema, list(schema.features), 8)
    batch = synthetic_batch(schema, 2, longest=True)
    # Rows summed, weighted rows multiplied too, and the average of the list.
    assert count_flops(embeddings, batch) == (0, 2 * (8 * (1 + 5) + 2 * 8 * 3 + 8))


def test_a_dlrm_by_hand() -> None:
    schema = Schema(
        tables={"user": Table(rows=50), "item": Table(rows=10**9)},
        features=(
            Feature(name="age", kind="dense"),
            Feature(name="user", kind="sparse"),
            Feature(name="item", kind="sparse"),
        ),
        tasks=(Task(name="click"), Task(name="like")),
    )
    found = model_size(MODELS["dlrm"].Config(embedding_dim=4, dense=(6,), over=(5,)), schema, ("click", "like"))
    assert found.table_parameters == (50 + 10**9) * 4
    # Dense architecture 1-6-4; 3 vectors make 3 pairs; over architecture 7-5; 2 heads.
    assert found.dense_parameters == (2 * 6 + 7 * 4) + 8 * 5 + 6 * 2
    assert found.matmul_flops == 2 * (1 * 6 + 6 * 4 + 3 * 3 * 4 + 7 * 5 + 5 * 2)
    assert found.other_flops == 2 * 4 + (6 + 4) + 5
    assert found.flops == found.matmul_flops + found.other_flops


@pytest.mark.parametrize("kind", sorted(SIZES))
def test_parameters_are_the_built_models(kind: str) -> None:
    found = model_size(small_config(kind), SCHEMA, TASKS)
    named = dict(small_model(kind).named_parameters())
    assert found.table_parameters == sum(p.numel() for name, p in named.items() if is_table(name))
    assert found.dense_parameters == sum(p.numel() for name, p in named.items() if not is_table(name))
    assert found.other_flops > 0


def test_every_model_has_a_reference_config() -> None:
    for kind in MODELS:
        reference_config(kind).check(REFERENCE_SCHEMA, ("click",))


def test_the_example_runs() -> None:
    result = doctest.testmod(size)
    assert (result.attempted > 0, result.failed) == (True, 0)
