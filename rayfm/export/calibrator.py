"""Platt scaling: a slope and a shift of each binary task's logit, as an optional part of a served model.

Source: Platt, Probabilistic Outputs for Support Vector Machines, 1999; fitted by Newton's method with step halving
(Lin, Lin, Weng 2007).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rayfm.config import DataError
from rayfm.models.embeddings import require_module_names
from rayfm.schema import Schema

RIDGE = 1e-3
"""Pull towards the identity in units of one row's loss, so that separable rows still have a solution."""
MAX_ITERATIONS = 50
_TOLERANCE = 1e-9


class PlattScaling(nn.Module):
    """``scale * z + shift`` of a logit, the identity at first: ``[B] -> [B]``."""

    scale: Tensor
    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("shift", torch.zeros(()))

    def forward(self, logit: Tensor) -> Tensor:
        return self.scale * logit + self.shift


class Calibrator(nn.Module):
    """One ``PlattScaling`` per binary task; regressions pass unchanged.

    Its tensors are ``<task>.scale`` and ``<task>.shift``. The slope is positive, so that no order changes.

    Args:
        schema: the pipeline's schema.
        tasks: the model's tasks.
    """

    def __init__(self, schema: Schema, tasks: tuple[str, ...]) -> None:
        super().__init__()
        binary = [task for task in tasks if schema.task(task).kind == "binary"]
        require_module_names("task", binary, self)
        for task in binary:
            self.add_module(task, PlattScaling())
        self._binary = frozenset(binary)

    def forward(self, logits: dict[str, Tensor]) -> dict[str, Tensor]:
        """Calibrated logits."""
        return {task: self.get_submodule(task)(z) if task in self._binary else z for task, z in logits.items()}

    def set(self, task: str, scale: float, shift: float) -> None:
        """Take over the slope and shift of one binary task."""
        part = self.get_submodule(task)
        assert isinstance(part, PlattScaling)
        part.scale.fill_(scale)
        part.shift.fill_(shift)

    def fit(self, task: str, logit: Tensor, label: Tensor, weight: Tensor | None = None) -> None:
        """Fit one binary task on rows that the model was not trained on; each argument is ``[n]``.

        Raises:
            DataError: the rows have no positive or no negative label, or a value is not finite.
        """
        self.set(task, *fit_platt(logit, label, weight, origin=f"calibration of task {task!r}"))


def fit_platt(
    logit: Tensor, label: Tensor, weight: Tensor | None = None, origin: str = "calibration"
) -> tuple[float, float]:
    """The slope and shift that minimise weighted cross-entropy of ``sigmoid(slope * logit + shift)``.

    A slope that is not positive would reverse the order; the slope then stays 1 and only the shift is fitted.

    Args:
        logit: ``[n]``.
        label: ``[n]``, 0 or 1 (or a probability).
        weight: ``[n]``, 1 by default; 0 leaves a row out.
        origin: opens the error messages.

    Raises:
        DataError: the rows have no positive or no negative label, or a value is not finite.
    """
    z, y = logit.detach().double(), label.double()
    w = torch.ones_like(z) if weight is None else weight.double()
    if not bool(torch.isfinite(z).all() & torch.isfinite(y).all() & torch.isfinite(w).all()):
        raise DataError(f"{origin}: a logit, label or weight is not finite; look for the rows that make it so")
    if float((w * y).sum()) <= 0 or float((w * (1 - y)).sum()) <= 0:
        raise DataError(f"{origin}: it needs rows with label 1 and rows with label 0; take more rows")
    scale, shift = _newton(z, y, w, fit_scale=True).tolist()
    if scale <= 0:
        scale, shift = _newton(z, y, w, fit_scale=False).tolist()
    return scale, shift


def _newton(z: Tensor, y: Tensor, w: Tensor, fit_scale: bool) -> Tensor:
    """Newton's method on (scale, shift) from (1, 0): ``[2]``."""
    inputs_n2 = torch.stack([z if fit_scale else torch.zeros_like(z), torch.ones_like(z)], dim=1)
    offset = torch.zeros_like(z) if fit_scale else z
    start = torch.tensor([1.0, 0.0], dtype=torch.float64, device=z.device)
    ridge = RIDGE * torch.eye(2, dtype=torch.float64, device=z.device)

    def loss(parameters: Tensor) -> Tensor:
        logit = inputs_n2 @ parameters + offset
        rows = nn.functional.binary_cross_entropy_with_logits(logit, y, weight=w, reduction="sum")
        return rows + 0.5 * RIDGE * (parameters - start).square().sum()

    parameters, value = start, loss(start)
    for _ in range(MAX_ITERATIONS):
        p = torch.sigmoid(inputs_n2 @ parameters + offset)
        gradient = inputs_n2.T @ (w * (p - y)) + RIDGE * (parameters - start)
        hessian = (inputs_n2 * (w * p * (1 - p)).unsqueeze(1)).T @ inputs_n2 + ridge
        step = torch.linalg.solve(hessian, gradient)
        rate = 1.0
        while rate > 1e-6 and not loss(parameters - rate * step) <= value:
            rate /= 2
        if rate <= 1e-6:
            break
        parameters = parameters - rate * step
        value = loss(parameters)
        if float(step.abs().max()) < _TOLERANCE:
            break
    return parameters
