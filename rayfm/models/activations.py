"""Activation clipping, one of the measures against divergence of Khani et al. section 2."""

from __future__ import annotations

from torch import nn

from rayfm.config import ConfigError


def clip_activations(model: nn.Module, limit: float, what: str = "model") -> int:
    """Make every ReLU of a model ``min(max(x, 0), limit)`` (Krizhevsky 2010), in place; returns how many there were.

    It is part of the model, so what is served computes what was trained. Beyond the limit the gradient is zero.

    Args:
        model: the model.
        limit: above 0.
        what: names the model in messages.

    Raises:
        ConfigError: the model has no ReLU.
    """
    children = ((parent, name, child) for parent in model.modules() for name, child in parent.named_children())
    found = [(parent, name) for parent, name, child in children if type(child) is nn.ReLU]
    if not found:
        raise ConfigError(f"activation_clip: {what} has no ReLU to clip; leave the key out")
    for parent, name in found:
        setattr(parent, name, nn.Hardtanh(0.0, limit))
    return len(found)
