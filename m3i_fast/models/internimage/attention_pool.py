"""Attention pooling with one query: InternImage's `clip_projector`.

Legend: B images, n tokens, D their width, h heads, E output width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3i_fast.models.internimage.deformable import norm_last
from m3i_fast.models.transformer.layers import Linear, reset_children


class CrossAttention(nn.Module):
    """Multi-head cross attention with its projections, named as in the official checkpoints."""

    def __init__(self, dim: int, *, num_heads: int, output_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = Linear(dim, dim, bias=False)
        self.k = Linear(dim, dim, bias=False)
        self.v = Linear(dim, dim, bias=False)
        self.q_bias = nn.Parameter(torch.empty(dim))
        self.k_bias = nn.Parameter(torch.empty(dim))
        self.v_bias = nn.Parameter(torch.empty(dim))
        self.proj = Linear(dim, output_dim)
        self._reset_own()

    def reset_parameters(self) -> None:
        reset_children(self)
        self._reset_own()

    def _reset_own(self) -> None:
        for bias in (self.q_bias, self.k_bias, self.v_bias):
            nn.init.zeros_(bias)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from m queries to n keys: q [B, m, D], k and v [B, n, D] -> [B, m, E]."""
        q = self._heads(F.linear(q, self.q.weight, self.q_bias))
        k = self._heads(F.linear(k, self.k.weight, self.k_bias))
        v = self._heads(F.linear(v, self.v.weight, self.v_bias))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:  # [B, n, D] -> [B, h, n, D / h]
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class AttentionPool(nn.Module):
    """Attention pooling: the mean token attends to all tokens, without residual.

    [B, n, D] -> [B, E].
    """

    def __init__(self, dim: int, *, num_heads: int, output_dim: int) -> None:
        super().__init__()
        self.norm1_q = norm_last(dim)
        self.norm1_k = norm_last(dim)
        self.norm1_v = norm_last(dim)
        self.cross_dcn = CrossAttention(dim, num_heads=num_heads, output_dim=output_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        query = self.norm1_q(tokens.mean(1, keepdim=True))
        return self.cross_dcn(query, self.norm1_k(tokens), self.norm1_v(tokens)).squeeze(1)
