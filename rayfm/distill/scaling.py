"""Label scaling and gradient scaling (ExFM section 3.3): how strongly a teacher's signal acts on the student."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def scale_label(label: Tensor, alpha: float) -> Tensor:
    """A teacher's probability times alpha, clipped to [0, 1] (ExFM Eq. 5); ``[B]``."""
    return label if alpha == 1.0 else (alpha * label).clamp(0.0, 1.0)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: float) -> Tensor:
        ctx.beta = beta
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return gradients[0] * ctx.beta, None


def scale_gradient(x: Tensor, beta: float) -> Tensor:
    """The identity, whose gradient is multiplied by beta (ExFM section 3.3, gradient scaling)."""
    if beta == 1.0:
        return x
    function: Any = _ScaleGradient  # torch does not type ``apply``
    scaled: Tensor = function.apply(x, beta)
    return scaled
