from __future__ import annotations

import pytest
import torch
from model_batches import SCHEMA, TASKS

from rayfm.config import DataError
from rayfm.export.calibrator import Calibrator, fit_platt
from rayfm.schema import Schema


def planted(rows: int = 50_000, scale: float = 0.6, shift: float = -1.2) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits z, and labels drawn from sigmoid(scale * z + shift)."""
    generator = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(rows, generator=generator)
    return z, torch.bernoulli(torch.sigmoid(scale * z + shift), generator=generator)


def test_a_planted_miscalibration_is_found_and_removed() -> None:
    z, label = planted()
    calibrator = Calibrator(SCHEMA, TASKS)
    assert (torch.sigmoid(z).mean() / label.mean()).item() > 1.5
    calibrator.fit("click", z, label)
    assert calibrator.get_submodule("click").scale.item() == pytest.approx(0.6, abs=0.03)
    assert calibrator.get_submodule("click").shift.item() == pytest.approx(-1.2, abs=0.03)
    p = torch.sigmoid(calibrator({"click": z, "watch": z})["click"])
    assert (p.mean() / label.mean()).item() == pytest.approx(1, abs=1e-4)
    assert (p[z.argsort()].diff() >= 0).all()


def test_the_optimum_is_the_one_of_logistic_regression() -> None:
    from sklearn.linear_model import LogisticRegression

    z, label = planted(2000)
    weight = torch.linspace(0.1, 3.0, 2000)
    reference = LogisticRegression(C=1e6, tol=1e-8).fit(z[:, None].numpy(), label.numpy(), sample_weight=weight.numpy())
    scale, shift = fit_platt(z, label, weight)
    assert scale == pytest.approx(reference.coef_[0, 0], abs=1e-4)
    assert shift == pytest.approx(reference.intercept_[0], abs=1e-4)


def test_it_starts_as_the_identity_and_leaves_regressions() -> None:
    calibrator = Calibrator(SCHEMA, TASKS)
    z = torch.randn(5)
    out = calibrator({"click": z, "watch": z + 1})
    assert torch.equal(out["click"], z)
    assert torch.equal(out["watch"], z + 1)
    assert set(calibrator.state_dict()) == {"click.scale", "click.shift"}


def test_an_inverted_model_keeps_its_order() -> None:
    z, label = planted(scale=-0.5)
    scale, shift = fit_platt(z, label)
    assert scale == 1
    assert torch.sigmoid(z + shift).mean().item() == pytest.approx(label.mean().item(), abs=1e-4)


def test_separable_rows_have_an_answer() -> None:
    z = torch.linspace(-3, 3, 100)
    scale, shift = fit_platt(z, (z > 0).float())
    assert scale > 1
    assert abs(shift) < 1


def test_rows_of_weight_zero_are_left_out() -> None:
    z, label = planted(1000)
    weight = (torch.arange(1000) < 600).float()
    assert fit_platt(z, label, weight) == pytest.approx(fit_platt(z[:600], label[:600]))


def test_bad_rows_are_refused() -> None:
    with pytest.raises(DataError, match="calibration of task 'click': it needs rows with label 1"):
        Calibrator(SCHEMA, TASKS).fit("click", torch.randn(5), torch.zeros(5))
    with pytest.raises(DataError, match="not finite"):
        fit_platt(torch.tensor([0.0, float("nan")]), torch.tensor([0.0, 1.0]))


def test_a_task_cannot_hide_a_method() -> None:
    schema = Schema.model_validate({**SCHEMA.dump(), "tasks": [{"name": "fit"}]})
    from rayfm.config import ConfigError

    with pytest.raises(ConfigError, match="task 'fit'"):
        Calibrator(schema, ("fit",))
