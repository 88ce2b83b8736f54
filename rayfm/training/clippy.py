"""Clippy: an adaptive limit on what one step may change (Tang et al. 2023, "Improving training stability for multitask
ranking models in recommender systems", Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def clip_factors(values: list[Tensor], updates: list[Tensor], relative: float, absolute: float) -> list[Tensor]:
    """Algorithm 1's sigma of each parameter tensor: a scalar in (0, 1].

    The largest factor under which no element moves further than ``relative * |value| + absolute``, so
    ``min(1, min over the elements of (relative * |w| + absolute) / |update|)``. It is one number for the whole tensor:
    an update keeps its direction.

    Args:
        values: parameters before the step, of any shapes.
        updates: what the step would subtract from (or add to) each: learning rate times Adagrad's or Adam's direction.
        relative: lambda_rel.
        absolute: lambda_abs, above 0, without which a parameter that is 0 could never move.
    """
    limits = torch._foreach_abs(values)
    torch._foreach_mul_(limits, relative)
    torch._foreach_add_(limits, absolute)
    torch._foreach_div_(limits, torch._foreach_abs(updates))  # x / 0 is infinite: no limit
    return [limit.min().clamp(max=1.0) if limit.numel() else limit.new_ones(()) for limit in limits]


class _Clippy(torch.optim.Optimizer):
    """Runs the base method's step, and takes back what goes beyond the limit; the state is the base method's alone."""

    relative: float
    absolute: float

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        before = [p.detach().clone() for p in moved]
        super().step()
        if moved:
            updates = torch._foreach_sub(moved, before)
            factors = clip_factors(before, list(updates), self.relative, self.absolute)
            for parameter, old, factor in zip(moved, before, factors, strict=True):
                # At a factor of 1 this is the new value itself, to the last bit.
                parameter.copy_(torch.lerp(old, parameter, factor))
        return loss


class ClippyAdagrad(_Clippy, torch.optim.Adagrad):
    """Adagrad with Clippy: Algorithm 1 as the paper has it.

    Args:
        parameters, lr, eps, weight_decay, initial_accumulator_value: as of ``torch.optim.Adagrad``.
        relative: lambda_rel, the share of its value that an element may move in a step.
        absolute: lambda_abs, what it may move beside.
    """

    def __init__(self, parameters: Any, relative: float = 0.5, absolute: float = 1e-2, **kwargs: Any) -> None:
        self.relative, self.absolute = relative, absolute
        super().__init__(parameters, **kwargs)


class ClippyAdam(_Clippy, torch.optim.Adam):
    """Adam with Clippy: the same limit on Adam's update.

    Args:
        parameters, lr, betas, eps, weight_decay: as of ``torch.optim.Adam``.
        relative, absolute: as of `ClippyAdagrad`.
    """

    def __init__(self, parameters: Any, relative: float = 0.5, absolute: float = 1e-2, **kwargs: Any) -> None:
        self.relative, self.absolute = relative, absolute
        super().__init__(parameters, **kwargs)
