"""Scale: what is multiplied, how it is rounded, and what it does to the number of parameters."""

from __future__ import annotations

import itertools
from typing import Literal

import pytest
import torch
from model_batches import SCHEMA, SIZES, TASKS, is_table, random_batch, small_config, small_model
from pydantic import Field, ValidationError, model_validator

from rayfm.export.served import export_model
from rayfm.models.base import ModelConfig
from rayfm.models.scaling import OptionalWidth, Width, Widths, scaled, times


class SizesConfig(ModelConfig):
    type: Literal["sizes"] = "sizes"
    layers: int = 3
    rank: OptionalWidth = None
    hidden: Widths = (10, 5)
    groups: Width = 2


class DividedConfig(ModelConfig):
    type: Literal["divided"] = "divided"
    parts: int = 8
    width: Width = Field(16, multiple_of=2)

    @model_validator(mode="after")
    def _divides(self) -> DividedConfig:
        if self.width % self.parts:
            raise ValueError(f"width {self.width} is not a multiple of parts {self.parts}")
        return self


@pytest.mark.parametrize(
    ("width", "factor", "multiple_of", "expected"),
    [
        (64, 2, 1, 128),
        (64, 0.5, 1, 32),
        (5, 0.5, 1, 3),
        (1, 0.1, 1, 1),
        (16, 1.5, 4, 24),
        (4, 0.5, 4, 4),
        (12, 0.5, 4, 8),
    ],
)
def test_rounding(width: int, factor: float, multiple_of: int, expected: int) -> None:
    assert times(width, factor, multiple_of) == expected


def test_widths_are_multiplied_and_nothing_else() -> None:
    config = scaled(SizesConfig(scale=1.5, embedding_dim=12, activation_clip=6.0))
    assert config == SizesConfig(embedding_dim=20, hidden=(15, 8), groups=3, activation_clip=6.0)
    assert scaled(SizesConfig(scale=2, rank=3)).rank == 6
    assert scaled(config) is config


def test_experts_grow_in_width_not_in_number() -> None:
    config = scaled(small_config("dlrm", scale=2.0, multi_task={"type": "mmoe", "experts": 3, "expert_hidden": (6,)}))
    assert (config.multi_task.experts, config.multi_task.expert_hidden) == (3, (12,))


def test_a_scale_that_does_not_fit_is_refused_with_the_config() -> None:
    assert scaled(DividedConfig(scale=1.5)).width == 24
    with pytest.raises(ValidationError, match=r"scale 0\.75 does not fit: width 12 is not a multiple of parts 8; take"):
        DividedConfig(scale=0.75)
    with pytest.raises(ValidationError, match="greater than 0"):
        SizesConfig(scale=0)


def parameters(kind: str, **changes: object) -> tuple[int, int]:
    """Parameters of tables and of everything else."""
    named = small_model(kind, **changes).state_dict()
    tables = sum(value.numel() for name, value in named.items() if is_table(name))
    return tables, sum(value.numel() for value in named.values()) - tables


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0, 4.0])
def test_parameters_of_a_dlrm_by_hand(scale: float) -> None:
    def linear(*widths: int) -> int:
        return sum((a + 1) * b for a, b in itertools.pairwise(widths))

    dim, dense, first, second = int(8 * scale), int(8 * scale), int(16 * scale), int(12 * scale)
    rows = sum(table.rows for table in SCHEMA.tables.values())
    # 2 dense features and 7 embedded ones, which with the dense vector make 28 pairs.
    expected = linear(2, dense, dim) + linear(dim + 28, first, second, len(TASKS))
    assert parameters("dlrm", scale=scale) == (rows * dim, expected)


@pytest.mark.parametrize("kind", sorted(SIZES))
def test_every_model_grows(kind: str) -> None:
    tables, dense = parameters(kind)
    twice_tables, twice_dense = parameters(kind, scale=2.0)
    assert 1.5 * tables < twice_tables <= 2 * tables
    # Tokens, their width and the layers that read them side by side may all grow.
    assert 1.2 * dense < twice_dense <= 8 * dense


def test_a_scaled_model_is_published_under_its_own_config() -> None:
    config, batch = small_config("dcnv2", scale=2.0), random_batch()
    model = small_model("dcnv2", scale=2.0).eval()
    assert model.config.embedding_dim == 16
    served = export_model(config, SCHEMA, TASKS, model.state_dict())
    torch.testing.assert_close(served.model(batch).logits, model(batch).logits)
