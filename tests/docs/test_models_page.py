"""The sizes on docs/models.md are what ``rayfm list models`` counts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from rayfm.cli.sizes import short
from rayfm.models import MODELS, build_model
from rayfm.models.base import ModelConfig
from rayfm.models.size import REFERENCE_SCHEMA, model_size, reference_config, table_parameters

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
ROWS = {
    cells[0].strip("`"): cells[1:]
    for line in re.findall(r"^\| `\w+` \|.*$", PAGE.read_text(), re.MULTILINE)
    if len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 9
}


def at_scale(kind: str, scale: float) -> ModelConfig:
    config = reference_config(kind)
    return type(config).model_validate({**config.dump(), "scale": scale})


def test_every_model_of_the_package_has_a_row() -> None:
    assert sorted(ROWS) == [kind for kind in MODELS if MODELS[kind].__module__.startswith("rayfm.")]


@pytest.mark.parametrize("kind", sorted(ROWS))
def test_parameters(kind: str) -> None:
    counts = []
    for scale in (1.0, 2.0):
        model = build_model(at_scale(kind, scale), REFERENCE_SCHEMA, ("click",), device=torch.device("meta"))
        tables = sum(parameter.numel() for parameter in table_parameters(model))
        counts.append((tables, sum(parameter.numel() for parameter in model.parameters()) - tables))
    (tables, dense), (twice_tables, twice_dense) = counts
    assert [ROWS[kind][i] for i in (0, 1, 3, 4)] == [short(n) for n in (tables, dense, twice_tables, twice_dense)]
    assert ROWS[kind][6] == f"{twice_dense / dense:.1f}"


@pytest.mark.parametrize("kind", ["dlrm", "fm"])
def test_operations(kind: str) -> None:
    once, twice = (model_size(at_scale(kind, scale), REFERENCE_SCHEMA, ("click",)).flops for scale in (1.0, 2.0))
    assert [ROWS[kind][i] for i in (2, 5, 7)] == [short(once), short(twice), f"{twice / once:.1f}"]
