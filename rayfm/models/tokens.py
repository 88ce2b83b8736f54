"""Models on tokens: what turns a batch into equally wide vectors, and layers that mix vectors without mixing columns.

Shape letters: B examples, F embedded features, D dense features, N tokens in, M tokens out, E width of a token (the
embedding dimension).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rayfm.models.mlp import MLP


class TokenLinear(nn.Module):
    """Each output token is a weighted sum of the input tokens, one set of weights for all columns: ``W X``.

    Wukong calls it a linear compression block, InterFormer LCE.

    Args:
        in_tokens: N.
        out_tokens: M.

    Example::

        >>> import torch
        >>> TokenLinear(6, 2)(torch.rand(3, 6, 8)).shape
        torch.Size([3, 2, 8])
    """

    def __init__(self, in_tokens: int, out_tokens: int) -> None:
        super().__init__()
        self.weight_MN = nn.Parameter(torch.empty(out_tokens, in_tokens))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform, so that a sum of independent tokens has the variance of one."""
        bound = math.sqrt(3.0 / self.weight_MN.shape[1])
        nn.init.uniform_(self.weight_MN, -bound, bound)

    def forward(self, x_BNE: Tensor) -> Tensor:
        # Not matmul, which (as linear layers of what is not contiguous) takes another path where gradients are needed,
        # so that the served model's last bits would differ from the trained one's.
        return torch.einsum("mn,bne->bme", self.weight_MN, x_BNE).contiguous()


def token_shortcut(in_tokens: int, out_tokens: int) -> nn.Module:
    """The identity, or a `TokenLinear` where the numbers of tokens differ."""
    return nn.Identity() if in_tokens == out_tokens else TokenLinear(in_tokens, out_tokens)


class Tokens(nn.Module):
    """Embedded features, and all dense ones as one more vector: ``[B, F, E], [B, D] -> [B, N, E]``.

    Args:
        embedded: F.
        dense: D; without dense features N is F.
        dim: E.
        hidden: widths of the MLP that the dense features go through before a linear layer of width E.

    Attributes:
        count: N.
    """

    def __init__(self, embedded: int, dense: int, dim: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.dense_arch = nn.Sequential(MLP(dense, hidden), nn.Linear((dense, *hidden)[-1], dim)) if dense else None
        self.count = embedded + (self.dense_arch is not None)

    def forward(self, embeddings_BFE: Tensor, dense_BD: Tensor) -> Tensor:
        if self.dense_arch is None:
            return embeddings_BFE
        return torch.cat([embeddings_BFE, self.dense_arch(dense_BD).unsqueeze(1)], dim=1)


class ToTokens(nn.Module):
    """An MLP whose last layer is cut into tokens: ``[B, I] -> [B, M, E]``.

    Args:
        in_dim: I.
        hidden: widths before the last layer.
        out_tokens: M.
        dim: E.
    """

    def __init__(self, in_dim: int, hidden: tuple[int, ...], out_tokens: int, dim: int) -> None:
        super().__init__()
        self.mlp = MLP(in_dim, hidden)
        self.output = nn.Linear(self.mlp.out_dim, out_tokens * dim)
        self.out_tokens = out_tokens

    def forward(self, x_BI: Tensor) -> Tensor:
        tokens: Tensor = self.output(self.mlp(x_BI))
        return tokens.view(x_BI.shape[0], self.out_tokens, tokens.shape[1] // self.out_tokens)
