"""Expected normal order statistics, exact and approximate: what UKDSL Eq. 1 stands on.

Source: UKDSL section 3.1, Eq. 1, after Royston 1982 (algorithm AS 177). The paper prints alpha = 3.375, under which the
argument of the quantile exceeds 1 for the first ranks; Royston's (and Blom's) constant is 0.375.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from rayfm.config import RayfmError

Float64 = npt.NDArray[np.float64]

BLOM = 0.375
"""alpha of Eq. 1."""

_REACH, _NODES = 14.0, 4001
"""Quadrature: trapezoids over [-14, 14], which for a smooth integrand that vanishes at both ends converge faster than
any power of the step."""


def approximate_order_statistics(n: int, alpha: float = BLOM) -> Float64:
    """Eq. 1 for mu = 0 and a total variance of 1: ``Phi^-1((n - i - alpha + 1) / (n - 2 alpha + 1))``, ``[n]``.

    Args:
        n: how many candidates.
        alpha: in [0, 1).

    Returns:
        For i = 1 (the largest) to n.

    Raises:
        RayfmError: n is not positive, or alpha is outside [0, 1).
    """
    _check(n)
    if not 0 <= alpha < 1:
        raise RayfmError(
            f"alpha {alpha}: outside [0, 1) the quantile's argument leaves (0, 1) for the first ranks; take {BLOM}"
        )
    i = torch.arange(1, n + 1, dtype=torch.float64)
    found: Float64 = torch.special.ndtri((n - i - alpha + 1) / (n - 2 * alpha + 1)).numpy()
    return found


def exact_order_statistics(n: int) -> Float64:
    """``E[Z_(i)]`` of n independent standard normals, i = 1 the largest, ``[n]``, by quadrature to about 1e-10.

    ``E[Z_(i)] = n! / ((i-1)! (n-i)!) * integral of z phi(z) Phi(z)^(n-i) (1 - Phi(z))^(i-1)``, in logarithms, since the
    factor and the powers over- and underflow apart.

    Raises:
        RayfmError: n is not positive.
    """
    _check(n)
    z = torch.linspace(-_REACH, _REACH, _NODES, dtype=torch.float64)
    below, above = torch.special.log_ndtr(z), torch.special.log_ndtr(-z)
    density = -0.5 * z * z - 0.5 * np.log(2 * np.pi)
    found = torch.empty(n, dtype=torch.float64)
    step = z[1] - z[0]
    for start in range(0, n, 1024):  # bounded memory for any n
        i = torch.arange(start + 1, min(n, start + 1024) + 1, dtype=torch.float64).unsqueeze(1)
        factor = torch.lgamma(torch.tensor(n + 1.0, dtype=torch.float64)) - torch.lgamma(i) - torch.lgamma(n - i + 1)
        weight = torch.exp(factor + density + (n - i) * below + (i - 1) * above)
        found[start : start + 1024] = (weight * z).sum(dim=1) * step
    exact: Float64 = found.numpy()
    return exact


def _check(n: int) -> None:
    if n < 1:
        raise RayfmError(f"{n} candidates: there must be at least one")
