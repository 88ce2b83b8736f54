"""The sums behind a calibrator: the fit of the rows, however they are split."""

from __future__ import annotations

import pytest
import torch

from rayfm.config import DataError
from rayfm.export.calibration import BINS, CalibrationSums
from rayfm.export.calibrator import fit_platt


def planted(rows: int = 20_000, scale: float = 0.6, shift: float = -1.2) -> tuple[torch.Tensor, ...]:
    """Logits, labels drawn from sigmoid(scale * z + shift), weights, and which labels are known."""
    generator = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(rows, generator=generator)
    label = torch.bernoulli(torch.sigmoid(scale * z + shift), generator=generator)
    weight = 0.5 + torch.rand(rows, generator=generator)
    return z, label, torch.rand(rows, generator=generator) < 0.8, weight


@pytest.mark.parametrize("spread", [1.0, 0.1])
def test_the_fit_is_that_of_the_known_rows(spread: float) -> None:
    """Also where a model that has learnt little spreads its logits over a few bins, and the slope is steep."""
    z, label, known, weight = planted()
    z = spread * z
    sums = CalibrationSums(["view", "click"])
    for part in range(0, len(z), 3000):
        rows = slice(part, part + 3000)
        sums.update("click", z[rows], label[rows], known[rows], weight[rows])
    fits = sums.fit({})
    assert fits.keys() == {"click"}, "a task without labels has no fit"
    assert fits["click"] == pytest.approx(fit_platt(z[known], label[known], weight[known]), rel=1e-5)
    assert fits["click"] == pytest.approx((0.6 / spread, -1.2), rel=0.05)


def test_rows_become_few() -> None:
    z, label, known, weight = planted(100_000)
    sums = CalibrationSums(["click"])
    sums.update("click", z, label, known, weight)
    logit, hard, summed = sums.rows("click")
    assert len(logit) == len(hard) == len(summed) <= 4 * BINS
    assert float(summed.sum()) == pytest.approx(float(weight[known].double().sum()), rel=1e-9)
    assert float((summed * logit * hard).sum()) == pytest.approx(float((weight * z * label)[known].double().sum()))


def test_a_probability_counts_as_a_share_of_both_labels() -> None:
    z, label, known, _ = planted(2000)
    soft = 0.8 * label + 0.1
    sums = CalibrationSums(["click"])
    sums.update("click", z, soft, known, torch.ones(2000))
    assert sums.fit({})["click"] == pytest.approx(fit_platt(z[known], soft[known]), abs=1e-5)


def test_extreme_logits_stay_what_they_are() -> None:
    z = torch.tensor([-50.0, -40.0, 30.0, 60.0])
    sums = CalibrationSums(["click"])
    sums.update("click", z, torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.ones(4, dtype=torch.bool), torch.ones(4))
    assert sorted(sums.rows("click")[0].tolist()) == pytest.approx(z.tolist())


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_one_class_alone_keeps_the_fit_before(label: float) -> None:
    sums = CalibrationSums(["click"])
    arguments = torch.randn(5), torch.full((5,), label), torch.ones(5, dtype=torch.bool), torch.ones(5)
    sums.update("click", *arguments)
    assert sums.fit({"click": (0.5, 0.25)}) == {"click": (0.5, 0.25)}
    assert sums.fit({}) == {}


def test_a_logit_that_is_not_finite_is_refused() -> None:
    sums = CalibrationSums(["click"])
    z = torch.tensor([0.1, float("nan"), 0.3])
    sums.update("click", z, torch.tensor([0.0, 1.0, 1.0]), torch.ones(3, dtype=torch.bool), torch.ones(3))
    with pytest.raises(DataError, match="task 'click': a logit, label or weight is not finite"):
        sums.fit({})
