from __future__ import annotations

import numpy as np
import pytest
import torch

from rayfm.training import init
from rayfm.training.init import fill_normal

ROWS, COLUMNS = 500, 16


def filled(table: str = "user", seed: int = 1, std: float = 0.1, rows: int = ROWS, columns: int = COLUMNS):
    whole = torch.full((rows, columns), torch.nan)
    fill_normal(whole, table, seed, std, 0, 0, columns)
    return whole


@pytest.mark.parametrize(
    ("rows", "columns"),
    [((0, 500), (0, 16)), ((0, 123), (0, 16)), ((123, 500), (0, 16)), ((0, 500), (4, 12)), ((499, 500), (15, 16))],
)
def test_an_element_has_its_value_whatever_shard_it_lies_in(rows, columns):
    shard = torch.full((rows[1] - rows[0], columns[1] - columns[0]), torch.nan)
    fill_normal(shard, "user", 1, 0.1, rows[0], columns[0], COLUMNS)
    assert torch.equal(shard, filled()[rows[0] : rows[1], columns[0] : columns[1]])


def test_pieces_filled_at_a_time_do_not_show(monkeypatch):
    whole = filled()
    for chunk in (1, 17, 160):
        monkeypatch.setattr(init, "_CHUNK", chunk)
        assert torch.equal(filled(), whole)


def test_a_shard_without_rows():
    fill_normal(torch.zeros(0, COLUMNS), "user", 1, 0.1, 10, 0, COLUMNS)


def test_values_are_normal():
    """Bounds are over five standard errors of 160,000 draws."""
    values = filled(std=0.1, rows=10_000).numpy().astype(np.float64) / 0.1
    n = values.size
    assert np.isfinite(values).all()
    assert abs(values.mean()) < 5 / np.sqrt(n)
    assert abs(values.std() - 1) < 5 / np.sqrt(2 * n)
    assert abs((values**3).mean()) < 5 * np.sqrt(15 / n)
    assert abs((values**4).mean() - 3) < 5 * np.sqrt(96 / n)
    assert abs((values > 1.96).mean() - 0.025) < 5 * np.sqrt(0.025 / n)
    rows = np.corrcoef(values[:-1].reshape(-1), values[1:].reshape(-1))[0, 1]
    columns = np.corrcoef(values[:, :-1].reshape(-1), values[:, 1:].reshape(-1))[0, 1]
    assert max(abs(rows), abs(columns)) < 5 / np.sqrt(n)


def test_tables_and_seeds_differ():
    base = filled().numpy().reshape(-1)
    for other in (filled(table="video"), filled(seed=2), filled(seed=0), filled(seed=2**40 + 1)):
        assert abs(np.corrcoef(base, other.numpy().reshape(-1))[0, 1]) < 5 / np.sqrt(base.size)
    assert torch.equal(filled(seed=2), filled(seed=2))


def test_the_standard_deviation_scales():
    torch.testing.assert_close(filled(std=0.3), 3 * filled(std=0.1))
    assert (filled(std=0.0) == 0).all()
