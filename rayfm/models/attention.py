"""Multi-head attention over padded sequences, from layers that can be built on the meta device.

``torch.nn.MultiheadAttention`` holds loose parameters without ``reset_parameters``, so that DistributedModelParallel
cannot fill one that was built on meta; it also has no rotary positions.

Sources: Vaswani et al., Attention Is All You Need, NeurIPS 2017, section 3.2; rotary positions: Su et al., RoFormer,
2021, arXiv 2104.09864, Eq. 34.

Shape letters: B examples, K heads, Q queries, L keys, E width of a token, C = E / K width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from rayfm.models.mlp import MLP


def attended(mask_BL: Tensor) -> Tensor:
    """``mask_BL``, or all positions of an example that has none: the softmax over nothing would be NaN.

    What such an example gets is meaningless and is set to zero by whoever calls.
    """
    return mask_BL | ~mask_BL.any(dim=1, keepdim=True)


def masked_softmax(scores_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """Softmax over the last axis of ``[B, ..., L]`` at the positions of ``mask_BL``; zeros where there is none."""
    mask_BL = mask_BL.view(mask_BL.shape[0], *[1] * (scores_BL.dim() - 2), mask_BL.shape[1])
    weights = torch.softmax(scores_BL.float().masked_fill(~mask_BL, torch.finfo(torch.float32).min), dim=-1)
    return weights * mask_BL


def rotate(x: Tensor, positions: Tensor, base: float = 10_000.0) -> Tensor:
    """Rotary positions: coordinates (c, c + C / 2) of ``x[..., L, C]`` turned by ``position * base ** (-2 c / C)``.

    The inner product of two rotated vectors depends on their positions through the difference alone.

    Args:
        x: ``[B, K, L, C]``, C even.
        positions: ``[L]`` or ``[B, 1, L]``.
        base: of the angles.
    """
    half = x.shape[-1] // 2
    rates = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = positions.float().unsqueeze(-1) * rates
    cos, sin = angles.cos(), angles.sin()
    first, second = x[..., :half].float(), x[..., half:].float()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """``softmax(q k^T / sqrt(C)) v`` in K heads, joined by a linear layer: ``[B, Q, E], [B, L, E] -> [B, Q, E]``.

    Args:
        dim: E.
        heads: K, a divisor of E.
        rotary: turn queries and keys by their positions.

    Raises:
        ValueError: E is no multiple of K (twice K where rotary).

    Example::

        >>> import torch
        >>> tokens = torch.rand(3, 5, 8)
        >>> Attention(8, heads=2)(tokens, tokens, torch.ones(3, 5, dtype=torch.bool)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(self, dim: int, heads: int, rotary: bool = False) -> None:
        super().__init__()
        require_heads(dim, heads, rotary)
        self.heads, self.rotary = heads, rotary
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.output = nn.Linear(dim, dim)

    def forward(self, queries_BQE: Tensor, keys_BLE: Tensor, mask_BL: Tensor) -> Tensor:
        """``mask_BL`` is True where there is a key. An example without any gets values that mean nothing."""
        query_BKQC = split_heads(self.query(queries_BQE), self.heads)
        key_BLE, value_BLE = self.key_value(keys_BLE).chunk(2, dim=-1)
        key_BKLC, value_BKLC = split_heads(key_BLE, self.heads), split_heads(value_BLE, self.heads)
        if self.rotary:
            query_BKQC = rotate(query_BKQC, torch.arange(query_BKQC.shape[2], device=query_BKQC.device))
            key_BKLC = rotate(key_BKLC, torch.arange(key_BKLC.shape[2], device=key_BKLC.device))
        mask = attended(mask_BL)[:, None, None, :]
        out_BKQC = functional.scaled_dot_product_attention(query_BKQC, key_BKLC, value_BKLC, attn_mask=mask)
        out: Tensor = self.output(out_BKQC.transpose(1, 2).flatten(2))
        return out


class AttentionBlock(nn.Module):
    """Self-attention and a feed-forward network, each with a short-cut and a layer norm after it: ``[B, L, E]``.

    Args:
        dim: E.
        heads: K.
        rotary: turn queries and keys by their positions.
        hidden: width of the feed-forward network, by default 2 E.
    """

    def __init__(self, dim: int, heads: int, rotary: bool = False, hidden: int | None = None) -> None:
        super().__init__()
        self.attention = Attention(dim, heads, rotary)
        self.attention_norm = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(MLP(dim, (hidden or 2 * dim,)), nn.Linear(hidden or 2 * dim, dim))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x_BLE: Tensor, mask_BL: Tensor) -> Tensor:
        """Zeros at positions outside of ``mask_BL``."""
        x_BLE = self.attention_norm(x_BLE + self.attention(x_BLE, x_BLE, mask_BL))
        out_BLE: Tensor = self.norm(x_BLE + self.feed_forward(x_BLE))
        return out_BLE * mask_BL.unsqueeze(2)


def split_heads(x_BLE: Tensor, heads: int) -> Tensor:
    """``[B, L, E] -> [B, K, L, C]``."""
    batch, length, width = x_BLE.shape
    return x_BLE.view(batch, length, heads, width // heads).transpose(1, 2)


def require_heads(dim: int, heads: int, rotary: bool = False, key: str = "heads") -> None:
    """Refuse a number of heads that does not divide the width (twice the number where rotary).

    Args:
        dim: E.
        heads: K.
        rotary: a head's width must be even.
        key: what the number is called in the config.

    Raises:
        ValueError: naming the two numbers.
    """
    if dim % (2 * heads if rotary else heads):
        even = "twice " if rotary else ""
        raise ValueError(
            f"{key} {heads}: the width of a token, embedding_dim {dim}, is no multiple of {even}it; change one of them"
        )
