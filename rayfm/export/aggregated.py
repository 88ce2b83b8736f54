"""Platt scaling from aggregated labels alone: counts of positives per cell, no label of any row.

The role of SKAdNetwork in SEAD section 3: where a privacy policy hides conversions, their counts per campaign and
period are still reported, and what is served is calibrated on them. The paper gives no method. Here the count of a cell
is Poisson with the sum of its calibrated predictions as mean.

Shape letters: N rows, C cells.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayfm.config import DataError
from rayfm.export.calibrator import MAX_ITERATIONS, RIDGE

_BISECTIONS = 100
_TOLERANCE = 1e-9


def expected_counts(logit: Tensor, cell: Tensor, weight: Tensor, cells: int, scale: float, shift: float) -> Tensor:
    """``lambda_c``: the sum of ``weight * sigmoid(scale * logit + shift)`` over each cell's rows, ``[C]``."""
    p = torch.sigmoid(scale * logit + shift)
    return torch.zeros(cells, dtype=p.dtype, device=p.device).index_add_(0, cell, weight * p)


def fit_platt_aggregated(
    logit: Tensor, cell: Tensor, count: Tensor, weight: Tensor | None = None, origin: str = "calibration"
) -> tuple[float, float]:
    """The slope and shift under which summed predictions match the counts: ``Calibrator.set`` takes them.

    Maximises ``sum_c n_c log lambda_c - lambda_c`` by Fisher scoring with step halving, with a weak pull towards slope
    1, and then moves the shift until the sum over all cells is the sum of all counts. The slope is known only as far as
    cells differ in their logits; with one cell it stays about 1. One that is not positive would reverse the order: it
    then stays 1 and only the shift is fitted.

    Args:
        logit: ``[N]``, of every row that may have led to a count, counted or not. Rows may be bins of a histogram, with
            their number in ``weight``.
        cell: int64 ``[N]`` in [0, C): the row's (campaign, period), say.
        count: n_c, ``[C]``: positives in each cell.
        weight: ``[N]``, 1 by default; a row that stands for k rows (sampling) has k.
        origin: opens the error messages.

    Raises:
        DataError: shapes that do not fit, a value that is not finite or is negative, a count in a cell without rows, no
            count at all, or more counts than rows.
    """
    z, n = logit.detach().double(), count.double()
    w = torch.ones_like(z) if weight is None else weight.double()
    _check(z, cell, n, w, origin)
    total = float(n.sum())
    scale = _poisson_slope(z, cell, n, w, _match_total(z, w, 1.0, total))
    if scale <= 0:
        scale = 1.0
    return scale, _match_total(z, w, scale, total)


def _check(z: Tensor, cell: Tensor, n: Tensor, w: Tensor, origin: str) -> None:
    if z.ndim != 1 or cell.shape != z.shape or w.shape != z.shape or n.ndim != 1:
        raise DataError(
            f"{origin}: logits {list(z.shape)}, cells {list(cell.shape)} and weights {list(w.shape)} must have one "
            f"length, and counts {list(n.shape)} one value a cell"
        )
    if not bool(torch.isfinite(z).all() & torch.isfinite(n).all() & torch.isfinite(w).all()):
        raise DataError(f"{origin}: a logit, count or weight is not finite; look for the rows that make it so")
    if bool((n < 0).any() | (w < 0).any()):
        raise DataError(f"{origin}: a count or weight is negative; counts are of positives, and at least 0")
    if len(z) and not 0 <= int(cell.min()) <= int(cell.max()) < len(n):
        raise DataError(f"{origin}: a row's cell is outside [0, {len(n)}), the cells that have a count")
    rows = torch.zeros_like(n).index_add_(0, cell, w)
    empty = ((rows == 0) & (n > 0)).nonzero()
    if len(empty):
        raise DataError(
            f"{origin}: cell {int(empty[0])} has count {float(n[empty[0]]):g} and no rows; add its rows, or leave out "
            "the cell"
        )
    if not 0 < float(n.sum()) < float(w.sum()):
        raise DataError(
            f"{origin}: {float(n.sum()):g} counts over {float(w.sum()):g} rows; it needs some, and fewer than rows"
        )


def _match_total(z: Tensor, w: Tensor, scale: float, total: float) -> float:
    """The shift under which all predictions sum to ``total``; their sum rises with it, so that bisection finds it."""
    reach = 60.0 + abs(scale) * float(z.abs().max())
    low, high = -reach, reach
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if float((w * torch.sigmoid(scale * z + middle)).sum()) < total:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _poisson_slope(z: Tensor, cell: Tensor, n: Tensor, w: Tensor, shift: float) -> float:
    """The slope where slope and shift have the largest likelihood, looked for from (1, ``shift``)."""
    start = torch.tensor([1.0, shift], dtype=torch.float64, device=z.device)
    ridge = RIDGE * torch.eye(2, dtype=torch.float64, device=z.device)
    inputs_N2 = torch.stack([z, torch.ones_like(z)], dim=1)
    tiny = torch.finfo(torch.float64).tiny

    def counts(parameters: Tensor) -> Tensor:
        scale, shift = parameters.tolist()
        return expected_counts(z, cell, w, len(n), scale, shift).clamp_min(tiny)

    def loss(parameters: Tensor) -> Tensor:
        mean_C = counts(parameters)
        return (mean_C - n * mean_C.log()).sum() + 0.5 * RIDGE * (parameters - start).square().sum()

    parameters, value = start, loss(start)
    for _ in range(MAX_ITERATIONS):
        mean_C = counts(parameters)
        p = torch.sigmoid(inputs_N2 @ parameters)
        slope_C2 = z.new_zeros(len(n), 2).index_add_(0, cell, (w * p * (1 - p)).unsqueeze(1) * inputs_N2)
        gradient = slope_C2.T @ (1 - n / mean_C) + RIDGE * (parameters - start)
        information = slope_C2.T @ (slope_C2 / mean_C.unsqueeze(1)) + ridge
        step = torch.linalg.solve(information, gradient)
        rate = 1.0
        while rate > 1e-6 and not loss(parameters - rate * step) <= value:
            rate /= 2
        if rate <= 1e-6:
            break
        parameters = parameters - rate * step
        value = loss(parameters)
        if float(step.abs().max()) < _TOLERANCE:
            break
    return float(parameters[0])
