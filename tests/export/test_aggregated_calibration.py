"""Calibration on counts per cell, without a label of any row."""

from __future__ import annotations

import math

import pytest
import torch
from model_batches import SCHEMA, TASKS

from rayfm.config import DataError
from rayfm.export.aggregated import expected_counts, fit_platt_aggregated
from rayfm.export.calibrator import Calibrator, fit_platt

SCALE, SHIFT = 0.7, -1.5


def campaigns(cells: int = 60, rows: int = 120_000, spread: float = 1.0) -> tuple[torch.Tensor, ...]:
    """Logits of rows in cells that differ by ``spread``, and labels from sigmoid(SCALE * z + SHIFT)."""
    generator = torch.Generator().manual_seed(0)
    cell = torch.randint(0, cells, (rows,), generator=generator)
    level = spread * torch.randn(cells, generator=generator)
    z = level[cell] + torch.randn(rows, generator=generator)
    return z, cell, torch.bernoulli(torch.sigmoid(SCALE * z + SHIFT), generator=generator)


def counts_of(cell: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return torch.bincount(cell, label.double())


def test_a_known_miscalibration_is_found_from_counts() -> None:
    z, cell, label = campaigns()
    count = counts_of(cell, label)
    assert torch.sigmoid(z).sum() / count.sum() > 1.5
    scale, shift = fit_platt_aggregated(z, cell, count)
    assert scale == pytest.approx(SCALE, abs=0.03)
    assert shift == pytest.approx(SHIFT, abs=0.03)
    by_row = fit_platt(z, label)
    assert (scale, shift) == pytest.approx(by_row, abs=0.03)
    expected = expected_counts(z.double(), cell, torch.ones(len(z)).double(), len(count), scale, shift)
    assert float(expected.sum()) == pytest.approx(float(count.sum()), rel=1e-9)
    # Each campaign's sum is as far from its count as chance puts it: a reduced chi-square of about 1.
    chi = ((count - expected) ** 2 / expected).mean()
    assert 0.4 < float(chi) < 1.4


def test_two_cells_of_one_logit_each_have_a_closed_form() -> None:
    z = torch.cat([torch.full((1000,), -1.0), torch.full((1000,), 1.0)])
    cell = (z > 0).long()
    scale, shift = fit_platt_aggregated(z, cell, torch.tensor([100, 300]))
    low, high = math.log(0.1 / 0.9), math.log(0.3 / 0.7)
    assert scale == pytest.approx((high - low) / 2, rel=1e-3)
    assert shift == pytest.approx((high + low) / 2, rel=1e-3)


def test_expected_counts_by_hand() -> None:
    z, cell, w = torch.tensor([0.0, 2.0, -1.0]), torch.tensor([1, 0, 1]), torch.tensor([1.0, 3.0, 2.0])
    found = expected_counts(z, cell, w, 3, 2.0, 1.0)
    s = [1 / (1 + math.exp(-x)) for x in (1.0, 5.0, -1.0)]
    assert found.tolist() == pytest.approx([3 * s[1], s[0] + 2 * s[2], 0.0])


def test_one_cell_gives_the_shift_alone() -> None:
    z, _, label = campaigns(cells=1, rows=20_000)
    scale, shift = fit_platt_aggregated(z, torch.zeros(len(z), dtype=torch.long), label.sum().reshape(1))
    assert scale == pytest.approx(1, abs=0.1)
    assert torch.sigmoid(scale * z.double() + shift).sum().item() == pytest.approx(label.sum().item(), rel=1e-9)


def test_cells_that_are_all_alike_have_an_answer() -> None:
    z = torch.linspace(-2, 2, 500).repeat(4)
    scale, shift = fit_platt_aggregated(z, torch.arange(4).repeat_interleave(500), torch.tensor([30, 28, 33, 29]))
    assert torch.sigmoid(scale * z.double() + shift).sum().item() == pytest.approx(120, rel=1e-9)
    assert 0.5 < scale < 2


def test_an_inverted_order_is_kept() -> None:
    z = torch.cat([torch.full((1000,), -1.0), torch.full((1000,), 1.0)])
    scale, shift = fit_platt_aggregated(z, (z > 0).long(), torch.tensor([300, 100]))
    assert scale == 1
    assert torch.sigmoid(z.double() + shift).sum().item() == pytest.approx(400, rel=1e-9)


def test_a_cell_without_positives_counts_too() -> None:
    z, cell, label = campaigns(cells=20, rows=40_000)
    label[cell == 3] = 0
    with_it = fit_platt_aggregated(z, cell, counts_of(cell, label))
    assert with_it[1] < fit_platt_aggregated(z[cell != 3], cell[cell != 3], counts_of(cell, label))[1]


def test_a_histogram_stands_for_its_rows() -> None:
    z, cell, label = campaigns(cells=10, rows=30_000)
    binned = (z * 50).round() / 50
    bins, inverse = torch.unique(torch.stack([cell.float(), binned]), dim=1, return_inverse=True)
    weight = torch.bincount(inverse)
    from_bins = fit_platt_aggregated(bins[1], bins[0].long(), counts_of(cell, label), weight)
    assert from_bins == pytest.approx(fit_platt_aggregated(binned, cell, counts_of(cell, label)), abs=1e-6)


def test_a_calibrator_takes_the_fit() -> None:
    z, cell, label = campaigns(cells=30, rows=30_000)
    calibrator = Calibrator(SCHEMA, TASKS)
    calibrator.set("click", *fit_platt_aggregated(z, cell, counts_of(cell, label)))
    p = torch.sigmoid(calibrator({"click": z.double(), "watch": z})["click"])
    assert p.sum().item() == pytest.approx(label.sum().item(), rel=1e-5)


Z, CELL = torch.zeros(4), torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Z, CELL[:3], torch.tensor([1.0, 0.0])), "must have one length"),
        ((Z, CELL, torch.tensor([1.0, float("nan")])), "not finite"),
        ((Z + float("inf"), CELL, torch.tensor([1.0, 0.0])), "not finite"),
        ((Z, CELL, torch.tensor([1.0, -1.0])), "a count or weight is negative"),
        ((Z, CELL + 1, torch.tensor([1.0, 0.0])), r"a row's cell is outside \[0, 2\)"),
        ((Z, CELL, torch.tensor([1.0, 0.0, 2.0])), "cell 2 has count 2 and no rows"),
        ((Z, CELL, torch.tensor([0.0, 0.0])), "0 counts over 4 rows"),
        ((Z, CELL, torch.tensor([2.0, 2.0])), "4 counts over 4 rows"),
        ((Z[:0], CELL[:0], torch.tensor([0.0])), "0 counts over 0 rows"),
    ],
)
def test_bad_aggregates_are_refused(arguments: tuple[torch.Tensor, ...], message: str) -> None:
    with pytest.raises(DataError, match=f"calibration of task 'click': .*{message}"):
        fit_platt_aggregated(*arguments, origin="calibration of task 'click'")
