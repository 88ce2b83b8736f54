"""How much a student adapter helps against a teacher that has drifted: ExFM theorem 3.2, by the proof's construction.

Labels are ``y_i = x_i^T (w + n_i)`` with ``x_i ~ N(0, I_d)`` and ``n_i ~ N(0, gamma^2 I_d)``. The teacher's w^ is off
by ``w - w^`` in the row space of H ``[s, d]`` (orthonormal rows), and an adapter u learns that from the labels. The
student minimises Eq. 13, whose solution is

    w_V = (w_1 + alpha (w^ + H^T u)) / (1 + alpha),

w_1 being least squares on the labels alone. With the noise as it is written, whose variance grows with ``|x|^2``, to
first order in 1/N:

    E|w_1 - w|^2 = gamma^2 d (d + 2) / N,
    E|w_V - w|^2 = gamma^2 (d + 2) (alpha^2 s + 2 alpha s + d) / ((1 + alpha)^2 N).

So the gain ``|w_1 - w| / |w_V - w|`` is 1 at alpha = 0 and rises towards ``sqrt(d / s)``. The paper's ``(d / s)^(1/4)``
is the ratio of two upper bounds; it is passed through at one alpha (`alpha_of_the_papers_gain`) and is no limit. Its
bound on ``|w_1 - w|``, of order ``gamma sqrt(d / N)``, is a factor ``sqrt(d + 2)`` below the error that its own noise
model makes. Where part of ``w - w^`` lies outside the row space, against the proof's assumption, the student keeps
``alpha / (1 + alpha)`` of it, and the best alpha is finite.

Shape letters: R repetitions, N labels, d inputs, s units of the adapter, A values of alpha.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rayfm.config import RayfmError

Float64 = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Drift:
    """A regression whose teacher is out of date."""

    inputs: int = 64
    """d."""
    adapter: int = 4
    """s."""
    labels: int = 4000
    """N."""
    gamma: float = 5.0
    """Size of the noise; the proof assumes it much larger than 1."""
    drift: float = 1.0
    """``|P_H (w - w^)|``: what the adapter can learn."""
    outside: float = 0.0
    """``|(I - P_H)(w - w^)|``: what it cannot; the proof assumes 0."""

    def __post_init__(self) -> None:
        if not 1 <= self.adapter <= self.inputs < self.labels or self.gamma <= 0 or min(self.drift, self.outside) < 0:
            raise RayfmError(f"{self}: needs 1 <= adapter <= inputs < labels, gamma > 0, drift and outside >= 0")


def expected_error(drift: Drift, alpha: Float64) -> Float64:
    """Root of ``E|w_V - w|^2`` to first order in 1/N, ``[A]``; alpha = 0 is least squares on the labels."""
    d, s = drift.inputs, drift.adapter
    noise = drift.gamma**2 * (d + 2) * (alpha**2 * s + 2 * alpha * s + d) / ((1 + alpha) ** 2 * drift.labels)
    error: Float64 = np.sqrt(noise + (alpha / (1 + alpha) * drift.outside) ** 2)
    return error


def expected_gain(drift: Drift, alpha: Float64) -> Float64:
    """``|w_1 - w| / |w_V - w|`` of the expected errors, ``[A]``."""
    return expected_error(drift, np.zeros(1)) / expected_error(drift, alpha)


def papers_gain(drift: Drift) -> float:
    """``(d / s)^(1/4)``, the paper's ratio of bounds."""
    return float((drift.inputs / drift.adapter) ** 0.25)


def largest_gain(drift: Drift) -> float:
    """``sqrt(d / s)``: the gain for alpha towards infinity, where the proof's assumption holds."""
    return float((drift.inputs / drift.adapter) ** 0.5)


def alpha_of_the_papers_gain(drift: Drift) -> float:
    """The alpha at which the expected gain is ``(d / s)^(1/4)``, without drift outside the row space.

    ``(alpha^2 s + 2 alpha s + d) / (1 + alpha)^2 = sqrt(d s)`` gives ``(1 + alpha)^2 = (d - s) / (sqrt(d s) - s)``.
    """
    d, s = drift.inputs, drift.adapter
    return float(np.sqrt((d - s) / (np.sqrt(d * s) - s)) - 1) if d > s else 0.0


@dataclasses.dataclass(frozen=True)
class Measured:
    """Root mean squared errors over repetitions, and half-widths of their 95 % intervals."""

    alpha: Float64
    """``[A]``."""
    error: Float64
    """``[A]``."""
    half: Float64
    """``[A]``."""
    gain: Float64
    """``[A]``: the error at alpha = 0 over each."""
    gain_half: Float64
    """``[A]``."""


def measure(drift: Drift, alpha: Sequence[float], repetitions: int = 200, seed: int = 0) -> Measured:
    """Draw labels, solve Eq. 13 exactly, and take the distance to w; repeated.

    Raises:
        RayfmError: a negative alpha, or fewer than two repetitions.
    """
    asked = np.asarray(alpha, dtype=np.float64)
    if (asked < 0).any() or repetitions < 2:
        raise RayfmError("alpha must be at least 0, and at least two repetitions are needed")
    generator = np.random.default_rng(seed)
    steps = np.concatenate([[0.0], asked])
    squared = np.empty((repetitions, len(steps)))
    for repetition in range(repetitions):
        squared[repetition] = _once(drift, steps, generator)
    mean = squared.mean(axis=0)
    spread = 1.96 / np.sqrt(repetitions)
    error = np.sqrt(mean)
    half = spread * squared.std(axis=0, ddof=1) / (2 * error)
    ratio = mean[0] / mean
    residual = (squared[:, :1] - ratio * squared) / mean
    gain = np.sqrt(ratio)
    gain_half = spread * residual.std(axis=0, ddof=1) / (2 * gain)
    return Measured(asked, error[1:], half[1:], gain[1:], gain_half[1:])


def _once(drift: Drift, alpha: Float64, generator: np.random.Generator) -> Float64:
    """``|w_V - w|^2`` of one draw, ``[A]``."""
    d, s, rows = drift.inputs, drift.adapter, drift.labels
    basis = np.linalg.qr(generator.standard_normal((d, min(d, s + 1))))[0].T
    h_sd = basis[:s]
    direction = generator.standard_normal(s)
    off = drift.drift * h_sd.T @ (direction / np.linalg.norm(direction))
    if drift.outside:
        off = off + drift.outside * basis[-1]  # orthogonal to H's rows where s < d
    w = generator.standard_normal(d)
    teacher = w - off
    x_Nd = generator.standard_normal((rows, d))
    # x^T n with n ~ N(0, gamma^2 I) is N(0, gamma^2 |x|^2).
    noise_N = drift.gamma * np.linalg.norm(x_Nd, axis=1) * generator.standard_normal(rows)
    y_N = x_Nd @ w + noise_N
    own = np.linalg.solve(x_Nd.T @ x_Nd, x_Nd.T @ y_N)
    hx_Ns = x_Nd @ h_sd.T
    u_s = np.linalg.solve(hx_Ns.T @ hx_Ns, hx_Ns.T @ (y_N - x_Nd @ teacher))
    adapted = teacher + h_sd.T @ u_s
    student_Ad = (own + alpha[:, None] * adapted) / (1 + alpha[:, None])
    distance: Float64 = ((student_Ad - w) ** 2).sum(axis=1)
    return distance
