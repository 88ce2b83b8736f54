"""One serving head keeps its teachers' bias, heads of their own do not: ExFM theorem 3.1, by the proof's construction.

The truth is ``y = u_1^T Z x`` with Z ``[d, D]`` and ``x ~ N(0, I)``. Teachers k = 2 .. d say ``w_k^T Z x`` with
``w_k = u_1 + mu u_k``, the u being orthonormal. A student has a shared layer H ``[d, D]`` and linear heads.

- One head learns ``sum_k alpha_k w_k`` (alpha on the simplex, teacher 1 being the truth). Gradient descent fits it
  without error, and is then off the truth by ``mu sqrt(sum_{k > 1} alpha_k^2)`` (rows of Z orthonormal).
- With a head per label, the head of the truth ends at ``u_1^T Z`` itself.

Since x is white, the expected loss of a linear prediction p against q is ``|p - q|^2``; descent is on that expectation.

Shape letters: D inputs, d shared units, T steps.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from rayfm.config import RayfmError

Float64 = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Teaching:
    """Who teaches, and how the student learns."""

    inputs: int = 32
    """D."""
    units: int = 4
    """d; there are d - 1 teachers."""
    mu: float = 0.5
    """How far each teacher is off the truth."""
    truth_weight: float = 0.5
    """alpha_1, of the true label; the teachers share the rest evenly."""
    rate: float = 0.1
    """Step size of the descent."""
    steps: int = 2000

    def __post_init__(self) -> None:
        if not 2 <= self.units <= self.inputs or not 0 < self.truth_weight <= 1 or self.mu < 0:
            raise RayfmError(f"{self}: needs 2 <= units <= inputs, truth_weight in (0, 1] and mu >= 0")

    @property
    def weights(self) -> Float64:
        """alpha ``[d]``."""
        rest = (1 - self.truth_weight) / (self.units - 1)
        return np.array([self.truth_weight] + [rest] * (self.units - 1))


def single_head_bias(teaching: Teaching) -> float:
    """Where one head ends: ``|H^T v - Z^T u_1| = mu sqrt(sum_{k > 1} alpha_k^2)``."""
    return float(teaching.mu * np.sqrt((teaching.weights[1:] ** 2).sum()))


@dataclasses.dataclass(frozen=True)
class Descent:
    """Distance ``|prediction - Z^T u_1|`` of the serving head after each step, ``[T + 1]``."""

    single: Float64
    auxiliary: Float64


def descend(teaching: Teaching, seed: int = 0) -> Descent:
    """Train both students from the same start by gradient descent on the expected loss.

    Raises:
        RayfmError: the step size is too large, so that the descent diverges.
    """
    generator = np.random.default_rng(seed)
    d, wide = teaching.units, teaching.inputs
    z_dD = np.linalg.qr(generator.standard_normal((wide, d)))[0].T
    basis_dd = np.linalg.qr(generator.standard_normal((d, d)))[0].T
    labels_dd = basis_dd[0] + teaching.mu * basis_dd
    labels_dd[0] = basis_dd[0]
    targets_dD = labels_dd @ z_dD
    start_dD = generator.standard_normal((d, wide)) / np.sqrt(wide)
    heads_dd = generator.standard_normal((d, d)) / np.sqrt(d)

    mixed_D = teaching.weights @ targets_dD
    single = _fit(start_dD, heads_dd[:1], mixed_D[None], np.ones(1), targets_dD[0], teaching)
    # Each head's loss has the weight that its label has in the mixture.
    auxiliary = _fit(start_dD, heads_dd, targets_dD, teaching.weights, targets_dD[0], teaching)
    if not (np.isfinite(single).all() and np.isfinite(auxiliary).all()):
        raise RayfmError(f"rate {teaching.rate}: the descent diverges; take a smaller one")
    return Descent(single, auxiliary)


def _fit(
    shared_dD: Float64, heads_kd: Float64, targets_kD: Float64, weights_k: Float64, truth_D: Float64, teaching: Teaching
) -> Float64:
    """Distance of the first head's prediction from ``truth_D`` after each step, ``[T + 1]``."""
    h, v = shared_dD.copy(), heads_kd.copy()
    found = np.empty(teaching.steps + 1)
    with np.errstate(over="ignore", invalid="ignore"):
        for step in range(teaching.steps + 1):
            found[step] = np.linalg.norm(v[0] @ h - truth_D)
            error_kD = weights_k[:, None] * (v @ h - targets_kD)
            v_next = v - 2 * teaching.rate * error_kD @ h.T
            h = h - 2 * teaching.rate * v.T @ error_kD
            v = v_next
    return found
