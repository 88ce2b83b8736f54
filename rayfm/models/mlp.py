"""Multi-layer perceptrons, and the head that ends in one number.

Shape letters: B examples, H width of the representation, T tasks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """Linear, (layer norm,) ReLU, (dropout) for each size: ``[B, in_dim] -> [B, out_dim]``.

    Args:
        in_dim: width of the input.
        sizes: width of each layer; none makes it the identity.
        dropout: share of a layer's outputs dropped in training.
        layer_norm: normalise each layer before its ReLU (Ba, Kiros, Hinton 2016).

    Attributes:
        out_dim: width of the output.

    Example::

        >>> import torch
        >>> MLP(10, (8, 4))(torch.rand(3, 10)).shape
        torch.Size([3, 4])
    """

    def __init__(self, in_dim: int, sizes: tuple[int, ...], dropout: float = 0.0, layer_norm: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for size in sizes:
            layers.append(nn.Linear(in_dim, size))
            if layer_norm:
                layers.append(nn.LayerNorm(size))
            layers.append(nn.ReLU())
            if dropout:
                layers.append(nn.Dropout(dropout))
            in_dim = size
        self.layers = nn.Sequential(*layers)
        self.out_dim = in_dim

    def forward(self, x_BI: Tensor) -> Tensor:
        out: Tensor = self.layers(x_BI)
        return out


def full_precision(x: Tensor) -> torch.autocast:
    """A context without autocast on the device of ``x``.

    A logit rounded to bf16 is off by up to 0.4 %, more than the differences of NE that count; the layer that makes it
    costs next to nothing in fp32.
    """
    return torch.autocast(x.device.type, enabled=False)


class Head(nn.Module):
    """An MLP that ends in one number: ``[B, H] -> [B]``, float32 also under autocast.

    Args:
        in_dim: H.
        hidden: widths of the hidden layers; none makes it linear.
    """

    def __init__(self, in_dim: int, hidden: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.hidden = MLP(in_dim, hidden)
        self.output = nn.Linear(self.hidden.out_dim, 1)

    def forward(self, representation_BH: Tensor) -> Tensor:
        hidden_BH = self.hidden(representation_BH)
        with full_precision(hidden_BH):
            out: Tensor = self.output(hidden_BH.float())
        return out.squeeze(1)


def per_task(logits_BT: Tensor, tasks: tuple[str, ...]) -> dict[str, Tensor]:
    """The columns of ``[B, T]`` by task, as float32."""
    return dict(zip(tasks, logits_BT.float().unbind(dim=1), strict=True))
